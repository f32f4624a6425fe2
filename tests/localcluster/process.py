"""Processes of a cluster: found by pid and start time, never by name, so that a reused pid is never hit."""

import contextlib
import itertools
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from tests.localcluster.failure import ClusterError


@dataclass(frozen=True)
class Process:
    pid: int
    started: str
    """Start time in clock ticks since boot, field 22 of /proc/PID/stat (proc(5))."""

    @classmethod
    def of(cls, pid: int) -> "Process":
        return cls(pid, _start_ticks(pid) or "gone")

    @classmethod
    def parse(cls, text: str) -> "Process":
        pid, started = text.split()
        return cls(int(pid), started)

    def __str__(self) -> str:
        return f"{self.pid} {self.started}"

    @property
    def alive(self) -> bool:
        return _start_ticks(self.pid) == self.started

    def is_module(self, name: str) -> bool:
        """Whether it runs `python -m name`, itself or through a command that it starts."""
        try:
            arguments = Path(f"/proc/{self.pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        except (FileNotFoundError, ProcessLookupError):
            return False
        return ("-m", name) in itertools.pairwise(arguments)

    def kill(self, timeout_s: float = 20) -> None:
        """SIGKILL and wait until it is gone."""
        deadline = time.monotonic() + timeout_s
        while self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise ClusterError(f"process {self.pid} does not end after SIGKILL; look at /proc/{self.pid}/stack")
            time.sleep(0.05)


def _start_ticks(pid: int) -> str | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rsplit(")", 1)[1].split()
    return None if fields[0] == "Z" else fields[19]


def child_of(pid: int) -> int | None:
    """The only child of a process, or None while there is none."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(found[0]) if found else None


def isolated(*flags: str) -> list[str]:
    """Prefix that runs a command as pid 1 of namespaces of its own, which end with it."""
    common = ("--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private")
    return ["unshare", *flags, *common]


def within(pid: int, *flags: str) -> list[str]:
    """Prefix that runs a command inside the network namespace of a process."""
    return ["nsenter", "-t", str(pid), "-n", *flags, "--"]


def check(argv: list[str], *, what: str, input: str | None = None, env: dict[str, str] | None = None) -> str:
    """Standard output of a command. Raises ClusterError with the end of its output if it fails."""
    run = subprocess.run(argv, input=input, env=env, capture_output=True, text=True, check=False)
    if run.returncode:
        tail = "\n".join((run.stdout + run.stderr).splitlines()[-20:])
        raise ClusterError(f"{what} failed (exit {run.returncode}):\n{tail}")
    return run.stdout
