"""What the machine must have before anything starts: each finding names the command that cures it."""

import os
import re
import shlex
import shutil
import socket
import subprocess
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

from tests.localcluster import binaries, cgroups, images, paths, process
from tests.localcluster.failure import CannotRunContainersError, ClusterError

DEBIAN_PACKAGES = {
    "runc": "/usr/sbin/runc",
    "containernetworking-plugins": "/usr/lib/cni/bridge",
    "nftables": "/usr/sbin/nft",
    "conntrack": "/usr/sbin/conntrack",
    "iproute2": "/sbin/ip",
    "procps": "/usr/bin/pgrep",
    "buildah": "/usr/bin/buildah",
    "debootstrap": "/usr/sbin/debootstrap",
    "docker-registry": "/usr/bin/docker-registry",
    "gcc": "/usr/bin/gcc",
    "libc6-dev": "/usr/include/stdlib.h",
}
"""Package -> a file by which it is known to be there."""

GIGABYTES = {"binaries": 9, "images": 12, "node": 7}
"""Disk that a cold start writes: Go caches and binaries, buildah and registry, unpacked images of one node."""

WAYS_ON = (
    "Two ways on: `make serve` runs the runtime alone on this machine's CPU, without root; "
    "or point KUBECONFIG at a cluster of your own and add `--use-existing-cluster`."
)


@dataclass(frozen=True)
class Finding:
    """One requirement. `fatal`: the machine cannot run containers at all, so no command cures it."""

    what: str
    ok: bool
    found: str
    cure: str = ""
    fatal: bool = False


def check(nodes: int = 2) -> list[Finding]:
    """Every requirement, the fatal ones first."""
    fatal = cannot_run_containers()
    if any(not finding.ok for finding in fatal):
        return fatal
    installed = packages()
    return [*fatal, installed, *([kernel()] if installed.ok else []), go(), disk(nodes)]


def cannot_run_containers() -> list[Finding]:
    """Root, namespaces, writable cgroups: quick, so that it can be told in the first second."""
    root = os.geteuid() == 0
    found = [Finding("root", root, f"uid {os.geteuid()}", "run it as root", fatal=True)]
    if root:
        found += [_namespaces(), _writable_cgroups()]
    return found


def _namespaces() -> Finding:
    run = subprocess.run([*process.isolated("--uts"), "true"], capture_output=True, text=True, check=False)
    cure = "allow CAP_SYS_ADMIN and CAP_NET_ADMIN, or use another machine"
    return Finding("namespaces", run.returncode == 0, run.stderr.strip() or "can be made", cure, fatal=True)


def _writable_cgroups() -> Finding:
    probe = f"localkube-probe-{uuid.uuid4().hex[:8]}"
    try:
        for hierarchy in cgroups.hierarchies():
            (hierarchy / probe).mkdir()
            (hierarchy / probe).rmdir()
    except OSError as error:
        return Finding("cgroups", False, str(error), "mount the cgroup file systems writable", fatal=True)
    return Finding("cgroups", True, f"{'v2' if cgroups.unified() else 'v1'}, writable", fatal=True)


KERNEL_PROBES = {
    "bridges": "ip link add probe0 type bridge",
    "veth pairs": "ip link add probe1 type veth peer name probe2",
    "nftables": "nft add table ip probe",
    "overlay mounts in the cache folder": "mkdir {0}/l {0}/u {0}/w {0}/m && "
    "mount -t overlay overlay -o lowerdir={0}/l,upperdir={0}/u,workdir={0}/w {0}/m",
}


def kernel() -> Finding:
    """Each feature is tried in namespaces of its own, so nothing of it stays."""
    paths.cache().mkdir(parents=True, exist_ok=True)
    lacking = []
    for feature, command in KERNEL_PROBES.items():
        with tempfile.TemporaryDirectory(prefix="probe-", dir=paths.cache()) as folder:
            argv = [*process.isolated(), "sh", "-c", command.format(shlex.quote(folder))]
            run = subprocess.run(argv, capture_output=True, text=True, check=False)
            if run.returncode:
                lacking.append(f"no {feature} ({run.stderr.strip()})")
    cure = "load the modules bridge, veth, nf_tables, overlay; PRISM_CACHE on ext4 or xfs, not on an overlay"
    return Finding("kernel", not lacking, ", ".join(lacking) or ", ".join(KERNEL_PROBES), cure)


def packages() -> Finding:
    missing = [name for name, file in DEBIAN_PACKAGES.items() if not Path(file).exists()]
    cure = "python -m tests.localcluster doctor --install"
    return Finding("Debian packages", not missing, f"missing: {' '.join(missing)}" if missing else "installed", cure)


def go() -> Finding:
    if not binaries.missing():
        return Finding("Go", True, "not needed, the binaries are built")
    needed = re.search(r"^go (\d+)\.(\d+)", (paths.MODULES / "k8s/go.mod").read_text(), re.MULTILINE)
    assert needed is not None
    try:
        version = binaries.go()[1]
    except ClusterError as error:
        return Finding("Go", False, str(error), "install Go 1.26 or newer")
    found = re.search(r"go(\d+)\.(\d+)", version)
    assert found is not None
    new_enough = tuple(map(int, found.groups())) >= tuple(map(int, needed.groups()))
    return Finding("Go", new_enough, version, f"install Go {'.'.join(needed.groups())} or newer")


def needed_gigabytes(nodes: int) -> int:
    """Disk that the steps still to be done will write."""
    built = not binaries.missing()
    total = 0 if built else GIGABYTES["binaries"]
    pushed = images.pushed()
    if not any("/runtime:" in reference for reference in pushed):
        total += GIGABYTES["images"]
    stores = paths.cache() / "nodes"
    filled = len(list(stores.glob("*/node-*"))) if stores.exists() else 0
    return total + GIGABYTES["node"] * max(0, nodes - filled)


def disk(nodes: int) -> Finding:
    folder = paths.cache()
    folder.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(folder).free / 1e9, needed_gigabytes(nodes)
    cure = f"free space, or set PRISM_CACHE to a larger disk; `go clean -cache` and {folder}/nodes can go"
    return Finding("disk", free > needed + 2, f"{free:.0f} GB free in {folder}, {needed} GB needed", cure)


def port(number: int) -> Finding:
    try:
        socket.create_server(("127.0.0.1", number)).close()
    except OSError as error:
        return Finding(f"port {number}", False, str(error), "stop what listens there, or choose --port")
    return Finding(f"port {number}", True, "free")


def install_packages() -> None:
    """apt-get the missing Debian packages; root only."""
    missing = [name for name, file in DEBIAN_PACKAGES.items() if not Path(file).exists()]
    if not missing:
        return
    print(f"Installing Debian packages: {' '.join(missing)}", flush=True)
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for argv in (
        ["apt-get", "update", "-qq"],
        ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing],
    ):
        run = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
        if run.returncode:
            raise ClusterError(f"{' '.join(argv[:2])} failed:\n{run.stderr[-2000:]}")


def require(nodes: int = 2) -> None:
    """Raise ClusterError that lists what is missing and what cures it."""
    broken = [finding for finding in check(nodes) if not finding.ok]
    if not broken:
        return
    lines = [f"{finding.what}: {finding.found}. To do: {finding.cure}." for finding in broken]
    if any(finding.fatal for finding in broken):
        raise CannotRunContainersError("\n".join(["This machine cannot run containers.", *lines, WAYS_ON]))
    raise ClusterError("\n".join(lines))
