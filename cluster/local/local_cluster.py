"""Ray cluster of several nodes on this machine, with S3 object storage.

    with LocalCluster(nodes=2, cpus=1) as cluster:
        done = cluster.submit(["python", "-m", "gtc_dist.train", "--config", "configs/demo.yaml"], working_dir=".")

Every node is a separate raylet, started with `ray start` as on separate machines; token authentication is on. Other
Ray clusters of the machine are not touched. On exit, all processes of the cluster are ended and the object storage is
removed with its data. Linux only: processes of the cluster are recognised by a mark in their environment (/proc).
"""

import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from processes import environment_of, process_ids, send_signal, session_of
from seaweed import HOST, SeaweedServer, find_program, free_ports

MARK = "GTC_LOCAL_CLUSTER"
BUCKET = "gtc"


class LocalCluster:
    """One head and `nodes - 1` workers with `cpus` CPUs each, started on entry and ended on exit.

    Args:
        nodes: number of raylets, including the head.
        cpus: logical CPUs of each node.
        storage: a running S3 server; by default the cluster starts its own, with the bucket `gtc`.
        object_store_mb: shared memory of each node.
        timeout: seconds to wait for the start.

    `env` is the environment for clients, with the token for `ray job submit`; `address` is the URL of the job server.
    """

    def __init__(
        self,
        nodes: int = 2,
        cpus: int = 2,
        storage: SeaweedServer | None = None,
        object_store_mb: int = 256,
        timeout: float = 120,
    ):
        if nodes < 1 or cpus < 1:
            raise ValueError(f"nodes is {nodes} and cpus is {cpus}; both must be at least 1")
        self.nodes, self.cpus, self.object_store_mb, self.timeout = nodes, cpus, object_store_mb, timeout
        self.storage, self.owns_storage = storage, storage is None
        self.mark = secrets.token_hex(16)
        self.folder: Path | None = None
        self.processes: list[subprocess.Popen] = []
        self.head, self.started = "", 0  # address that nodes join; number of worker nodes started
        self.address = ""
        self.env: dict[str, str] = {}

    def start(self) -> "LocalCluster":
        try:
            # a short path: Ray puts sockets below it, whose paths may have 107 characters
            self.folder = Path(tempfile.mkdtemp(prefix="gtc-ray-"))
            self.env = self._environment()
            if self.storage is None:
                self.storage = SeaweedServer(buckets=[BUCKET], env=self.env).start()
            self.env |= self.storage.env
            self.head = self._start_head()
            for _ in range(1, self.nodes):
                self.add_node()
            self._wait_for_nodes()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End all processes of the cluster and remove its files. May be called twice."""
        for process in reversed(self.processes):
            process.terminate()  # `ray start --block` then ends its own processes
        deadline = time.monotonic() + 10
        for process in self.processes:
            try:
                process.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes.clear()
        if self.owns_storage and self.storage is not None:
            self.storage.stop()
            self.storage = None
        while left := self.running():  # detached processes, such as jobs
            for pid in left:
                send_signal(pid, signal.SIGKILL)
            time.sleep(0.05)
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None

    def add_node(self) -> None:
        """Start another worker node."""
        self.started += 1
        self._ray_start(f"worker-{self.started}", f"--address={self.head}")

    def lose_node(self) -> None:
        """Kill all processes of the newest node, like the loss of a machine."""
        process = self.processes.pop()
        for pid in (pid for pid in process_ids() if session_of(pid) == process.pid):
            send_signal(pid, signal.SIGKILL)
        process.wait()

    def running(self) -> list[int]:
        """Ids of all processes of this cluster, including detached ones."""
        mark = f"{MARK}={self.mark}".encode()
        return [pid for pid in process_ids() if mark in environment_of(pid).split(b"\0")]

    def __enter__(self) -> "LocalCluster":
        return self.start()

    def __exit__(self, *_) -> None:
        self.stop()

    def submit(
        self,
        command: Sequence[str],
        working_dir: str | os.PathLike | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
        job: str | None = None,
    ) -> subprocess.CompletedProcess:
        """Run `ray job submit -- command` and wait until the job ends.

        Args:
            working_dir: folder to upload, in which the command runs (without the files of .gitignore).
            env: variables for the job.
            timeout: seconds until subprocess.TimeoutExpired is raised.
            job: submission id, for `stop_job`.

        Returns:
            returncode and stdout (text, output of the job and of Ray).
        """
        options = [] if working_dir is None else ["--working-dir", os.fspath(working_dir)]
        options += ["--runtime-env-json", json.dumps({"env_vars": dict(env)})] if env else []
        options += [f"--submission-id={job}"] if job else []
        return self._ray_job("submit", *options, "--", *command, timeout=timeout)

    def stop_job(self, job: str, timeout: float | None = 60) -> subprocess.CompletedProcess:
        """Run `ray job stop`, which returns once the job has ended."""
        return self._ray_job("stop", job, timeout=timeout)

    def _ray_job(self, action: str, *words: str, timeout: float | None) -> subprocess.CompletedProcess:
        return subprocess.run(
            [find_program("ray"), "job", action, "--address", self.address, *words],
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=timeout,
        )

    def write_env_file(self, path: Path | None = None) -> Path:
        """Write the environment of `env` as `export` lines for a shell; only the owner may read the file.

        Args:
            path: where to; by default a file in the cluster's own folder. It appears when it is complete.
        """
        names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", *self.storage.env)
        exports = {name: self.env[name] for name in names} | {"RAY_API_SERVER_ADDRESS": self.address}
        path = path or self.folder / "env"
        partial = path.with_name(path.name + ".partial")
        partial.unlink(missing_ok=True)
        partial.touch(mode=0o600)
        lines = [f"export {name}={shlex.quote(value)}\n" for name, value in exports.items()]
        partial.write_text("unset RAY_ADDRESS RAY_AUTH_TOKEN\n" + "".join(lines))  # they would take precedence
        return partial.replace(path)

    def _environment(self) -> dict[str, str]:
        env = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_JOB_ID", MARK)}
        token = self.folder / "auth_token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))  # as `ray get-auth-token --generate` does, but not in ~/.ray
        return env | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)]),  # jobs' `python`
            MARK: self.mark,
        }

    def _start_head(self) -> str:
        """Start the head; returns the address for workers to join."""
        for attempt in range(3):  # another process may take a port before it is used
            port, dashboard, client = free_ports(3)
            self.address = f"http://{HOST}:{dashboard}"
            process = self._ray_start(
                "head",
                "--head",
                f"--port={port}",
                "--include-dashboard=true",
                f"--dashboard-host={HOST}",
                f"--dashboard-port={dashboard}",
                f"--ray-client-server-port={client}",
            )
            joined = self.folder / "head" / "ray_current_cluster"  # written once the head is up
            try:
                self._wait(lambda path=joined: path.exists() and path.read_text().strip(), "the head")
                return joined.read_text().strip()
            except RuntimeError:
                if attempt == 2 or process.poll() is None:
                    raise
                self.processes.remove(process)
        raise AssertionError("unreachable")

    def _ray_start(self, name: str, *flags: str) -> subprocess.Popen:
        ports = free_ports(6)
        kinds = (
            "node-manager-port",
            "object-manager-port",
            "dashboard-agent-listen-port",
            "dashboard-agent-grpc-port",
            "runtime-env-agent-port",
            "metrics-export-port",
        )
        with open(self.folder / f"{name}.log", "wb") as log:
            process = subprocess.Popen(
                [
                    find_program("ray"),
                    "start",
                    "--block",
                    "--disable-usage-stats",
                    "--log-style=record",
                    f"--node-name={name}",
                    f"--num-cpus={self.cpus}",
                    f"--object-store-memory={self.object_store_mb << 20}",
                    f"--temp-dir={self.folder / name}",
                    "--min-worker-port=0",  # any free port: the nodes share one machine
                    "--max-worker-port=0",
                    *(f"--{kind}={port}" for kind, port in zip(kinds, ports, strict=True)),
                    *flags,
                ],
                env=self.env,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C reaches only this process, which ends the nodes in order
            )
        self.processes.append(process)
        return process

    def dead(self) -> subprocess.Popen | None:
        """First node process that ended by itself; None if all are running."""
        return next((process for process in self.processes if process.poll() is not None), None)

    def _wait(self, done: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + self.timeout
        while not done():
            ended = self.dead()
            if ended is not None or time.monotonic() > deadline:
                why = "a node ended" if ended is not None else f"{self.timeout:g} s have passed"
                raise RuntimeError(f"{what} did not start, {why}:\n{self.log_tails()}")
            time.sleep(0.2)

    def _wait_for_nodes(self) -> None:
        """Wait for all nodes. Ray gives a node 30 s to start; on a busy machine a slower one is restarted."""
        for attempt in range(3):
            try:
                return self._wait(self._all_alive, f"{self.nodes} nodes")
            except RuntimeError:
                ended = self.dead()
                if attempt == 2 or ended is None or ended is self.processes[0]:
                    raise
                self.processes.remove(ended)
                self.add_node()

    def _all_alive(self) -> bool:
        """Whether the job server answers and lists every node as alive."""
        try:
            summary = self._get("/nodes?view=summary")["data"]["summary"]
        except (urllib.error.URLError, OSError, KeyError, ValueError):
            return False
        return sum(node.get("raylet", {}).get("state") == "ALIVE" for node in summary) == self.nodes

    def _get(self, path: str) -> dict:
        token = Path(self.env["RAY_AUTH_TOKEN_PATH"]).read_text()
        request = urllib.request.Request(self.address + path, headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=10) as response:
            return json.load(response)

    def log_tails(self) -> str:
        return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-1500:]}" for log in self.folder.glob("*.log"))
