"""Make a synthetic catalog with planted truth, as raw tables that `python -m gtc_dist.prepare` reads.

    python tools/make_dataset.py --out demo/raw --users 3000 --items 1500 --interactions 40000
    python tools/make_dataset.py --config configs/scale/1m.yaml [--out s3://BUCKET/raw] [--users N ...]

`--out` may be local or `s3://`. Parameters come from the section `dataset:` of a config, if one is named; flags that
are given override it. More than a few parts are made as Ray tasks, on the cluster of RAY_ADDRESS or a local one. What
is planted and where it is written: gtc_dist/synthetic/generate.py.
"""

import argparse
import sys
import time
from dataclasses import fields

from tqdm import tqdm

from gtc_dist.config_file import load_config
from gtc_dist.errors import InputError, run_command
from gtc_dist.synthetic.generate import generate, prepare_folder, tasks
from gtc_dist.synthetic.spec import Spec, check_section

FEW = 8  # parts that are made in less time than Ray takes to start
HELP = {
    "users": "users",
    "items": "items",
    "interactions": "interactions in total, about",
    "factors": "content factors of an item",
    "groups": "groups of users",
    "kept": "factors that a group cares about",
    "strength": "of taste against popularity",
    "deviation": "of a user from the group's taste",
    "zipf": "exponent of item popularity",
    "activity": "exponent of the tail of user activity; smaller is heavier",
    "minimum": "interactions of every user at least",
    "noise": "variance of the nuisance in the features, relative to that of the factors",
    "nuisance": "nuisance factors of each modality",
    "cold_share": "share of items whose only interactions are in cold/",
    "missing_share": "share of items without a vector, for each modality",
    "seed": "same seed, same bytes",
    "user_chunk": "users of a part",
    "item_chunk": "items of a part",
}


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    options = vars(parser.parse_args(argv))
    config, out, force, parallel = (options.pop(name) for name in ("config", "out", "force", "parallel"))
    if "modalities" in options:
        options["modalities"] = parse_modalities(options["modalities"])
    spec, out = resolve(config, out, options)
    started = time.monotonic()
    prepare_folder(out, force)
    in_ray = parallel == "ray" or (parallel == "auto" and len(tasks(spec)) > FEW)
    if in_ray:
        print(f"{len(tasks(spec))} parts; starting Ray", file=sys.stderr)
        from gtc_dist.launch import ray_cluster  # here, so that errors above and small datasets need no Ray

        ray_cluster.connect()
    dataset = generate(spec, out, force, parallel=in_ray, progress=show)
    counts = dataset["counts"]
    sizes = [
        f"{counts[name]:,} {name}" for name in ("users", "items", "interactions", "cold interactions") if name in counts
    ]
    widths = [f"{name} {width}" for name, width in spec.modalities.items()]
    print(f"{out}: {', '.join(sizes)}; {', '.join(widths)}; {time.monotonic() - started:.1f} s")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", help="YAML file with a section dataset:, see configs/scale/")
    parser.add_argument(
        "--out", help="folder to write, local or s3://; must be empty (default: data.raw of the config)"
    )
    parser.add_argument("--force", action="store_true", help="replace a dataset that is there")
    parser.add_argument(
        "--parallel", choices=["auto", "ray", "none"], default="auto", help=f"auto: Ray tasks for more than {FEW} parts"
    )
    given = {"default": argparse.SUPPRESS}  # tells flags that are given from those that are not
    parser.add_argument("--modalities", metavar="NAME:WIDTH,...", help="such as visual:64,textual:48", **given)
    for known in fields(Spec):
        if known.name in HELP:
            flag = "--" + known.name.replace("_", "-")
            help = f"{HELP[known.name]} (default {known.default:g})"
            parser.add_argument(flag, type=known.type, help=help, **given)
    return parser


def resolve(config: str | None, out: str | None, flags: dict) -> tuple[Spec, str]:
    """What to make and where, from the config (if any) and the flags that were given, which go first."""
    values = {}
    if config is not None:
        loaded = load_config(config)
        if not loaded.dataset:
            raise InputError(f"{config} has no section dataset:, which says what to make; see configs/scale/")
        check_section(loaded.dataset, config)
        values, out = loaded.dataset, out or loaded.data.raw
    if out is None:
        raise InputError("name the folder to write with --out, or a config with --config")
    return Spec(**(values | flags)), out


def show(parts, total: int):
    """A progress bar over parts as they are finished."""
    return tqdm(parts, total=total, desc="dataset", unit="part")


def parse_modalities(text: str) -> dict[str, int]:
    """`visual:64,textual:48` as {name: width}."""
    modalities: dict[str, int] = {}
    for part in text.split(","):
        name, colon, width = part.partition(":")
        if not colon or not name.isidentifier() or not width.isdecimal():
            raise InputError(f"--modalities has {part!r}; expected NAME:WIDTH, such as visual:64")
        if name in modalities:
            raise InputError(f"--modalities names {name!r} twice")
        modalities[name] = int(width)
    return modalities


if __name__ == "__main__":
    run_command(main)
