"""Say what `ray job submit --working-dir FOLDER` would upload, before it does.

    python cluster/upload_size.py [FOLDER] [--limit-mib 50]

prints the number of files, their size and the largest of them. The list is made by Ray's own code, so it is what Ray
uploads: everything but the directories .git, .venv, venv and __pycache__, and what a .gitignore or .rayignore file
names. Exit status: 0, or 1 if the size is above the limit.
"""

import argparse
import logging
import os
import sys
from collections import Counter
from pathlib import Path

MIB = 1 << 20
SHOWN = 5


def upload_sizes(folder: Path) -> Counter[str]:
    """Bytes of each file that Ray would upload (before compression), by its path in the folder."""
    from ray._private.ray_constants import RAY_RUNTIME_ENV_IGNORE_GITIGNORE, get_runtime_env_default_excludes
    from ray._private.runtime_env import packaging

    sizes: Counter[str] = Counter()

    def add(path: Path) -> None:
        if path.is_file():
            sizes[str(path.relative_to(folder))] = path.stat().st_size

    packaging._dir_travel(
        folder,
        [packaging._get_excludes(folder, get_runtime_env_default_excludes())],
        add,
        include_gitignore=os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1",
        logger=logging.getLogger("quiet"),  # not Ray's, which writes a line for every ignore file
    )
    return sizes


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("."), help="the working directory of the job")
    parser.add_argument(
        "--limit-mib", type=float, default=50, help="exit with status 1 above this size (default %(default)s)"
    )
    args = parser.parse_args(arguments)
    if not args.folder.is_dir():
        parser.error(f"{args.folder} is not a folder")
    sizes = upload_sizes(args.folder.resolve())
    total = sum(sizes.values())
    print(f"{args.folder}: {len(sizes)} files, {total / MIB:.1f} MiB; the largest:")
    for name, size in sizes.most_common(SHOWN):
        print(f"  {size / MIB:8.1f} MiB  {name}")
    if total <= args.limit_mib * MIB:
        return 0
    print(
        f"error: that is more than {args.limit_mib:g} MiB. Name what the job does not need, such as data/, in a file "
        f".rayignore in {args.folder} (written like .gitignore), and keep data in object storage",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
