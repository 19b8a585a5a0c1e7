"""Errors that a command shows as one line instead of a traceback, with their exit status."""

import difflib
import sys
from collections.abc import Callable, Collection


class InputError(ValueError):
    """Bad input: a configuration, file, column or row. The message says where, what was found and what to do."""

    def __reduce__(self):  # pickled (by Ray) as this class
        return (type(self), self.args)


class NotFinite(FloatingPointError):
    """Step with a non-finite loss or gradient. The message names it, and the file with the batch."""


class Unreachable(ConnectionError):
    """Object store or Ray cluster that could not be reached. Running the command again later may succeed."""


def hint_at_known(name: object, known: Collection[str], title: str = "known keys") -> str:
    """What to write instead of an unknown name: the nearest known one, or all."""
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"{title}: {', '.join(known)}"


STATUS = {InputError: 2, NotFinite: 3, Unreachable: 2}  # exit status of the command


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's main function and exit; an error of a type in `STATUS` is shown as one line.

    Ray wraps an error of a worker (in a cause, a context or a dictionary of worker failures), so the whole chain is
    searched.
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
    """First exception of a type in `STATUS` in the chain of `error`, or None."""
    if error is None or depth > 10:
        return None
    for kind in STATUS:
        if isinstance(error, kind):
            return kind(*error.args)  # plain copy: Ray's own subclass prints the remote traceback
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
