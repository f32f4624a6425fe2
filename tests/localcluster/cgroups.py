"""Cgroups of a cluster: one folder of its own, in every controller (v1) or in the one tree (v2)."""

import time
from pathlib import Path

MOUNT = Path("/sys/fs/cgroup")


def root(name: str) -> str:
    return f"localkube-{name}"


def unified() -> bool:
    """Whether this is cgroup v2."""
    return (MOUNT / "cgroup.controllers").exists()


def hierarchies() -> list[Path]:
    """Mount points of the controllers; one for cgroup v2."""
    if unified():
        return [MOUNT]
    return [p for p in MOUNT.iterdir() if p.is_dir() and not p.is_symlink()]


def make(cgroup: str) -> None:
    """Create a cgroup in every hierarchy, with every controller.

    v1: cpuset needs its cpus and memory nodes copied on every level. v2: each level hands its controllers down, or
    kubelet does not find them in its root.
    """
    for hierarchy in hierarchies():
        folder = hierarchy / cgroup
        folder.mkdir(parents=True, exist_ok=True)
        if unified():
            for level in (hierarchy, folder.parent):
                controllers = (level / "cgroup.controllers").read_text().split()
                (level / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in controllers))
        if hierarchy.name == "cpuset":
            for level in (folder.parent, folder):
                for file in ("cpuset.cpus", "cpuset.mems"):
                    (level / file).write_text((hierarchy / file).read_text())


def folders(name: str) -> list[Path]:
    """What exists of a cluster's cgroups, deepest first."""
    found: list[Path] = []
    for hierarchy in hierarchies():
        top = hierarchy / root(name)
        if top.exists():
            found += sorted((p for p in top.rglob("*") if p.is_dir()), key=lambda p: -len(p.parts))
            found.append(top)
    return found


def remove(name: str, timeout_s: float = 10) -> None:
    """Remove a cluster's emptied cgroups; the kernel may need a moment after its last process."""
    deadline = time.monotonic() + timeout_s
    while remaining := folders(name):
        for folder in remaining:
            try:
                folder.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    raise
        time.sleep(0.05)
