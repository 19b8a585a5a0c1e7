"""The one exception for input that a user can mend, and how commands show it."""

import sys
from collections.abc import Callable


class InputError(ValueError):
    """Bad input: a config, a file, a column, a row. The message says where, what was found and what to do."""

    def __reduce__(self):  # crosses process borders (Ray) as itself
        return (type(self), self.args)


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's main function; show an `InputError` as one line and exit with status 2.

    An error that a Ray worker raised arrives wrapped (in a cause, a context or a dictionary of worker failures), so
    the whole chain is searched.
    """
    try:
        sys.exit(main() or 0)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        found = find_input_error(error)
        if found is None:
            raise
        print(f"error: {found}", file=sys.stderr)
        sys.exit(2)


def find_input_error(error: BaseException | None, depth: int = 0) -> InputError | None:
    """The `InputError` that `error` is, wraps or was caused by, or None."""
    if error is None or depth > 10:
        return None
    if isinstance(error, InputError):
        return InputError(*error.args)  # plain copy: Ray's dual-typed errors print a remote traceback
    inner = [getattr(error, "cause", None), error.__cause__, error.__context__]
    failures = getattr(error, "worker_failures", None)
    if isinstance(failures, dict):
        inner += list(failures.values())
    for candidate in inner:
        if isinstance(candidate, BaseException) and candidate is not error:
            found = find_input_error(candidate, depth + 1)
            if found is not None:
                return found
    return None
