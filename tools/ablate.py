"""Train a configuration and its variants over seeds, and write what each part is worth as a table.

    python tools/ablate.py --config configs/tiktok.yaml --out FOLDER [--seeds 0,1,2] [--variants full,no-tc] [--jobs 2]

Every run is a `python -m gtc_dist.train` of its own under FOLDER/runs. A run that is finished is not trained again, one
that was interrupted goes on, one that fails does not stop the others, so the same command goes on where it was stopped.
FOLDER/ablation.md and ablation.json are written after every run: mean and standard deviation over seeds on the test
split at the best valid epoch, and the difference to the first variant over the same seeds with its standard error.

--variants takes names of `VARIANTS`, or FILE.yaml, a mapping from names to lists of `a.b=c`.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

import yaml

from gtc_dist.config import Config
from gtc_dist.config_file import load_config, read_config
from gtc_dist.errors import InputError, run_command
from gtc_dist.train import with_absolute_uris

FILTER = "model.diffusion.enabled=true"
SHARED = ["train.negatives.mode=shared", "train.negatives.count=1024"]
VARIANTS = {
    "full": [],
    "filter": [FILTER],
    "filter-item": [FILTER, "model.diffusion.condition=item"],
    "filter-user": [FILTER, "model.diffusion.condition=user", "model.diffusion.start_step=300"],
    "filter-frozen": [FILTER, "train.w_diff=0", "model.diffusion.trained=false"],
    "no-filter": ["model.diffusion.enabled=false"],
    "no-tc": ["model.correlation.enabled=false"],
    "tc-inputs": ["model.correlation.of=inputs", "model.correlation.critic=multilinear"],
    "no-item-graph": ["model.item_hop=false"],
    "no-user-item-graph": ["model.layers=0"],
    "user-graph": ["model.user_hop=true"],
    "one-member": ["model.members=1"],
    "no-average": ["train.average=0"],
    "members-alone": ["model.walk.spectral=0", "model.walk.profile=0"],
    "no-spectral": ["model.walk.spectral=0"],
    "no-profile": ["model.walk.profile=0"],
    "walks-alone": ["train.epochs=0"],
    "softmax": ["train.loss=softmax", *SHARED],
    "softmax-in-batch": ["train.loss=softmax", "train.negatives.mode=in_batch"],
    "bpr-and-softmax": ["train.loss=bpr+softmax", *SHARED],
    "popular-negatives": ["train.negatives.popularity=0.5"],
    "sampled": ["model.propagation=sampled", "model.item_fanout=10", "model.walk.enabled=true"],
}
SHOWN = ("recall@5", "recall@10", "recall@20", "ndcg@5", "ndcg@20")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train variants of a configuration over seeds and compare them.")
    parser.add_argument("--config", required=True, help="YAML file of the first variant; its catalog must exist")
    parser.add_argument("--out", required=True, type=Path, help="local folder of the runs and the table")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated (default: %(default)s)")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated names, or a YAML file")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", help="a.b=c for every run")
    args = parser.parse_args(argv)

    if args.jobs < 1:
        parser.error("--jobs must be at least 1")
    try:
        seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds {args.seeds} must be numbers with commas between them")
    variants = named(args.variants)
    overrides = {
        (name, seed): [
            *args.overrides,
            *changes,
            f"train.seed={seed}",
            f"run.storage={args.out.absolute() / 'runs'}",
            f"run.name={name}-{seed}",
        ]
        for seed in seeds
        for name, changes in variants.items()
    }
    # all of them are read before the first is trained: a wrong key shows at once
    configs = {key: with_absolute_uris(load_config(args.config, changes)) for key, changes in overrides.items()}
    open_ = [key for key, config in configs.items() if not finished(args.out / "runs" / config.run.name, config)]
    print(f"{len(configs)} runs, {len(configs) - len(open_)} of them finished", file=sys.stderr)

    failed: list[str] = []

    def work(key: tuple[str, int]) -> None:
        try:
            train(args.config, overrides[key], args.out / "runs" / configs[key].run.name)
        except InputError as error:  # the others go on
            print(error, file=sys.stderr)
            failed.append(configs[key].run.name)

    with ThreadPoolExecutor(args.jobs) as pool:
        for _ in pool.map(work, open_):
            write(args.out, configs, list(variants))  # in this thread alone: two would tear the files
    write(args.out, configs, list(variants))
    print((args.out / "ablation.md").read_text())
    if failed:
        raise InputError(f"{len(failed)} runs failed: {', '.join(failed)}; the same command tries them again")


def named(text: str) -> dict[str, list[str]]:
    """The variants that --variants asks for, by name."""
    if text.endswith((".yaml", ".yml")):
        if not Path(text).is_file():
            raise InputError(f"there is no file {text}")
        variants = yaml.safe_load(Path(text).read_text())
        lists = list(variants.values()) if isinstance(variants, dict) else [None]
        if not all(isinstance(changes, list) and all(isinstance(c, str) for c in changes) for changes in lists):
            raise InputError(f"{text} must be a mapping from names to lists of a.b=c")
        return variants
    unknown = [name for name in text.split(",") if name not in VARIANTS]
    if unknown:
        raise InputError(f"unknown variants {unknown}; known are {', '.join(VARIANTS)}")
    return {name: VARIANTS[name] for name in text.split(",")}


def finished(run: Path, config: Config) -> bool:
    """Whether a run is done. Raises InputError where its folder holds a run with another configuration."""
    if not (run / "metrics.json").exists():
        return False
    if read_config((run / "config.yaml").read_bytes(), str(run / "config.yaml")) != config:
        raise InputError(f"{run} was trained with another configuration; remove it, or choose another --out")
    return True


def train(config: str, overrides: list[str], run: Path) -> None:
    """Train one variant; what it says goes to a file beside its run."""
    run.parent.mkdir(parents=True, exist_ok=True)
    log = run.with_name(f"{run.name}.log")
    command = [sys.executable, "-m", "gtc_dist.train", "--config", config, *overrides]
    with open(log, "w") as out:
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        raise InputError(f"training {run.name} failed; the end of {log}:\n{log.read_text()[-2000:]}")
    print(f"{run.name}: {log.read_text().strip().splitlines()[-2]}", file=sys.stderr)


def write(out: Path, configs: dict[tuple[str, int], Config], names: list[str]) -> None:
    """ablation.json and ablation.md of the runs that are done so far."""
    results = {}
    for (name, seed), config in configs.items():
        if finished(out / "runs" / config.run.name, config):
            result = json.loads((out / "runs" / config.run.name / "metrics.json").read_text())
            results.setdefault(name, {})[seed] = result
    table = {name: summary(results[name], results.get(names[0], {})) for name in names if name in results}
    (out / "ablation.json").write_text(json.dumps(table, indent=1))
    lines = [
        "| variant | seeds | "
        + " | ".join(SHOWN)
        + f" | recall@20, ndcg@5 against {names[0]} | best epoch | seconds |",
        "| --- " * (len(SHOWN) + 5) + "|",
    ]
    for name, row in table.items():
        cells = [f"{row[metric]['mean']:.4f} ± {row[metric]['sd']:.4f}" for metric in SHOWN]
        against = ", ".join(f"{row['against'][m]['mean']:+.4f} ± {row['against'][m]['se']:.4f}" for m in row["against"])
        epochs = "{} to {}".format(*row["best_epoch"])
        lines.append(f"| {name} | {row['seeds']} | {' | '.join(cells)} | {against} | {epochs} | {row['seconds']:.0f} |")
    (out / "ablation.md").write_text("\n".join(lines) + "\n")


def summary(runs: dict[int, dict], first: dict[int, dict]) -> dict:
    """Mean and standard deviation over seeds, and the difference to the first variant over the seeds of both."""
    row: dict = {"seeds": len(runs)}
    for metric in SHOWN:
        values = [run["test"]["overall"][metric] for run in runs.values()]
        row[metric] = {"mean": mean(values), "sd": spread(values)}
    shared = sorted(set(runs) & set(first))
    row["against"] = {}
    for metric in ("recall@20", "ndcg@5") if shared else ():
        values = [runs[s]["test"]["overall"][metric] - first[s]["test"]["overall"][metric] for s in shared]
        row["against"][metric] = {"mean": mean(values), "se": spread(values) / len(values) ** 0.5}
    row["cold_recall@20"] = mean(run["test"]["cold"]["recall@20"] for run in runs.values())
    epochs = [run["best_epoch"] for run in runs.values()]
    row["best_epoch"] = [min(epochs), max(epochs)]
    row["seconds"] = mean(run["seconds"] for run in runs.values())
    return row


def spread(values: list[float]) -> float:
    """Standard deviation over runs; 0 for one."""
    return stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    run_command(main)
