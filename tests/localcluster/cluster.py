"""A running cluster, as tests, the demo and the command line see it."""

import contextlib
import datetime
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.localcluster import binaries, certs, cgroups, doctor, images, network, paths, running
from tests.localcluster.failure import ClusterError
from tests.localcluster.process import Process, check, child_of, isolated, within

DEFAULT_NAME, DEFAULT_PORT = "prism", 6443
START_TIMEOUT_S = 150
GPU = "nvidia.com/gpu"
COREDNS = Path(__file__).with_name("coredns.yaml")


class Cluster:
    """Use `up` to start one, `attach` for one that runs, `existing` for a user's own."""

    def __init__(self, name: str, kubeconfig: Path, processes: dict[str, Process], origin: str) -> None:
        self.name, self.kubeconfig, self.origin = name, kubeconfig, origin
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
        port: int | None = None,
        crds: tuple[Path, ...] = (),
        console: Console | None = None,
    ) -> "Cluster":
        """Start a cluster; a run of the same name is ended first.

        port: where the API server listens on 127.0.0.1; by default 6443, or any free one if that is taken.
        crds: installed before the controller manager starts; its garbage collector learns of later ones after 30 s.
        Raises ClusterError that says what to do, CannotRunContainersError where nothing helps.
        """
        console = console or Console()
        doctor.require(nodes)
        binaries.build(console)
        images.ensure(console, [image() for image in images.CLUSTER_IMAGES])
        with running.exclusive(f"starting cluster {name}", console):
            running.stop(name)
            started = time.monotonic()
            run, port = paths.run_folder(name), _free_port(port)
            settings = {"name": name, "nodes": nodes, "gpus_per_node": gpus_per_node}
            try:
                run.mkdir(parents=True)
                outside = f"https://127.0.0.1:{port}"
                certs.write_all(run / "pki", nodes, f"https://{network.HOST}:{network.API_PORT}", outside)
                crd_files = {"crds": [str(path.resolve()) for path in crds]}
                (run / "settings.json").write_text(json.dumps(settings | crd_files))
                cluster = cls._start(name, run, port, Steps(console, run / "steps", started))
            except BaseException as error:
                running.stop(name, keep_logs=isinstance(error, Exception))
                raise
        cluster.start_seconds = time.monotonic() - started
        return cluster

    @classmethod
    def _start(cls, name: str, run: Path, port: int, steps: "Steps") -> "Cluster":
        module = [sys.executable, "-m", "tests.localcluster.controlplane", str(run)]
        outer = running.detached([*isolated(), *module], run / "controlplane.log")
        deadline = time.monotonic() + START_TIMEOUT_S
        while (inner := child_of(outer.pid)) is None:
            _give_up_after(deadline, run, "the control plane's namespaces")
        processes = {"controlplane": Process.of(inner)}
        running.record(run, processes)
        while not (run / "ready").exists():
            steps.follow()
            if (run / "failed").exists():
                raise ClusterError((run / "failed").read_text())
            if not processes["controlplane"].alive:
                raise ClusterError(f"the control plane ended; its log: {run}.failed/controlplane.log")
            _give_up_after(deadline, run, "the control plane")
        steps.follow()
        forward = [sys.executable, "-m", "tests.localcluster.forward", str(port), str(inner)]
        processes["forward"] = running.detached([*forward, network.HOST, str(network.API_PORT)], run / "forward.log")
        running.record(run, processes)
        cluster = cls(name, run / "kubeconfig", processes, "started now")
        names = [network.node_name(index) for index in range(cluster._settings()["nodes"])]
        cluster._wait_for_nodes(names, since=None)
        cluster.kubectl(
            "apply", "-f", "-", input=COREDNS.read_text().replace("COREDNS_IMAGE", images.coredns().reference)
        )
        cluster.wait_for_namespace("default")
        steps.tell(f"Kubernetes {binaries.KUBERNETES}: {len(names)} nodes Ready")
        return cluster

    @classmethod
    def attach(cls, name: str = DEFAULT_NAME) -> "Cluster":
        """A cluster that runs. Raises ClusterError if there is none of that name."""
        processes = running.recorded(paths.run_folder(name))
        if "forward" not in processes or not all(p.alive for p in processes.values()):
            raise ClusterError(f"no cluster '{name}' is running; run: python -m tests.localcluster up --name {name}")
        return cls(name, paths.run_folder(name) / "kubeconfig", processes, "was running")

    @classmethod
    def existing(cls) -> "Cluster":
        """The user's own cluster of KUBECONFIG, with the kubectl and helm of PATH; its images are the user's business.

        Only `kubectl`, `helm`, `get`, `wait_until`, `image` and what builds on them work on it.
        """
        file = Path(os.environ.get("KUBECONFIG", ""))
        if not file.is_file():
            raise ClusterError(f"KUBECONFIG is '{file}', which is no file; point it at the kubeconfig to use.")
        cluster = cls("", file, {}, "the user's own")
        cluster.name = cluster.kubectl("config", "current-context").strip()
        return cluster

    @property
    def own(self) -> bool:
        """Whether it is ours to crash and to stop; false for `existing`."""
        return bool(self._processes)

    def down(self) -> None:
        """End it; nothing is left but caches. A user's own cluster is left alone."""
        if self.own:
            running.stop(self.name)

    def describe(self) -> str:
        """One line: where it comes from and which versions run."""
        server = json.loads(self.kubectl("version", "-o", "json"))["serverVersion"]["gitVersion"]
        items = self.get("nodes")["items"]
        runtimes = {item["status"]["nodeInfo"]["containerRuntimeVersion"] for item in items}
        etcd = ""
        if self.own:
            told = check([str(binaries.path("etcd")), "--version"], what="etcd --version")
            etcd = f", etcd {told.splitlines()[0].split()[-1]}"
        name = f"cluster '{self.name}' ({self.origin})"
        return f"{name}: Kubernetes {server}{etcd}, {', '.join(sorted(runtimes))}, {len(items)} nodes"

    # ---- tools --------------------------------------------------------------------------------------------------
    def environment(self) -> dict[str, str]:
        """What kubectl, helm and Kubernetes clients need; the built kubectl and helm come first in PATH."""
        if not self.own:
            return os.environ | {"KUBECONFIG": str(self.kubeconfig)}
        return os.environ | self.exports() | {"PATH": binaries.search_path()}

    def exports(self) -> dict[str, str]:
        """KUBECONFIG, and a discovery cache of its own: kubectl's is by address, and earlier clusters had the same."""
        return {
            "KUBECONFIG": str(self.kubeconfig),
            "KUBECACHEDIR": str(paths.run_folder(self.name) / "kubectl-cache"),
        }

    def _tool(self, name: str) -> str:
        found = str(binaries.path(name)) if self.own else shutil.which(name)
        if found is None:
            raise ClusterError(f"{name} is not in PATH; a cluster of your own is used with your own {name}.")
        return found

    def kubectl(self, *arguments: str, input: str | None = None) -> str:
        """Output of kubectl. Raises ClusterError with its message if it fails."""
        argv = [self._tool("kubectl"), *arguments]
        return check(argv, what=f"kubectl {' '.join(arguments[:6])}", input=input, env=self.environment())

    def get(self, *arguments: str) -> Any:
        """`kubectl get ... -o json`, parsed."""
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))

    def helm(self, *arguments: str) -> str:
        """Output of helm. Raises ClusterError with its message if it fails."""
        argv = [self._tool("helm"), *arguments]
        return check(argv, what=f"helm {' '.join(arguments[:4])}", env=self.environment())

    def image(self, name: str, console: Console | None = None) -> str:
        """Reference of the project's image `operator`, `runtime` or `model` for Pods; built and pushed if it is new.

        On a user's own cluster it is PRISM_IMAGE_PREFIX/NAME:VERSION, which the user has pushed.
        """
        if self.own:
            image = images.project_image(name)
            images.ensure(console or Console(stderr=True), [image])
            return image.reference
        prefix = os.environ.get("PRISM_IMAGE_PREFIX")
        if not prefix:
            raise ClusterError(
                f"The cluster cannot pull image '{name}': build and push it, and set PRISM_IMAGE_PREFIX, for example "
                "to registry.example/moeprism."
            )
        version = tomllib.loads((paths.REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
        return f"{prefix}/{name}:{version}"

    def wait_for_namespace(self, namespace: str) -> None:
        """Until it has its `default` ServiceAccount, without which it refuses Pods."""
        arguments = ("serviceaccount", "default", "-n", namespace)
        self.wait_until(f"namespace {namespace} is usable", lambda: bool(self.get(*arguments)))

    def wait_until(self, what: str, ready: Callable[[], bool], timeout_s: float = 60) -> None:
        """Poll a condition. Raises ClusterError that says what was last seen."""
        deadline, last = time.monotonic() + timeout_s, "not true"
        while True:
            try:
                if ready():
                    return
                last = "not true"
            except (ClusterError, LookupError, StopIteration) as error:
                last = str(error)
            if time.monotonic() > deadline:
                raise ClusterError(f"after {timeout_s:.0f} s still waiting until {what}; last seen: {last}")
            time.sleep(0.2)

    # ---- places -------------------------------------------------------------------------------------------------
    def inside(self, argv: list[str], *, node: str | None = None, **options: Any) -> "subprocess.Popen[Any]":
        """Start a command in the control plane's network (reaches Pods) or in a node's (reaches Services too)."""
        pid = self.node_pid(node) if node else self._control_plane_pid()
        return subprocess.Popen([*within(pid), *argv], **options)

    def run_inside(self, argv: list[str], *, node: str | None = None, timeout_s: float = 60) -> str:
        """Output of a command run there. Raises ClusterError if it fails or takes longer."""
        process = self.inside(argv, node=node, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            output, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            process.kill()
            process.communicate()
            raise ClusterError(f"{' '.join(argv[:4])} did not end in {timeout_s:.0f} s inside the cluster") from error
        if process.returncode:
            raise ClusterError(f"{' '.join(argv[:4])} failed (exit {process.returncode}) inside the cluster:\n{errors}")
        return str(output)

    def _control_plane_pid(self) -> int:
        if not self.own:
            raise ClusterError(f"cluster '{self.name}' is the user's own: its network cannot be entered from here")
        return self._processes["controlplane"].pid

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

    def rejoin_node(self, node: str) -> None:
        """Start a lost node again, as after a reboot; returns when it is Ready and its GPUs are declared."""
        since = datetime.datetime.now(datetime.UTC)
        run, index = paths.run_folder(self.name), node.removeprefix("node-")
        module = [sys.executable, "-m", "tests.localcluster.controlplane", str(run), index]
        argv = [*within(self._control_plane_pid(), "-m", "-p", f"--wd={paths.REPOSITORY}"), *module]
        check(argv, what=f"starting {node} again")
        self._wait_for_nodes([node], since)

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
    def _settings(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((paths.run_folder(self.name) / "settings.json").read_text())
        return content

    def _wait_for_nodes(self, names: list[str], since: datetime.datetime | None) -> None:
        """Until they are Ready, by a heartbeat after `since`, with their GPUs.

        A kubelet that registers again may reset extended resources, so they are declared after its first heartbeat.
        """

        def ready(name: str) -> bool:
            conditions = self.get("node", name)["status"].get("conditions", ())
            condition = next(c for c in conditions if c["type"] == "Ready")
            heartbeat = datetime.datetime.fromisoformat(condition["lastHeartbeatTime"])
            return condition["status"] == "True" and (since is None or heartbeat > since)

        count = str(self._settings()["gpus_per_node"])
        patch = json.dumps({"status": {"capacity": {GPU: count}, "allocatable": {GPU: count}}})
        for name in names:
            self.wait_until(f"{name} is Ready", partial(ready, name), START_TIMEOUT_S)
            self.kubectl("patch", "node", name, "--subresource=status", "--type=merge", "-p", patch)


class Steps:
    """Prints what a start does, with the seconds since it began; the control plane writes its part into a file."""

    def __init__(self, console: Console, file: Path, started: float) -> None:
        self.console, self.file, self.started, self.told = console, file, started, 0

    def tell(self, step: str) -> None:
        self.console.print(f"  {time.monotonic() - self.started:5.1f} s  {step}", highlight=False)

    def follow(self) -> None:
        if self.file.exists():
            lines = self.file.read_text().splitlines()
            for line in lines[self.told :]:
                self.tell(line)
            self.told = len(lines)


def _free_port(wanted: int | None) -> int:
    if wanted is not None:
        finding = doctor.port(wanted)
        if not finding.ok:
            raise ClusterError(f"{finding.what}: {finding.found}. To do: {finding.cure}.")
        return wanted
    if doctor.port(DEFAULT_PORT).ok:
        return DEFAULT_PORT
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def _give_up_after(deadline: float, run: Path, what: str) -> None:
    if time.monotonic() > deadline:
        raise ClusterError(f"{what} did not start in {START_TIMEOUT_S} s; logs: {run}.failed/*.log")
    time.sleep(0.05)
