"""A Slurm cluster of this machine alone: munged, slurmctld and slurmd from Debian's packages, in a temporary folder."""

import os
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path

from seaweed import free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel")
ENVIRONMENT = os.environ["PATH"] + os.pathsep + "/usr/sbin"


def installed() -> bool:
    return all(shutil.which(name, path=ENVIRONMENT) for name in PROGRAMS)


class SlurmCluster:
    """Daemons of a cluster whose nodes share this machine, started on entry and ended on exit; needs root.

    Args:
        folder: for configuration, state, logs; its path must be short, since sockets are in it.
        nodes, cpus: number of nodes, and logical CPUs of each.

    `env` is the environment for sbatch and the like.
    """

    def __init__(self, folder: Path, nodes: int = 2, cpus: int = 1):
        self.folder, self.nodes, self.cpus = folder, nodes, cpus
        self.processes: list[subprocess.Popen] = []
        self.env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": ENVIRONMENT}

    def __enter__(self) -> "SlurmCluster":
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        if any(process.poll() is None for process in self.processes):
            self._cancel_jobs()
        for process in reversed(self.processes):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def run(self, *words: str) -> str:
        """Output of a command of Slurm."""
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr + self.logs()
        return done.stdout

    def state(self, job: str) -> str:
        """Such as PENDING, RUNNING, COMPLETED, FAILED."""
        return dict(word.split("=", 1) for word in self.run("scontrol", "show", "job", job).split() if "=" in word)[
            "JobState"
        ]

    def wait(self, job: str, *states: str, seconds: float = 300) -> str:
        """Wait until a job is in one of these states; returns it."""
        deadline = time.monotonic() + seconds
        while (found := self.state(job)) not in states:
            assert time.monotonic() < deadline, found + self.logs()
            time.sleep(0.5)
        return found

    def logs(self) -> str:
        return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-1500:]}" for log in self.folder.glob("*.log"))

    def _start(self) -> None:
        self.folder.chmod(0o755)
        controller, *ports = free_ports(1 + self.nodes)
        key, munge = self.folder / "munge.key", self.folder / "munge.socket"
        key.touch(mode=0o400)
        key.write_bytes(secrets.token_bytes(64))
        host = socket.gethostname().split(".")[0]
        names = [f"n{number}" for number in range(1, self.nodes + 1)]
        nodes = "".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={self.cpus} RealMemory=8000\n"
            for name, port in zip(names, ports, strict=True)
        )
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        (self.folder / "slurm.conf").write_text(
            f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={munge}
CredType=cred/munge
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool/%n
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
ReturnToService=2
KillWait=10
SlurmdParameters=config_overrides
{nodes}PartitionName=all Nodes={",".join(names)} Default=YES MaxTime=INFINITE
"""
        )
        self._daemon(
            "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={munge}",
            f"--pid-file={self.folder}/munged.pid", f"--seed-file={self.folder}/munged.seed",
        )  # fmt: skip
        self._until(munge.exists, "munged")
        self._daemon("slurmctld", "-D", "-f", self.env["SLURM_CONF"])
        for name in names:
            self._daemon("slurmd", "-D", "-N", name, "-f", self.env["SLURM_CONF"])
        self._until(lambda: self._sinfo().split() == ["idle"], "a node")

    def _cancel_jobs(self, seconds: float = 60) -> None:
        """End the jobs that a failed test has left: their processes outlive the daemons."""
        deadline = time.monotonic() + seconds
        subprocess.run(["scancel", f"--user={os.getuid()}"], env=self.env, capture_output=True)
        while time.monotonic() < deadline and self._queue():
            time.sleep(0.5)

    def _queue(self) -> str:
        return subprocess.run(["squeue", "-h"], env=self.env, capture_output=True, text=True).stdout

    def _sinfo(self) -> str:
        return subprocess.run(["sinfo", "-h", "-o", "%T"], env=self.env, capture_output=True, text=True).stdout

    def _daemon(self, program: str, *words: str) -> None:
        with open(self.folder / f"{program}-{len(self.processes)}.log", "wb") as log:
            self.processes.append(
                subprocess.Popen(
                    [shutil.which(program, path=ENVIRONMENT), *words],
                    env=self.env,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            )

    def _until(self, done, what: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            ended = any(process.poll() is not None for process in self.processes)
            assert not ended and time.monotonic() < deadline, f"{what} did not start: {self.logs()}"  # noqa: PT018
            time.sleep(0.2)
