"""Make a synthetic catalog with planted truth, as raw tables that `python -m gtc_dist.prepare` reads.

    python tools/make_dataset.py --out demo/raw --users 3000 --items 1500 --interactions 40000

`--out` may be local or `s3://`. What is planted and where it is written: gtc_dist/data/synthetic.py.
"""

import argparse
import time
from dataclasses import fields

from tqdm import tqdm

from gtc_dist.data.synthetic import Spec, generate
from gtc_dist.errors import InputError, run_command

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
    "minimum": "interactions of every user at least",
    "noise": "variance of the nuisance in the features, relative to that of the factors",
    "nuisance": "nuisance factors of each modality",
    "cold_share": "share of items whose only interactions are in cold/",
    "missing_share": "share of items without a vector, for each modality",
    "seed": "same seed, same bytes",
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="folder to write, local or s3://; must be empty")
    parser.add_argument("--force", action="store_true", help="replace a dataset that is there")
    parser.add_argument("--modalities", metavar="NAME:WIDTH,...", help="such as visual:64,textual:48")
    defaults = Spec()
    for spec_field in fields(Spec):
        if spec_field.name in HELP:
            default = getattr(defaults, spec_field.name)
            flag = "--" + spec_field.name.replace("_", "-")
            help = f"{HELP[spec_field.name]} (default {default:g})"
            parser.add_argument(flag, type=type(default), default=default, help=help)
    options = vars(parser.parse_args(argv))

    out, force, modalities = options.pop("out"), options.pop("force"), options.pop("modalities")
    if modalities is not None:
        options["modalities"] = parse_modalities(modalities)
    spec = Spec(**options)
    started = time.monotonic()
    dataset = generate(spec, out, force, progress=lambda parts: tqdm(parts, desc="dataset", unit="part"))
    counts = dataset["counts"]
    sizes = [
        f"{counts[name]:,} {name}" for name in ("users", "items", "interactions", "cold interactions") if name in counts
    ]
    widths = [f"{name} {width}" for name, width in spec.modalities.items()]
    print(f"{out}: {', '.join(sizes)}; {', '.join(widths)}; {time.monotonic() - started:.1f} s")


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
