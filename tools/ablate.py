"""Ablation study: train variants of a configuration over seeds and compare their test metrics in a table.

    python tools/ablate.py --config configs/tiktok.yaml --out FOLDER [--seeds 0,1,2] [--variants full,no-tc] [--jobs 2]

Every run is a `python -m gtc_dist.train` process and lives under FOLDER/runs. Rerun the same command to continue an
interrupted study: finished runs are kept, interrupted ones are resumed. A failed run does not stop the others.
FOLDER/ablation.md and ablation.json are written after every run: mean and standard deviation over seeds on the test
split at the best valid epoch, and the difference to the first variant over the same seeds with its standard error.

--variants takes names of configs/ablations/tiktok.yaml, or another FILE.yaml: a mapping from names to lists of `a.b=c`.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

import yaml

from gtc_dist.checkpoint.run_folder import CONFIG_FILE, METRICS_FILE
from gtc_dist.config import Config
from gtc_dist.config_file import load_config, read_run_config
from gtc_dist.errors import InputError, run_command
from gtc_dist.train import with_absolute_uris

VARIANTS = Path(__file__).resolve().parent.parent / "configs" / "ablations" / "tiktok.yaml"
SHOWN = ("recall@5", "recall@10", "recall@20", "ndcg@5", "ndcg@20")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train variants of a configuration over seeds and compare them.")
    parser.add_argument("--config", required=True, help="YAML file of the first variant; its catalog must exist")
    parser.add_argument("--out", required=True, type=Path, help="local folder for the runs and the table")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated (default: %(default)s)")
    parser.add_argument(
        "--variants", default=str(VARIANTS), help="names, comma-separated, or a YAML file (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="concurrent runs (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", help="a.b=c, overrides for every run")
    args = parser.parse_args(argv)

    if args.jobs < 1:
        parser.error("--jobs must be at least 1")
    try:
        seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds must be comma-separated integers, found {args.seeds}")
    variants = read_variants(args.variants)
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
    # all configurations are read before the first training: a wrong key is reported at once
    configs = {key: with_absolute_uris(load_config(args.config, changes)) for key, changes in overrides.items()}
    pending = [key for key, config in configs.items() if not finished(args.out / "runs" / config.run.name, config)]
    print(f"{len(configs)} runs, {len(configs) - len(pending)} of them finished", file=sys.stderr)

    failed: list[str] = []

    def work(key: tuple[str, int]) -> None:
        try:
            train(args.config, overrides[key], args.out / "runs" / configs[key].run.name)
        except InputError as error:  # the other runs continue
            print(error, file=sys.stderr)
            failed.append(configs[key].run.name)

    with ThreadPoolExecutor(args.jobs) as pool:
        for _ in pool.map(work, pending):
            write(args.out, configs, list(variants))  # only in this thread: concurrent writes would corrupt the files
    write(args.out, configs, list(variants))
    print((args.out / "ablation.md").read_text())
    if failed:
        raise InputError(f"{len(failed)} runs failed: {', '.join(failed)}; rerun the same command to try again")


def read_variants(text: str) -> dict[str, list[str]]:
    """Variants that --variants selects: name -> overrides.

    Args:
        text: a YAML file, or comma-separated names of configs/ablations/tiktok.yaml.
    """
    path = Path(text) if text.endswith((".yaml", ".yml")) else VARIANTS
    if not path.is_file():
        raise InputError(f"the file {path} of --variants does not exist")
    variants = yaml.safe_load(path.read_text())
    lists = list(variants.values()) if isinstance(variants, dict) else [None]
    if not all(isinstance(changes, list) and all(isinstance(c, str) for c in changes) for changes in lists):
        raise InputError(f"{path} must be a mapping from names to lists of a.b=c")
    names = list(variants) if path == Path(text) else text.split(",")
    if unknown := [name for name in names if name not in variants]:
        raise InputError(f"unknown variants {unknown}; known are {', '.join(variants)}")
    return {name: variants[name] for name in names}


def finished(run: Path, config: Config) -> bool:
    """Whether a run is finished. Raises InputError if its folder holds a run with another configuration."""
    if not (run / METRICS_FILE).exists():
        return False
    if read_run_config((run / CONFIG_FILE).read_bytes(), str(run / CONFIG_FILE)) != config:
        raise InputError(f"{run} was trained with another configuration; remove it, or choose another --out")
    return True


def train(config: str, overrides: list[str], run: Path) -> None:
    """Train one variant; its output goes to a log file beside its run."""
    run.parent.mkdir(parents=True, exist_ok=True)
    log = run.with_name(f"{run.name}.log")
    command = [sys.executable, "-m", "gtc_dist.train", "--config", config, *overrides]
    with open(log, "w") as out:
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        raise InputError(f"training {run.name} failed; the end of {log}:\n{log.read_text()[-2000:]}")
    print(f"{run.name}: {log.read_text().strip().splitlines()[-2]}", file=sys.stderr)


def write(out: Path, configs: dict[tuple[str, int], Config], names: list[str]) -> None:
    """Write ablation.json and ablation.md of the runs finished so far."""
    results = {}
    for (name, seed), config in configs.items():
        if finished(out / "runs" / config.run.name, config):
            result = json.loads((out / "runs" / config.run.name / METRICS_FILE).read_text())
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
    """Mean and standard deviation over seeds, and the difference to the first variant over the seeds that both have."""
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
    """Standard deviation over runs; 0 for a single run."""
    return stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    run_command(main)
