"""Errors, retries and warnings of file operations.

botocore retries a request to an object store that does not answer, with back-off and jitter, for about a minute
(`AWS_RETRY_MODE`, `AWS_MAX_ATTEMPTS`). After `WARN_SECONDS` a line on stderr names the pending operation. When the
retries end, the operation raises `Unreachable`; errors that the user can fix become an `InputError`.
"""

import os
import sys
import threading

from gtc_dist.errors import InputError, Unreachable

os.environ.setdefault("AWS_RETRY_MODE", "standard")  # retries connection errors, time-outs, throttling and 5xx
os.environ.setdefault("AWS_MAX_ATTEMPTS", "12")  # 75 s on average

WARN_SECONDS = 10.0  # until a line on stderr names a pending operation


def is_local(uri: str) -> bool:
    """Whether a URI names a local file: a plain path, `file://` or `local://`."""
    return "://" not in uri or uri.startswith(("file://", "local://"))


def is_connection_error(error: BaseException | None) -> bool:
    """Whether an error means that a connection to an object store failed or broke."""
    kinds = {(kind.__module__, kind.__name__) for kind in type(error).__mro__}
    broken = isinstance(error, (ConnectionError, TimeoutError)) and not isinstance(error, Unreachable)
    return broken or not kinds.isdisjoint(
        ("botocore.exceptions", name) for name in ("ConnectionError", "HTTPClientError")
    )


class FileOperation:
    """Context manager of one operation on a URI: its errors name the URI and the action.

    Raises:
        InputError: the file does not exist, permission or credentials are missing.
        Unreachable: the object store cannot be reached.
        OSError: any other error of the file system.
    """

    def __init__(self, uri: str, action: str):
        self.uri, self.action = uri, action

    def __enter__(self):
        self.timer = None
        if not is_local(self.uri):
            self.timer = threading.Timer(WARN_SECONDS, self._warn)
            self.timer.daemon = True
            self.timer.start()
        return self

    def _warn(self) -> None:
        print(f"still trying to {self.action} {self.uri}", file=sys.stderr, flush=True)

    def __exit__(self, kind, error, trace):
        if self.timer is not None:
            self.timer.cancel()
        if isinstance(error, FileNotFoundError):
            raise InputError(f"{self.uri} does not exist (tried to {self.action} it)") from error
        if isinstance(error, PermissionError):
            raise InputError(f"no permission to {self.action} {self.uri}: {error}") from error
        if not is_local(self.uri) and is_connection_error(error):
            raise Unreachable(f"cannot reach the object store to {self.action} {self.uri}: {error}") from error
        if isinstance(error, OSError) and not isinstance(error, Unreachable):
            raise OSError(error.errno, f"could not {self.action} {self.uri}: {error}") from error
        if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
            raise InputError(
                f"no credentials to {self.action} {self.uri}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            ) from error
        return False
