"""Write the pinned packages with the checksums of the files that your package index has for them.

    python tools/lock.py --out requirements.lock
    pip install --require-hashes --no-deps -r requirements.lock

Reads constraints.txt and asks pip what it would install, without installing it. What it downloads, if the index serves
no metadata beside the files, is thrown away. Use it behind an index of your own, or to see that it did not change.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from gtc_dist.errors import InputError, run_command

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="file to write")
    parser.add_argument("--constraints", type=Path, default=CONSTRAINTS, help="pins (default: constraints.txt)")
    args = parser.parse_args(argv)

    with tempfile.TemporaryDirectory(prefix="gtc-lock-") as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
        command += ["--report", str(report), "-r", str(args.constraints)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise InputError(f"pip could not resolve {args.constraints}: {done.stderr.strip()[-1000:]}")
        lines = locked(json.loads(report.read_text()))
    args.out.write_text("\n".join(lines) + "\n")
    print(f"{len(lines)} packages with their checksums are in {args.out}")


def locked(report: dict) -> list[str]:
    """`name==version --hash=sha256:...` of each package of a pip report, by name."""
    lines = []
    for package in report["install"]:
        name, version = package["metadata"]["name"], package["metadata"]["version"]
        digest = package["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256")
        if digest is None:
            raise InputError(f"the package index gives no sha256 for {name} {version}")
        lines.append(f"{name}=={version} --hash=sha256:{digest}")
    return sorted(lines, key=str.lower)


if __name__ == "__main__":
    run_command(main)
