"""What runs under a cluster's name: started detached, recorded, found again, and ended to the last process."""

import contextlib
import fcntl
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from tests.localcluster import cgroups, paths
from tests.localcluster.process import Process


@contextmanager
def exclusive(what: str, console: Console) -> Iterator[None]:
    """One process at a time may do this with the cache; the kernel releases the lock of one that is killed."""
    folder = paths.cache() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / what.replace(" ", "-")).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print(f"Another process is {what}; waiting for it.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def detached(argv: list[str], log: Path) -> Process:
    """Start a process that outlives this one and does not hear its Ctrl-C."""
    with log.open("ab") as output:
        started = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=paths.REPOSITORY, start_new_session=True
        )
    return Process.of(started.pid)


def record(run: Path, processes: dict[str, Process]) -> None:
    (run / "processes.json").write_text(json.dumps({role: str(process) for role, process in processes.items()}))


def recorded(run: Path) -> dict[str, Process]:
    file = run / "processes.json"
    if not file.exists():
        return {}
    return {role: Process.parse(text) for role, text in json.loads(file.read_text()).items()}


def _processes_of(run: Path) -> list[Process]:
    """By an argument that is the run folder or lies in it, so that a start killed before it was recorded is found."""
    exact, below = str(run), f"{run}/"
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit():
                arguments = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                if any(a == exact or below in a for a in arguments):
                    found.append(Process.of(int(folder.name)))
    return found


def _parents_first(run: Path) -> list[Process]:
    """Pid 1 of the control plane's namespaces ends everything below it, so it goes first; low pids are the oldest."""
    starters = [p for p in _processes_of(run) if p.is_module("tests.localcluster.controlplane")]
    return sorted(starters, key=lambda process: process.pid)


def stop(name: str, *, keep_logs: bool = False) -> None:
    """End whatever runs under a name, also a stale or half-started one, and remove what it left."""
    run = paths.run_folder(name)
    for process in [*recorded(run).values(), *_parents_first(run)]:
        process.kill()
    cgroups.remove(name)
    if keep_logs and run.exists():
        kept = run.with_name(f"{name}.failed")
        shutil.rmtree(kept, ignore_errors=True)
        run.rename(kept)
    shutil.rmtree(run, ignore_errors=True)


def leftovers(name: str) -> list[str]:
    """What a stopped cluster still has: processes, mounts, cgroups, run folder. Empty after `stop`."""
    run = paths.run_folder(name)
    left = [str(folder) for folder in cgroups.folders(name)]
    mounts = (line.split()[1] for line in Path("/proc/mounts").read_text().splitlines())
    left += [mount for mount in mounts if mount == str(run) or mount.startswith(f"{run}/")]
    left += [f"process {process.pid}" for process in _processes_of(run)]
    if run.exists():
        left.append(str(run))
    return left
