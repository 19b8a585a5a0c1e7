"""Checks before a start of Ray, and a limit of its time, so that a start that fails ends in one line.

Ray itself retries for two minutes where nothing listens, repeats a refused token twenty times, and ends in a traceback.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gtc_dist.errors import InputError, Unreachable

TCP_SECONDS = 5.0
CLIENT_SECONDS = 30.0  # of `ray health-check`, which needs one on an idle machine; Ray itself would wait for 40
# Of a start, which needs 5 on an idle machine, and 29 to 48 beside 30 busy processes on two cores: until a line says
# that it is slow, until it is given up, and until then on a machine whose cores have more to do than they can.
SLOW_SECONDS, START_SECONDS, BUSY_START_SECONDS = 20.0, 30.0, 60.0
SOCKET_PATH_BYTES = 107  # of a Unix socket (sun_path of sockaddr_un without its closing zero)
# Ray's longest socket path below its temporary folder: a session's name has its start and its process
SESSION_PATH = "ray/session_2000-01-01_00-00-00_000000_{pid}/sockets/"
LONGEST_SOCKET, LONGEST_DASHBOARD_SOCKET = "plasma_store", "dash_TaskEventsHead"
# A process of its own limits the start: while Ray's C++ waits for its node, no other thread of Python runs.
_LIMIT = """
import os, select, sys
parent = os.getppid()
slow_seconds, start_seconds, busy_start_seconds = map(float, sys.argv[1:4])
slow, late, late_and_busy = sys.argv[4:]


def wait(seconds):
    if select.select([sys.stdin], [], [], seconds)[0] or os.getppid() != parent:
        sys.exit()


wait(slow_seconds)
print(slow, file=sys.stderr, flush=True)
wait(start_seconds - slow_seconds)
if os.getloadavg()[0] > 2 * (os.cpu_count() or 1):
    wait(busy_start_seconds - start_seconds)
    late = late_and_busy
print(late, file=sys.stderr, flush=True)
os.kill(parent, 9)
"""
NEW_TOKEN = "`ray get-auth-token --generate` writes one (docs/cluster.md, Tokens)"


def check_start(dashboard: bool) -> str:
    """Check, without Ray, that it can start.

    Args:
        dashboard: of a local cluster.

    Returns:
        The RAY_ADDRESS of the cluster to join; empty: a local one is to be started.

    Raises:
        InputError, Unreachable: it cannot.
    """
    check_token_file()
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "local"):
        check_temporary_folder(dashboard)
        return ""
    check_cluster(address)
    return address


def check_temporary_folder(dashboard: bool) -> None:
    """Check the folder of a local cluster's sockets.

    Args:
        dashboard: the cluster has a dashboard, whose sockets have longer names.

    Raises:
        InputError: Ray cannot write there, or the paths of its sockets would be too long.
    """
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), None)
    folder = os.environ[name] if name else "/tmp"
    path = os.path.join(folder, SESSION_PATH.format(pid=os.getpid()))
    path += LONGEST_DASHBOARD_SOCKET if dashboard else LONGEST_SOCKET
    over = len(os.fsencode(path)) - SOCKET_PATH_BYTES
    if over > 0:
        raise InputError(
            f"{name}={folder} is {over} characters too long for the paths of Ray's sockets, which may have "
            f"{SOCKET_PATH_BYTES}; set RAY_TMPDIR to a shorter folder, such as RAY_TMPDIR=/tmp"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"Ray cannot write to its temporary folder {folder}; set RAY_TMPDIR to a folder that it can")


def check_token_file() -> None:
    """Check the file of RAY_AUTH_TOKEN_PATH: Ray aborts without one. Raises InputError."""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if not path or os.environ.get("RAY_AUTH_TOKEN"):
        return
    try:
        found = Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"RAY_AUTH_TOKEN_PATH={path} cannot be read ({error}); {NEW_TOKEN}") from None
    if not found:
        raise InputError(f"RAY_AUTH_TOKEN_PATH={path} is an empty file; {NEW_TOKEN}")


def check_cluster(address: str) -> None:
    """Check that a Ray cluster answers at the RAY_ADDRESS `address`, takes this token and has this version of Ray.

    Raises:
        InputError: no such address, another token or another version.
        Unreachable: nothing answers there.
    """
    if address != "auto":
        _check_port(address)
    if "://" in address:  # Ray Client has a server of its own, which the health check does not know
        return
    # A process of its own: Ray's client cannot be interrupted, and writes each of its tries to stderr.
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=CLIENT_SECONDS)
    except subprocess.TimeoutExpired:
        raise Unreachable(
            f"RAY_ADDRESS={address}: no Ray cluster answered within {CLIENT_SECONDS:g} seconds. If its head is busy or "
            "still starting, run the command again; otherwise name the port of its GCS (`ray start --head` prints it, "
            "6379 by default), or unset RAY_ADDRESS to start a local cluster"
        ) from None
    if done.returncode == 0:
        return
    said = done.stderr.decode(errors="replace")
    if "AuthenticationError" in said:
        raise InputError(
            f"RAY_ADDRESS={address}: the Ray cluster refuses this token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN "
            "or RAY_AUTH_TOKEN_PATH to the cluster's own, which `ray get-auth-token` prints on its head"
        )
    reason = said.strip().rpartition("\n")[2].rpartition("Error: ")[2].rstrip(".")
    hint = "run the same version on both (constraints.txt has that of this project)"
    hint = hint if "version" in reason else "unset RAY_ADDRESS to start a local cluster"
    raise InputError(f"RAY_ADDRESS={address}: {reason}; {hint}")


def _check_port(address: str) -> None:
    """Check that a process listens at HOST:PORT or ray://HOST:PORT."""
    scheme, _, rest = address.rpartition("://")
    host, _, port = rest.partition("/")[0].rpartition(":")
    if scheme not in ("", "ray") or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(
            f"RAY_ADDRESS={address} is not of the form HOST:PORT; `ray start --head` prints it. Submit a job to a "
            "dashboard's http address with `ray job submit --address`"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), TCP_SECONDS).close()
    except OSError as error:
        raise Unreachable(
            f"RAY_ADDRESS={address}: nothing answers there ({error}); start that Ray cluster, correct the address, or "
            "unset RAY_ADDRESS to start a local cluster"
        ) from None


@contextmanager
def one_line_errors(what: str) -> Iterator[None]:
    """Turn whatever Ray raises while it starts into an InputError. If Ray is not ready after SLOW_SECONDS, say so.

    After START_SECONDS, or BUSY_START_SECONDS where the load is more than two processes a core, end this process with a
    line and SIGKILL; Ray's processes of a local cluster end with it.

    Args:
        what: what starts, for the message.
    """

    def message(reason: str) -> str:
        return (
            f"{what} did not start: {reason.rstrip('.')}. Free memory and cores, end Ray clusters that were left over "
            "(`ray stop`), and rerun; Ray's logs are in ray/session_latest/logs of RAY_TMPDIR or TMPDIR (/tmp)"
        )

    limits = [SLOW_SECONDS, START_SECONDS, BUSY_START_SECONDS]
    slow = (
        f"{what} is not ready after {SLOW_SECONDS:g} seconds; waiting until {START_SECONDS:g}, on a busy machine until "
        f"{BUSY_START_SECONDS:g}"
    )
    late = [f"error: {message(f'it is not ready after {seconds:g} seconds')}" for seconds in limits[1:]]
    command = [sys.executable, "-I", "-S", "-c", _LIMIT, *map(str, limits), slow, *late]
    try:
        # leaving the block closes its stdin, which ends it; Ctrl-C does not reach it
        with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True):
            yield
    except Exception as error:
        raise InputError(message(" ".join(str(error).split()) or type(error).__name__)) from error
