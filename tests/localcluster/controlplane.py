"""Pid 1 of the control plane's namespaces: etcd, API server, controller manager, scheduler, registry, and the nodes.

    python -m tests.localcluster.controlplane RUN_FOLDER [NODE_INDEX]

Started by cluster.py; with a node's index it only joins that node, from inside the namespaces of a control plane that
runs. Else it writes `ready` when the API server serves and every node process runs, and reaps orphans until
it is killed; SIGKILL to it ends every process, address, mount and rule of the cluster at once.
"""

import json
import os
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from tests.localcluster import binaries, network, paths
from tests.localcluster.failure import ClusterError
from tests.localcluster.process import child_of, isolated

START_TIMEOUT_S = 90
"""Generous, because other work may share the cores; an idle machine needs about eight seconds in all."""


class ControlPlane:
    def __init__(self, run: Path) -> None:
        self.run = run
        self.settings = json.loads((run / "settings.json").read_text())
        self.pki = run / "pki"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.tls = ssl.create_default_context(cafile=str(self.pki / "ca.crt"))
        self.tls.load_cert_chain(self.pki / "admin.crt", self.pki / "admin.key")
        self.api = f"https://{network.HOST}:{network.API_PORT}"

    def start(self) -> None:
        self._network()
        self._etcd()
        self._told("etcd serves")
        self._apiserver()
        self._told("API server is ready")
        self._install_crds()
        self._controllers()
        self._registry()
        self._told("controllers, scheduler and registry run")
        for index in range(self.settings["nodes"]):
            self.join(index)
        (self.run / "ready").touch()

    def _told(self, step: str) -> None:
        with (self.run / "steps").open("a") as steps:
            steps.write(f"{step}\n")

    def _network(self) -> None:
        # Without a default route a Service address is "unreachable" before NAT sees it.
        for command in (
            "mount --make-rshared /",
            "ip link set lo up",
            "ip link add lan0 type bridge",
            f"ip addr add {network.HOST}/24 dev lan0",
            "ip link set lan0 up",
            "ip route add default dev lan0",
        ):
            subprocess.run(command.split(), check=True)

    def _spawn(self, name: str, *argv: str | Path) -> None:
        log = (self.run / f"{name}.log").open("ab")
        self.processes[name] = subprocess.Popen([str(a) for a in argv], stdout=log, stderr=subprocess.STDOUT)

    def _get(self, url: str) -> bytes:
        context = self.tls if url.startswith("https") else None
        with urllib.request.urlopen(url, timeout=5, context=context) as answer:
            content: bytes = answer.read()
        return content

    def _wait(self, what: str, ready: Callable[[], bool]) -> None:
        deadline, last = time.monotonic() + START_TIMEOUT_S, "no answer yet"
        while time.monotonic() < deadline:
            for name, process in self.processes.items():
                if process.poll() is not None:
                    raise ClusterError(f"{name} ended with {process.returncode}; its log: {self.run / name}.log")
            try:
                if ready():
                    return
                last = "not ready"
            except (OSError, ValueError) as error:
                last = repr(error)
            time.sleep(0.05)
        raise ClusterError(f"{what} was not ready after {START_TIMEOUT_S} s; last seen: {last}; logs: {self.run}/*.log")

    def _etcd(self) -> None:
        self._spawn(
            "etcd",
            binaries.path("etcd"),
            f"--data-dir={self.run}/etcd",
            "--unsafe-no-fsync",
            *("--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379"),
            "--listen-peer-urls=http://127.0.0.1:2380",
        )
        self._wait("etcd", lambda: b"true" in self._get("http://127.0.0.1:2379/health"))

    def _apiserver(self) -> None:
        pki = self.pki
        self._spawn(
            "apiserver",
            binaries.path("kube-apiserver"),
            "--etcd-servers=http://127.0.0.1:2379",
            *("--bind-address=0.0.0.0", f"--secure-port={network.API_PORT}", f"--advertise-address={network.HOST}"),
            f"--service-cluster-ip-range={network.SERVICES}",
            *("--allow-privileged=true", "--profiling=false", f"--cert-dir={self.run}/apiserver"),
            *(f"--tls-cert-file={pki}/apiserver.crt", f"--tls-private-key-file={pki}/apiserver.key"),
            *(f"--client-ca-file={pki}/ca.crt", "--authorization-mode=Node,RBAC"),
            "--enable-admission-plugins=NodeRestriction",
            *(f"--service-account-key-file={pki}/sa.pub", f"--service-account-signing-key-file={pki}/sa.key"),
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
            f"--kubelet-client-certificate={pki}/apiserver-kubelet-client.crt",
            f"--kubelet-client-key={pki}/apiserver-kubelet-client.key",
            *(f"--kubelet-certificate-authority={pki}/ca.crt", "--kubelet-preferred-address-types=InternalIP"),
            f"--proxy-client-cert-file={pki}/front-proxy-client.crt",
            f"--proxy-client-key-file={pki}/front-proxy-client.key",
            *(f"--requestheader-client-ca-file={pki}/ca.crt", "--requestheader-allowed-names=front-proxy-client"),
            "--requestheader-extra-headers-prefix=X-Remote-Extra-",
            *("--requestheader-group-headers=X-Remote-Group", "--requestheader-username-headers=X-Remote-User"),
            # A lost node's Pods are replaced after seconds instead of minutes, so that tests can wait for it.
            *("--default-not-ready-toleration-seconds=5", "--default-unreachable-toleration-seconds=5"),
        )
        self._wait("the API server", lambda: self._get(f"{self.api}/readyz") == b"ok")

    def _install_crds(self) -> None:
        """Before the controller manager: its garbage collector learns of a later CRD only at a 30 s resync."""
        for path in self.settings["crds"]:
            argv = [binaries.path("kubectl"), f"--kubeconfig={self.pki}/admin.kubeconfig", "apply", "--server-side"]
            environment = os.environ | {"KUBECACHEDIR": str(self.run / "kubectl-cache")}
            subprocess.run([*map(str, argv), "-f", path], check=True, stdout=subprocess.DEVNULL, env=environment)

    def _controllers(self) -> None:
        pki = self.pki
        manager = (
            "--use-service-account-credentials=true",
            f"--service-account-private-key-file={pki}/sa.key",
            f"--root-ca-file={pki}/ca.crt",
            *(f"--cluster-signing-cert-file={pki}/ca.crt", f"--cluster-signing-key-file={pki}/ca.key"),
            *(f"--cluster-cidr={network.PODS}", "--allocate-node-cidrs=false"),
            *("--node-monitor-period=2s", "--node-monitor-grace-period=12s"),
        )
        for name, binary, extra in (
            ("kcm", "kube-controller-manager", manager),
            ("scheduler", "kube-scheduler", ()),
        ):
            flags = ("kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig")
            self._spawn(
                name,
                binaries.path(binary),
                *(f"--{flag}={pki}/{name}.kubeconfig" for flag in flags),
                *("--leader-elect=false", "--bind-address=127.0.0.1", f"--cert-dir={self.run}/{name}", *extra),
            )

    def _registry(self) -> None:
        config = self.run / "registry.json"
        storage = {"filesystem": {"rootdirectory": str(paths.registry_store())}}
        address = {"addr": f"{network.HOST}:{network.REGISTRY_PORT}"}
        config.write_text(json.dumps({"version": 0.1, "storage": storage, "http": address, "log": {"level": "warn"}}))
        self._spawn("registry", "docker-registry", "serve", config)
        self._wait("the registry", lambda: self._get(f"http://{network.HOST}:{network.REGISTRY_PORT}/v2/") is not None)

    def join(self, index: int) -> None:
        """Start a node, or start one again that was lost."""
        name = network.node_name(index)
        folder = self.run / name
        folder.mkdir(exist_ok=True)
        for stale in ("waiting", "connected", "pid"):
            (folder / stale).unlink(missing_ok=True)
        module = [sys.executable, "-m", "tests.localcluster.node", str(self.run), str(index)]
        self._spawn(name, *isolated("--uts"), *module)
        link = f"n{index}"
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (folder / "waiting").exists() or link in [name for _, name in socket.if_nameindex()]:
            if time.monotonic() > deadline or self.processes[name].poll() is not None:
                raise ClusterError(f"{name} did not start; its log: {self.run / name}.log")
            time.sleep(0.02)
        inside = child_of(self.processes[name].pid)
        for command in (
            f"ip link add {link} type veth peer name eth0 netns {inside}",
            f"ip link set {link} master lan0 up",
            f"ip route replace {network.pod_range(index)} via {network.node_address(index)}",
        ):
            subprocess.run(command.split(), check=True)
        # Pids as this namespace counts them; cluster.py translates them.
        (folder / "pid").write_text(str(inside))
        (folder / "connected").touch()


def main() -> None:
    control_plane = ControlPlane(Path(sys.argv[1]))
    if sys.argv[2:]:
        control_plane.join(int(sys.argv[2]))
        return
    try:
        control_plane.start()
    except (ClusterError, subprocess.CalledProcessError, urllib.error.URLError) as error:
        (control_plane.run / "failed").write_text(str(error))
        sys.exit(1)
    while True:  # pid 1 reaps what its nodes leave behind
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            time.sleep(1)


if __name__ == "__main__":
    main()
