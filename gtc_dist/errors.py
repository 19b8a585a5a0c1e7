"""What ends a command with one line for its user instead of a traceback, and how commands show it."""

import sys
from collections.abc import Callable


class InputError(ValueError):
    """Bad input: a config, a file, a column, a row. The message says where, what was found and what to do."""

    def __reduce__(self):  # crosses process borders (Ray) as itself
        return (type(self), self.args)


class NotFinite(FloatingPointError):
    """A step whose loss or gradients are not finite. The message says which, and where the batch is."""


class Unreachable(ConnectionError):
    """The object store cannot be reached, and was not for as long as it was tried. Another time it may be."""


STATUS = {InputError: 2, NotFinite: 3, Unreachable: 2}  # of a command that ends with it


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's main function; show what `STATUS` names as one line and exit with its status.

    An error that a Ray worker raised arrives wrapped (in a cause, a context or a dictionary of worker failures), so
    the whole chain is searched.
    """
    try:
        sys.exit(main() or 0)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        found = find_shown(error)
        if found is None:
            raise
        print(f"error: {found}", file=sys.stderr)
        sys.exit(STATUS[type(found)])


def find_shown(error: BaseException | None, depth: int = 0) -> Exception | None:
    """The exception of a kind in `STATUS` that `error` is, wraps or was caused by, or None."""
    if error is None or depth > 10:
        return None
    for kind in STATUS:
        if isinstance(error, kind):
            return kind(*error.args)  # plain copy: Ray's dual-typed errors print a remote traceback
    inner = [getattr(error, "cause", None), error.__cause__, error.__context__]
    failures = getattr(error, "worker_failures", None)
    if isinstance(failures, dict):
        inner += list(failures.values())
    for candidate in inner:
        if isinstance(candidate, BaseException) and candidate is not error:
            found = find_shown(candidate, depth + 1)
            if found is not None:
                return found
    return None
