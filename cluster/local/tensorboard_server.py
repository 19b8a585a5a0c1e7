"""TensorBoard on the loopback interface for the runs of a local cluster's object storage."""

import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping

from seaweed import HOST, find_program, free_ports

# s3fs keeps the first listing of a folder for ever, so TensorBoard would never see a run that began after it started
NO_LISTING_CACHE = {"FSSPEC_S3": '{"use_listings_cache": false}'}


class TensorBoardServer:
    """TensorBoard in a process of its own, started on entry and ended on exit.

    Args:
        logdir: folder or s3:// URI below which event files are looked for, every five seconds.
        env: environment of the process, with the credentials of the storage.
        timeout: seconds to wait until it answers.

    Raises:
        RuntimeError: it ended or did not answer; with the end of its log.
    """

    def __init__(self, logdir: str, env: Mapping[str, str], timeout: float = 60):
        self.logdir, self.env, self.timeout = logdir, dict(env), timeout
        self.process: subprocess.Popen | None = None
        self.address = ""

    def __enter__(self) -> "TensorBoardServer":
        (port,) = free_ports(1)
        self.address = f"http://{HOST}:{port}"
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [
                find_program("tensorboard"),
                f"--logdir={self.logdir}",
                f"--host={HOST}",
                f"--port={port}",
                "--load_fast=false",  # the fast loader reads its own kinds of storage only
            ],
            env=self.env | NO_LISTING_CACHE,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches only the cluster's process, which ends its parts in order
        )
        try:
            self._wait_until_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()  # it only reads
        self.process.wait()
        self.log.close()

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                with urllib.request.urlopen(self.address, timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.log.seek(0)
                    tail = self.log.read()[-1500:].decode(errors="replace")
                    raise RuntimeError(f"TensorBoard did not start:\n{tail}") from None
                time.sleep(0.2)
