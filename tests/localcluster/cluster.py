"""A running cluster, as tests, the demo and the command line see it."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.localcluster import binaries, certs, cgroups, doctor, images, network, paths
from tests.localcluster.failure import ClusterError
from tests.localcluster.process import Process, check, child_of, isolated, within

DEFAULT_NAME, DEFAULT_PORT = "prism", 6443
START_TIMEOUT_S = 150
GPU = "nvidia.com/gpu"


class Cluster:
    """Use `up` to start one, `attach` for one that runs, `existing` for a user's own."""

    def __init__(self, name: str, kubeconfig: Path, processes: dict[str, Process]) -> None:
        self.name, self.kubeconfig = name, kubeconfig
        self._processes = processes
        self.start_seconds: float | None = None

    # ---- life ---------------------------------------------------------------------------------------------------
    @classmethod
    def up(
        cls,
        name: str = DEFAULT_NAME,
        *,
        nodes: int = 2,
        gpus_per_node: int = 8,
        port: int = DEFAULT_PORT,
        crds: tuple[Path, ...] = (),
        console: Console | None = None,
    ) -> "Cluster":
        """Start a cluster; a stale run of the same name is ended first. Raises ClusterError with what to do."""
        console = console or Console()
        doctor.require(nodes)
        binaries.build(console)
        images.ensure(console, [image() for image in images.CLUSTER_IMAGES])
        stop(name)
        free = doctor.port(port)
        if not free.ok:
            raise ClusterError(f"{free.what}: {free.found}. To do: {free.cure}.")
        started = time.monotonic()
        run = paths.run_folder(name)
        run.mkdir(parents=True)
        outside = f"https://127.0.0.1:{port}"
        certs.write_all(run / "pki", nodes, f"https://{network.HOST}:{network.API_PORT}", outside)
        settings = {"name": name, "nodes": nodes, "crds": [str(path.resolve()) for path in crds]}
        (run / "settings.json").write_text(json.dumps(settings))
        try:
            with console.status(f"Starting Kubernetes {binaries.KUBERNETES} with {nodes} nodes"):
                cluster = cls._start(name, run, port)
                cluster._wait_for_nodes(nodes)
                cluster._declare_gpus(nodes, gpus_per_node)
                manifest = Path(__file__).with_name("coredns.yaml").read_text()
                cluster.kubectl("apply", "-f", "-", input=manifest.replace("COREDNS_IMAGE", images.coredns().reference))
        except BaseException:
            stop(name, keep_logs=True)
            raise
        cluster.start_seconds = time.monotonic() - started
        console.print(f"Kubernetes {binaries.KUBERNETES}: {nodes} nodes Ready in {cluster.start_seconds:.1f} s")
        return cluster

    @classmethod
    def _start(cls, name: str, run: Path, port: int) -> "Cluster":
        module = [sys.executable, "-m", "tests.localcluster.controlplane", str(run)]
        outer = _detached([*isolated(), *module], run / "controlplane.log")
        deadline = time.monotonic() + START_TIMEOUT_S
        while (inner := child_of(outer)) is None:
            _give_up_after(deadline, run, "the control plane's namespaces")
        processes = {"controlplane": Process.of(inner)}
        _record(run, processes)
        while not (run / "ready").exists():
            if (run / "failed").exists():
                raise ClusterError((run / "failed").read_text())
            if not processes["controlplane"].alive:
                raise ClusterError(f"the control plane ended; its log: {run}/controlplane.log")
            _give_up_after(deadline, run, "the control plane")
        forward = [sys.executable, "-m", "tests.localcluster.forward", str(port), str(inner)]
        api = [network.HOST, str(network.API_PORT)]
        processes["forward"] = Process.of(_detached([*forward, *api], run / "forward.log"))
        _record(run, processes)
        return cls(name, run / "kubeconfig", processes)

    @classmethod
    def attach(cls, name: str = DEFAULT_NAME) -> "Cluster":
        """A cluster that runs. Raises ClusterError if there is none of that name."""
        processes = _recorded(paths.run_folder(name))
        if "forward" not in processes or not all(p.alive for p in processes.values()):
            raise ClusterError(f"no cluster '{name}' is running; run: python -m tests.localcluster up --name {name}")
        return cls(name, paths.run_folder(name) / "kubeconfig", processes)

    def down(self) -> None:
        """End it; nothing is left but caches."""
        stop(self.name)

    # ---- tools --------------------------------------------------------------------------------------------------
    def environment(self) -> dict[str, str]:
        return os.environ | {"KUBECONFIG": str(self.kubeconfig), "PATH": binaries.search_path()}

    def kubectl(self, *arguments: str, input: str | None = None) -> str:
        """Output of kubectl. Raises ClusterError with its message if it fails."""
        argv = [str(binaries.path("kubectl")), *arguments]
        return check(argv, what=f"kubectl {' '.join(arguments[:6])}", input=input, env=self.environment())

    def get(self, *arguments: str) -> Any:
        """`kubectl get ... -o json`, parsed."""
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))

    def helm(self, *arguments: str) -> str:
        argv = [str(binaries.path("helm")), *arguments]
        return check(argv, what=f"helm {' '.join(arguments[:4])}", env=self.environment())

    def wait_until(self, what: str, ready: Callable[[], bool], timeout_s: float = 60) -> None:
        """Poll a condition. Raises ClusterError that says what was last seen."""
        deadline, last = time.monotonic() + timeout_s, "not true"
        while True:
            try:
                if ready():
                    return
                last = "not true"
            except (ClusterError, KeyError, IndexError) as error:
                last = str(error)
            if time.monotonic() > deadline:
                raise ClusterError(f"after {timeout_s:.0f} s still waiting until {what}; last seen: {last}")
            time.sleep(0.2)

    # ---- places -------------------------------------------------------------------------------------------------
    def inside(self, argv: list[str], *, node: str | None = None, **options: Any) -> "subprocess.Popen[Any]":
        """Start a command in the control plane's network (reaches Pods) or in a node's (reaches Services too)."""
        pid = self.node_pid(node) if node else self._processes["controlplane"].pid
        return subprocess.Popen([*within(pid), *argv], **options)

    @contextmanager
    def forward(self, local_port: int, address: str, port: int, *, node: str = "node-0") -> Iterator[str]:
        """A loopback port of this machine that leads to an address as a node sees it; yields the URL."""
        module = [sys.executable, "-m", "tests.localcluster.forward", str(local_port), str(self.node_pid(node))]
        process = subprocess.Popen([*module, address, str(port)], cwd=paths.REPOSITORY)
        try:
            yield f"http://127.0.0.1:{local_port}"
        finally:
            process.terminate()
            process.wait(timeout=10)

    def nodes(self) -> list[str]:
        return [item["metadata"]["name"] for item in self.get("nodes")["items"]]

    def node_pid(self, node: str) -> int:
        """This machine's pid of a node's pid 1."""
        run = paths.run_folder(self.name)
        inside = (run / node / "pid").read_text()
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                line = next(n for n in (folder / "status").read_text().splitlines() if n.startswith("NSpid:"))
                pids = line.split()[1:]
                command = (folder / "cmdline").read_bytes().decode().split("\0")
                if len(pids) >= 3 and pids[-1] == "1" and pids[-2] == inside and str(run) in command:
                    return int(folder.name)
        raise ClusterError(f"node '{node}' of cluster '{self.name}' does not run")

    def crash_node(self, node: str) -> None:
        """SIGKILL to a node's pid 1: its kubelet, containers and addresses are gone at once."""
        Process.of(self.node_pid(node)).kill()

    def container_pid(self, namespace: str, pod: str) -> int:
        """This machine's pid of a Pod's first process (of its first container), by the container's cgroup."""
        status = self.get("pod", pod, "-n", namespace)["status"]["containerStatuses"][0]
        container = status["containerID"].removeprefix("containerd://")
        for hierarchy in cgroups.hierarchies():
            for folder in (hierarchy / cgroups.root(self.name)).rglob(f"*{container}*"):
                if pids := (folder / "cgroup.procs").read_text().split():
                    return min(int(pid) for pid in pids)
        raise ClusterError(f"no process found of pod {namespace}/{pod}")

    # ---- starting -----------------------------------------------------------------------------------------------
    def _wait_for_nodes(self, count: int) -> None:
        def ready() -> bool:
            items = self.get("nodes")["items"]
            conditions = [c for item in items for c in item["status"].get("conditions", ()) if c["type"] == "Ready"]
            return sum(c["status"] == "True" for c in conditions) == count

        self.wait_until(f"{count} nodes are Ready", ready, START_TIMEOUT_S)

    def _declare_gpus(self, nodes: int, count: int) -> None:
        patch = json.dumps({"status": {"capacity": {GPU: str(count)}, "allocatable": {GPU: str(count)}}})
        for index in range(nodes):
            arguments = ("patch", "node", network.node_name(index), "--subresource=status", "--type=merge")
            self.kubectl(*arguments, "-p", patch)


def _detached(argv: list[str], log: Path) -> int:
    """Start a process that outlives this one; its pid."""
    with log.open("ab") as output:
        return subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=paths.REPOSITORY, start_new_session=True
        ).pid


def _give_up_after(deadline: float, run: Path, what: str) -> None:
    if time.monotonic() > deadline:
        raise ClusterError(f"{what} did not start in {START_TIMEOUT_S} s; logs: {run}/*.log")
    time.sleep(0.05)


def _record(run: Path, processes: dict[str, Process]) -> None:
    (run / "processes.json").write_text(json.dumps({role: str(process) for role, process in processes.items()}))


def _recorded(run: Path) -> dict[str, Process]:
    file = run / "processes.json"
    if not file.exists():
        return {}
    return {role: Process.parse(text) for role, text in json.loads(file.read_text()).items()}


def stop(name: str, *, keep_logs: bool = False) -> None:
    """End whatever runs under a name, also a stale or half-started one, and remove what it left."""
    run = paths.run_folder(name)
    for process in _recorded(run).values():
        process.kill()
    cgroups.remove(name)
    if keep_logs:
        kept = run.with_name(f"{name}.failed")
        shutil.rmtree(kept, ignore_errors=True)
        if run.exists():
            run.rename(kept)
    shutil.rmtree(run, ignore_errors=True)


def leftovers(name: str) -> list[str]:
    """What a stopped cluster still has: processes, mounts, cgroups, run folder. Empty after `stop`."""
    run = str(paths.run_folder(name))
    left = [str(folder) for folder in cgroups.folders(name)]
    left += [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines() if run in line]
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and run.encode() in (folder / "cmdline").read_bytes():
                left.append(f"process {folder.name}")
    if Path(run).exists():
        left.append(run)
    return left
