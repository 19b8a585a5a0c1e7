"""Relative paths in a Ray job, refused before any work.

A job runs in a copy of its package on one node. What it writes to a relative path is lost with that copy, and the next
job does not find it.
"""

import os

from gtc_dist.errors import InputError

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray for the entrypoint of a job


def refuse_relative_paths(paths: dict[str, str | None]) -> None:
    """Refuse relative paths if this command is the entrypoint of a Ray job.

    Args:
        paths: what the user wrote, by the name of its key or option; None: not given.

    Raises:
        InputError: one of them is relative; all such are named.
    """
    if JOB_VARIABLE not in os.environ:
        return
    given = {name: path for name, path in paths.items() if path}
    relative = {name: path for name, path in given.items() if "://" not in path and not os.path.isabs(path)}
    if relative:
        shown = ", ".join(f"{name} {path!r}" for name, path in relative.items())
        raise InputError(
            f"{shown}: a relative path in a Ray job is in a copy of its package, which is removed with the job; write "
            "a URI such as s3://..., or an absolute path that all nodes share"
        )
