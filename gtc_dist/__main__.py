"""`gtc COMMAND ...`, or `python -m gtc_dist COMMAND ...`: the commands of the package.

Each is also a module of its own, `python -m gtc_dist.COMMAND`, as jobs on a cluster call it.
"""

import importlib
import os
import sys

from gtc_dist.errors import run_command

COMMANDS = {
    "init": ("gtc_dist.init.write_config", "a configuration for a folder of files"),
    "import": ("gtc_dist.import_layout.import_folder", "tables and a configuration from a public data set"),
    "features": ("gtc_dist.features.encode_items", "texts and pictures of items to vectors"),
    "prepare": ("gtc_dist.prepare.build_catalog", "interactions and vectors to a catalog"),
    "train": ("gtc_dist.train", "train on a catalog, or go on with an interrupted training"),
    "tune": ("gtc_dist.tune.search_settings", "train many settings, and find the best"),
    "evaluate": ("gtc_dist.evaluate", "metrics of a run, alone or against another one"),
    "report": ("gtc_dist.report.write_report", "a page on a run: data, quality, curves, parts, lists"),
    "recommend": ("gtc_dist.recommend.lists", "lists of items for users, or similar items"),
    "refresh": ("gtc_dist.refresh.refresh_run", "today's embeddings of a run, on grown data, without training"),
    "export": ("gtc_dist.export", "embeddings of a run under your own ids"),
}


def usage() -> str:
    lines = [f"  {name:<10}{what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: gtc COMMAND ...", "", *lines, "", "gtc COMMAND --help shows its options and examples."])


def main() -> None:
    """Run the command that the first argument names; its module's `main` reads the others."""
    name, rest = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if name in ("-h", "--help"):
        print(usage())
        return
    if name not in COMMANDS:
        print(f"error: unknown command {name!r}\n\n{usage()}", file=sys.stderr)
        sys.exit(2)
    sys.path.insert(0, os.getcwd())  # as `python -m` has it: encoders may be written in a file there
    module = importlib.import_module(COMMANDS[name][0])
    sys.argv[0] = f"gtc {name}"
    run_command(lambda: module.main(rest))


if __name__ == "__main__":
    main()
