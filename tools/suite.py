"""Suite: train variants on several catalogs over seeds, and compare them on one page.

    python tools/suite.py --configs configs/tiktok.yaml,configs/lastfm.yaml --out FOLDER [--seeds 0,1,2]
        [--variants default,tc | FILE.yaml] [--jobs 2] [a.b=c ...]

A catalog is named after its configuration file; `python -m gtc_dist.prepare` builds those that do not exist. Every run
is a `python -m gtc_dist.train` process in FOLDER/runs/CATALOG/VARIANT-SEED. Rerun the same command to continue an
interrupted suite: finished runs are kept, interrupted ones are resumed. A failed run does not stop the others. Ctrl-C
or SIGTERM makes the running ones save their state. All configurations are checked before the first training.

--variants takes names of configs/variants.yaml, or another FILE.yaml: a mapping from names to lists of `a.b=c`. A
variant must use the catalog of the configuration. The first variant is the one that the others are compared with.

FOLDER/suite.md and suite.json are written after every run, and at the end with the closed-form references of
tools/references.py; tools/suite_page.py says what they hold.
"""

import argparse
import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from references import closed_form_references
from suite_page import Result, page, summarise

from gtc_dist.checkpoint.existing_run import find_run, run_status
from gtc_dist.checkpoint.run_folder import METRICS_FILE
from gtc_dist.config import Config
from gtc_dist.config_file import load_config
from gtc_dist.data import storage
from gtc_dist.data.catalog import MANIFEST, Catalog
from gtc_dist.errors import InputError, run_command
from gtc_dist.evaluation.item_groups import HEAD_ITEMS
from gtc_dist.inference.trained_run import load_run
from gtc_dist.train import STOPPED, with_absolute_uris

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
VARIANTS, PEERS = CONFIGS / "variants.yaml", CONFIGS / "peers.yaml"


@dataclass(frozen=True)
class Run:
    """One training: a variant of a catalog's configuration with a seed."""

    catalog: str
    variant: str
    seed: int
    file: str
    overrides: list[str]
    config: Config

    @property
    def name(self) -> str:
        return f"{self.catalog}/{self.config.run.name}"

    @property
    def folder(self) -> Path:
        return Path(self.config.run.storage) / self.config.run.name

    def is_finished(self) -> bool:
        """Raises InputError if the folder holds a run with another configuration, or on a catalog rebuilt since."""
        manifest = Catalog(self.config.data.catalog).manifest
        return run_status(self.config, str(self.folder), manifest.fingerprint) == "finished"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", required=True, help="YAML files of the catalogs, comma-separated")
    parser.add_argument("--out", required=True, type=Path, help="local folder for the runs and the page")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated (default: %(default)s)")
    parser.add_argument(
        "--variants", default="default", help="names, comma-separated, or a YAML file (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="concurrent trainings (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="overrides for every run")
    args = parser.parse_intermixed_args(argv)

    if args.jobs < 1:
        parser.error("--jobs must be at least 1")
    try:
        seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds must be comma-separated integers, found {args.seeds}")
    files = {Path(file).stem: file for file in args.configs.split(",")}
    if len(files) < len(args.configs.split(",")):
        parser.error(f"--configs needs files of different names, which are the catalogs' names; found {args.configs}")
    runs = plan_runs(files, read_variants(args.variants), seeds, args.overrides, args.out.absolute() / "runs")

    for run in runs:
        prepare(run.file, args.overrides, run.config.data.catalog, args.out / "runs" / f"{run.catalog}.prepare.log")
    pending = [run for run in runs if not run.is_finished()]
    print(f"{len(runs)} runs, {len(runs) - len(pending)} of them finished", file=sys.stderr)
    failed = train_all(pending, args.jobs, lambda: write_page(args.out, runs))
    write_page(args.out, runs, compute_references=True)
    print((args.out / "suite.md").read_text())
    if failed:
        raise InputError(f"{len(failed)} runs failed: {', '.join(failed)}; rerun the same command to try again")


def read_variants(text: str) -> dict[str, list[str]]:
    """Variants that --variants selects: name -> overrides.

    Args:
        text: a YAML file, or comma-separated names of configs/variants.yaml.
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


def plan_runs(
    files: dict[str, str], variants: dict[str, list[str]], seeds: list[int], overrides: list[str], folder: Path
) -> list[Run]:
    """All runs, one seed after the other, with their checked configurations.

    Args:
        files: catalog name -> YAML file of its configuration.
        folder: parent of all runs.
    """
    runs = []
    for seed in dict.fromkeys(seeds):
        for catalog, file in files.items():
            base = with_absolute_uris(load_config(file, overrides))
            for variant, changes in variants.items():
                own = [f"train.seed={seed}", f"run.storage={folder / catalog}", f"run.name={variant}-{seed}"]
                words = [*overrides, *changes, *own]
                run = Run(catalog, variant, seed, file, words, with_absolute_uris(load_config(file, words)))
                if not is_comparable(run.config, base):
                    raise InputError(
                        f"the variant {variant} ({', '.join(changes)}) cannot be compared with others of {file}: it "
                        "must not change data, nor turn model.user_hop on"
                    )
                runs.append(run)
    return runs


def is_comparable(config: Config, base: Config) -> bool:
    """Whether a variant can use the catalog of its base."""
    has_graphs = base.model.user_hop or not config.model.user_hop
    return config.data == base.data and has_graphs


def prepare(file: str, overrides: list[str], uri: str, log: Path) -> None:
    """Build the catalog of a configuration if it does not exist."""
    if not storage.exists(storage.join(uri, MANIFEST)):
        print(f"preparing {uri}, see {log}", file=sys.stderr)
        execute(["gtc_dist.prepare", "--config", file, *overrides], log, [])


def train_all(runs: list[Run], jobs: int, after_each: Callable[[], None]) -> list[str]:
    """Train runs, `jobs` at a time; returns the names of those that failed.

    Args:
        after_each: called after each run, in this thread.
    """
    failed: list[str] = []
    children: list[subprocess.Popen] = []

    def work(run: Run) -> None:
        log = run.folder.with_name(f"{run.folder.name}.log")
        print(f"{run.name}: training, see {log}", file=sys.stderr)
        try:
            execute(["gtc_dist.train", "--config", run.file, *run.overrides], log, children)
        except InputError as error:  # the other runs continue
            print(error, file=sys.stderr)
            failed.append(run.name)
            return
        result = json.loads((run.folder / METRICS_FILE).read_text())
        shown = ", ".join(f"{metric} {result['test']['overall'][metric]:.4f}" for metric in ("recall@20", "ndcg@20"))
        print(f"{run.name}: test {shown}, {result['seconds']:.0f} s", file=sys.stderr)

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(work, run) for run in runs]
        try:
            for future in as_completed(futures):
                future.result()
                after_each()
        except BaseException:  # Ctrl-C and SIGTERM, too
            pool.shutdown(wait=False, cancel_futures=True)
            for child in list(children):
                child.terminate()
            raise
    return failed


def execute(arguments: list[str], log: Path, children: list[subprocess.Popen]) -> None:
    """Run `python -m` with the arguments; its output goes to a log file. Raises InputError if it fails.

    Args:
        children: holds the process while it runs.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as out:
        child = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then sends SIGTERM
        )
        children.append(child)
        try:
            code = child.wait()
        except BaseException:
            child.terminate()
            raise
        children.remove(child)
    if code:
        raise InputError(f"{arguments[0]} ended with status {code}; the end of {log}:\n{log.read_text()[-2000:]}")


def write_page(out: Path, runs: list[Run], compute_references: bool = False) -> None:
    """Write suite.json and suite.md of the runs finished so far.

    Args:
        compute_references: compute the closed-form references that are not stored yet; False: leave them out.
    """
    results: dict[str, dict[str, dict[int, Result]]] = {}
    references = {}
    for run in runs:
        seeds = results.setdefault(run.catalog, {}).setdefault(run.variant, {})
        if run.is_finished():
            seeds[run.seed] = Result(json.loads((run.folder / METRICS_FILE).read_text()), user_metrics(run))
        if run.catalog not in references:
            references[run.catalog] = stored_references(out / f"references-{run.catalog}.json", run, compute_references)
    summary = summarise(results, yaml.safe_load(PEERS.read_text()), references)
    (out / "suite.json").write_text(json.dumps(summary, indent=1))
    (out / "suite.md").write_text(page(summary))


def user_metrics(run: Run) -> dict[str, np.ndarray]:
    """Per-user metrics of a finished run: "valid/overall/recall@20" -> float64 [users]. Read from a file beside the
    run, which is written first if it is missing or of another result."""
    result, file = run.folder / METRICS_FILE, run.folder.with_name(f"{run.folder.name}.users.npz")
    digest = hashlib.sha256(result.read_bytes()).hexdigest()
    if file.exists():
        with np.load(file) as stored:
            if stored["of"] == digest:
                return {name: stored[name] for name in stored.files if name != "of"}
    trained, values = load_run(find_run(str(run.folder))), {}
    for split in ("valid", "test"):
        for group, metrics in trained.metrics_by_user(split, users=None).items():
            values |= {f"{split}/{group}/{name}": value for name, value in metrics.items()}
    incomplete = file.with_suffix(".incomplete.npz")
    np.savez(incomplete, of=digest, **values)
    incomplete.replace(file)
    return values


def stored_references(file: Path, run: Run, compute: bool) -> dict:
    """Closed-form references of a run's catalog from a file, which is written first if it is missing or of another
    catalog. Empty if that is not wanted (`compute`)."""
    catalog = Catalog(run.config.data.catalog)
    key = [catalog.manifest.fingerprint, HEAD_ITEMS]
    stored = json.loads(file.read_text()) if file.exists() else {}
    if stored.get("of") == key:
        return stored["methods"]
    if not compute:
        return {}
    print(f"{run.catalog}: computing the closed-form references", file=sys.stderr)
    methods = closed_form_references(catalog, HEAD_ITEMS)
    storage.write_json(str(file.absolute()), {"of": key, "methods": methods})
    return methods


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))
    run_command(main)
