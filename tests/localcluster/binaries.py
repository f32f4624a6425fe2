"""Kubernetes and its companions, built from their Go modules into the cache folder.

One module per tool, because in a shared one minimal version selection would raise a tool's own dependencies. A
tool's key covers its go.mod, go.sum, flags and compiler; a finished build is renamed into place, so a killed one
leaves nothing.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from functools import cache as memoize
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tests.localcluster import paths, running
from tests.localcluster.failure import ClusterError

KUBERNETES = "v1.37.2"
_VERSIONED = ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
_KUBERNETES_FLAGS = "-s -w" + "".join(
    f" -X {package}.gitVersion={KUBERNETES} -X {package}.gitMajor=1 -X {package}.gitMinor=37"
    f" -X {package}.gitTreeState=archive -X {package}.buildDate=1970-01-01T00:00:00Z"
    for package in _VERSIONED
)
"""Without them the server calls itself v0.0.0-master, and Helm's kubeVersion checks refuse it."""


@dataclass(frozen=True)
class Tool:
    """A Go module under modules/, the packages to build from it, and what they are called."""

    module: str
    packages: dict[str, str]
    ldflags: str
    cold_seconds: int
    """Measured on two cores with empty caches; only used to draw the progress bar."""


def _packages(root: str, *names: str) -> dict[str, str]:
    return {name: f"{root}/{name}" for name in names}


TOOLS = (
    Tool(
        "k8s",
        _packages(
            "k8s.io/kubernetes/cmd",
            *("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl"),
        ),
        _KUBERNETES_FLAGS,
        540,
    ),
    Tool("etcd", {"etcd": "go.etcd.io/etcd/server/v3"}, "-s -w", 30),
    Tool(
        "containerd",
        _packages("github.com/containerd/containerd/v2/cmd", "containerd", "containerd-shim-runc-v2", "ctr"),
        "-s -w -X github.com/containerd/containerd/v2/version.Version=2.4.2",
        70,
    ),
    Tool("coredns", {"coredns": "github.com/coredns/coredns"}, "-s -w", 130),
    Tool(
        "helm",
        {"helm": "helm.sh/helm/v4/cmd/helm"},
        "-s -w -X helm.sh/helm/v4/internal/version.version=v4.3.1",
        90,
    ),
)


def _environment() -> dict[str, str]:
    return os.environ | {
        "GOTOOLCHAIN": "local",
        "CGO_ENABLED": "0",
        "GOMAXPROCS": "2",
        "GOFLAGS": "-p=2 -trimpath -buildvcs=false -mod=readonly",
        "GOMEMLIMIT": "6GiB",
    }


@memoize
def go() -> tuple[str, str]:
    """Path and version of the Go compiler. Raises ClusterError without one."""
    go = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")
    if go is None:
        raise ClusterError("Go is not installed; the local cluster is built from source and needs Go 1.26 or newer.")
    return go, subprocess.run([go, "version"], capture_output=True, text=True, check=True).stdout.strip()


def _key(tool: Tool) -> str:
    folder = paths.MODULES / tool.module
    content = [(folder / name).read_bytes() for name in ("go.mod", "go.sum")]
    content += [tool.ldflags.encode(), " ".join(tool.packages.values()).encode(), go()[1].encode()]
    return hashlib.sha256(b"\0".join(content)).hexdigest()[:16]


def folder_of(tool: Tool) -> Path:
    return paths.cache() / "bin" / f"{tool.module}-{_key(tool)}"


def missing() -> list[Tool]:
    """Tools that a start would have to build first."""
    return [tool for tool in TOOLS if not folder_of(tool).exists()]


def path(name: str) -> Path:
    """A built binary. Raises ClusterError if it is not built yet."""
    for tool in TOOLS:
        if name in tool.packages:
            binary = folder_of(tool) / name
            if not binary.exists():
                raise ClusterError(f"{name} is not built; run: python -m tests.localcluster build")
            return binary
    raise ClusterError(f"{name} is none of the local cluster's binaries")


def tool_folders() -> str:
    """The folders of the built binaries, as a part of PATH."""
    return ":".join(str(folder_of(tool)) for tool in TOOLS)


def search_path() -> str:
    """PATH with the built binaries first; nothing else of the caller's PATH."""
    return f"{tool_folders()}:/usr/sbin:/usr/bin:/sbin:/bin"


def build(console: Console, only: tuple[str, ...] = ()) -> None:
    """Build what is missing (all, or the modules named in `only`), with progress; safe to interrupt and run again."""
    if not _wanted(only):
        return
    with running.exclusive("building binaries", console):
        _build_all(_wanted(only), console)


def _wanted(only: tuple[str, ...]) -> list[Tool]:
    return [tool for tool in missing() if not only or tool.module in only]


def _build_all(wanted: list[Tool], console: Console) -> None:
    minutes = sum(tool.cold_seconds for tool in wanted) / 60
    console.print(
        f"Building {', '.join(t.module for t in wanted)} from Go modules: up to {minutes:.0f} min, 8 GB of caches."
    )
    for abandoned in (paths.cache() / "bin").glob(".*-*"):  # by a build that was killed
        shutil.rmtree(abandoned, ignore_errors=True)
    columns = (SpinnerColumn(), TextColumn("{task.description:12}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for tool in wanted:
            _build_one(tool, progress)


def _build_one(tool: Tool, progress: Progress) -> None:
    final = folder_of(tool)
    final.parent.mkdir(parents=True, exist_ok=True)
    task = progress.add_task(tool.module, total=tool.cold_seconds)
    started = time.monotonic()
    done = threading.Event()

    def advance() -> None:
        while not done.wait(0.5):
            elapsed = time.monotonic() - started
            progress.update(task, completed=min(elapsed, tool.cold_seconds * 0.98))

    ticker = threading.Thread(target=advance, daemon=True)
    ticker.start()
    scratch = Path(tempfile.mkdtemp(prefix=f".{tool.module}-", dir=final.parent))
    try:
        for name, package in tool.packages.items():
            argv = [go()[0], "build", "-ldflags", tool.ldflags, "-o", str(scratch / name), package]
            run = subprocess.run(
                argv, cwd=paths.MODULES / tool.module, env=_environment(), capture_output=True, text=True, check=False
            )
            if run.returncode:
                tail = "\n".join(run.stderr.splitlines()[-15:])
                raise ClusterError(f"go build of {package} failed; run the command again to go on.\n{tail}")
        scratch.rename(final)
    finally:
        done.set()
        ticker.join()
        shutil.rmtree(scratch, ignore_errors=True)
    progress.update(task, completed=tool.cold_seconds)
