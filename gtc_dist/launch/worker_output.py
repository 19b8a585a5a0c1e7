"""What the processes of a Ray cluster print, on the terminal of the command.

Ray's printer puts a coloured `(RayTrainWorker pid=123)` before every line, in files too, and passes on what Ray logs
about itself. Commands print the lines of ranks and tasks as they are, and leave Ray's own to its log files.
"""

import os
import re

from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher
from ray._private.worker import print_to_stdstream

RAY_PRINTER = "ray_print_logs"  # the name of Ray's printer; ray.shutdown removes the printer of this name
RAYS_ACTORS = ("SplitCoordinator", "PlacementGroupCleaner", "PreemptionWatcher")  # the command gets their errors itself
# what Ray Train logs, with a traceback, where a busy cluster has not answered within five seconds; it asks again
RAYS_HARMLESS_WARNING = "Failed to send resource request for "
RAYS_LOG_LINE = re.compile(r"\[20\d\d-\d\d-\d\d [\d:,]+ [DIWE] \d+ \d+\] (\(\w+\) )?\S+\.(cc|h):\d+: ")  # of its C++


def print_plainly() -> None:
    """Replace Ray's printer in this process, which is connected to a cluster."""
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # of errors of a node, which Ray prints without its printer
    dispatcher.remove_handler(RAY_PRINTER)
    dispatcher.add_handler(RAY_PRINTER, print_lines)


def print_lines(batch: dict) -> None:
    """Print the lines of one process, without prefix and without those that Ray logs about itself.

    Args:
        batch: "lines" (list of text), "is_err", "pid" ("raylet" and "autoscaler" for Ray's own processes) and, for an
            actor, "actor_name".
    """
    lines = _without_rays_own(batch["lines"])
    if lines and batch.get("actor_name") not in RAYS_ACTORS:
        print_to_stdstream(batch | {"lines": lines}, ignore_prefix=True)


def _without_rays_own(lines: list[str]) -> list[str]:
    kept, in_warning = [], False
    for line in lines:
        in_traceback = in_warning and line.startswith(("Traceback ", " ", "ray.exceptions."))
        in_warning = in_traceback or line.startswith(RAYS_HARMLESS_WARNING)
        if not in_warning and not RAYS_LOG_LINE.match(line):
            kept.append(line)
    return kept
