"""`make demo`: the whole pipeline on a small generated catalog, each command as a user would type it.

Everything is written to the folder `demo/`. An earlier demo is replaced; a folder of that name which the demo did not
make is refused.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq

from gtc_dist.errors import InputError, run_command

ROOT = Path(__file__).resolve().parent.parent
DEMO = Path("demo")  # relative to ROOT, where all commands run
MARKER = DEMO / ".made-by-make-demo"
RUN = DEMO / "runs" / "demo"
PARTS = (DEMO / "raw", DEMO / "catalog", RUN, DEMO / "embeddings")
TITLES = f"'{DEMO}/raw/items/*.parquet'"
STEPS = (
    ("raw tables with planted structure", f"tools/make_dataset.py --out {DEMO}/raw --seed 0"),
    ("raw tables to a catalog", "-m gtc_dist.prepare --config configs/demo.yaml"),
    ("catalog to a trained run", "-m gtc_dist.train --config configs/demo.yaml"),
    ("test metrics of the best checkpoint", f"-m gtc_dist.evaluate --run {RUN} --split test"),
    ("embeddings under the original ids", f"-m gtc_dist.export --run {RUN} --out {DEMO}/embeddings"),
    ("a page on the run", f"-m gtc_dist.report --run {RUN} --titles {TITLES}"),
    ("lists for three users", f"-m gtc_dist.recommend --run {RUN} {{users}} --top 5 --titles {TITLES}"),
)
CLOSING = """
report            {run}/report.html (open it in a browser)
run               {run} (config.yaml, metrics.jsonl, metrics.json, checkpoints)
                  cat {run}/metrics.json
TensorBoard logs  {run}/tensorboard
                  {bin}tensorboard --logdir {run}/tensorboard
embeddings        {demo}/embeddings (Parquet with columns id and embedding, score by dot product)
more lists        {bin}gtc recommend --run {run} --user {user} --titles {titles}
"""


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__,
        epilog="commands:\n" + "\n".join(f"  python {command}".format(users="--user ID ...") for _, command in STEPS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    started = time.monotonic()
    make_room()
    *before, (title, command) = STEPS
    for number, entry in enumerate(before, 1):
        step(number, *entry)
    users = pq.read_table(ROOT / DEMO / "embeddings" / "users", columns=["id"])["id"][:3].to_pylist()
    step(len(STEPS), title, command.format(users=" ".join(f"--user {user}" for user in users)))
    bin = f"{Path(sys.executable).parent.relative_to(ROOT)}/" if Path(sys.executable).is_relative_to(ROOT) else ""
    print(CLOSING.format(run=RUN, demo=DEMO, bin=bin, user=users[0], titles=TITLES))
    print(f"{time.monotonic() - started:.0f} seconds in total")


def make_room() -> None:
    """Remove the folders of an earlier demo. Raises InputError for a folder that the demo did not make."""
    folder, marker = ROOT / DEMO, ROOT / MARKER
    if folder.exists() and not marker.exists() and any(folder.iterdir()):
        raise InputError(f"the folder {DEMO}/ holds files that the demo did not write; move it away and rerun")
    folder.mkdir(exist_ok=True)
    marker.write_text("Folders raw, catalog, runs/demo and embeddings are replaced by `make demo`.\n")
    for part in PARTS:
        shutil.rmtree(ROOT / part, ignore_errors=True)


def step(number: int, title: str, command: str) -> None:
    """Print and run one command. If it fails, the demo exits with its status."""
    print(f"\n[{number}/{len(STEPS)}] {title}\n$ python {command}", flush=True)
    status = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT, check=False).returncode
    if status != 0:
        print(f"the demo stopped: the command above ended with status {status}", file=sys.stderr)
        sys.exit(status)


if __name__ == "__main__":
    run_command(main)
