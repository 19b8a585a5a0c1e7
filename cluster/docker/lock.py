"""Write requirements-cpu.txt and requirements-cuda.txt: every package of the image with the hash of its file.

    python cluster/docker/lock.py [cpu] [cuda]     # part of `make lock`

The versions are those of constraints.txt; pip finds the files (Linux, x86-64, Python 3.11) on the machine's package
index, and its report has their SHA-256. For cpu, the index must also have PyTorch's CPU wheels (torch==X+cpu).
"""

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# builds the project itself in the image, and is imported by torch
EXTRA = ("setuptools", "wheel")


def lock(device: str) -> Path:
    """Write the file of one device; returns its path."""
    constraints = (ROOT / "constraints.txt").read_text()
    torch = re.search(r"^torch==(\S+)$", constraints, re.M)[1]
    # === compares texts: it does not take 2.13.0+cpu for 2.13.0, as == does
    wanted = f"torch=={torch}+cpu" if device == "cpu" else f"torch==={torch}"
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder) / "constraints.txt"
        pins.write_text(re.sub(r"^torch==.*\n", "", constraints, flags=re.M))
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        command += ["--only-binary=:all:", f"--constraint={pins}", f"--report={report}", wanted, *EXTRA]
        subprocess.run([*command, *(d for d in dependencies if not d.startswith("torch"))], check=True)
        found = json.loads(report.read_text())["install"]
    lines = []
    for package in found:
        name = re.sub(r"[-_.]+", "-", package["metadata"]["name"]).lower()
        sha256 = package["download_info"]["archive_info"]["hashes"]["sha256"]
        lines.append(f"{name}=={package['metadata']['version']} --hash=sha256:{sha256}\n")
    path = HERE / f"requirements-{device}.txt"
    path.write_text("# Written by cluster/docker/lock.py: do not edit.\n" + "".join(sorted(lines)))
    return path


if __name__ == "__main__":
    for device in sys.argv[1:] or ["cpu", "cuda"]:
        print(lock(device))
