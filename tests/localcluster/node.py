"""Pid 1 of a node's namespaces: containerd, kubelet, kube-proxy. SIGKILL to it is a real node loss.

python -m tests.localcluster.node RUN_FOLDER INDEX
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.localcluster import binaries, cgroups, images, network, paths
from tests.localcluster.failure import ClusterError
from tests.localcluster.process import check

SOCKET = "/run/containerd/containerd.sock"
"""/run is the node's own tmpfs, so every node may use the same path."""
START_TIMEOUT_S = 60
OWN_FOLDERS = ("/run", "/var/log", "/var/lib/kubelet", "/var/lib/cni", "/etc/cni")
"""Fixed paths of kubelet (its device plugin socket), CNI and containerd: nodes must share them neither with each other
nor with a Kubernetes that the machine itself runs."""


class Node:
    def __init__(self, run: Path, index: int) -> None:
        settings = json.loads((run / "settings.json").read_text())
        self.run, self.index, self.count = run, index, settings["nodes"]
        self.name, self.address = network.node_name(index), network.node_address(index)
        self.here = run / self.name
        self.store = paths.node_store(settings["name"], self.name)
        self.cgroup = f"{cgroups.root(settings['name'])}/{self.name}"
        self.environment = os.environ | {"PATH": binaries.search_path()}  # containerd finds its shim there

    def start(self) -> None:
        shutil.rmtree(self.here / "ipam", ignore_errors=True)  # addresses of Pods that a lost node took with it
        (self.here / "waiting").touch()
        while not (self.here / "connected").exists():
            time.sleep(0.02)
        self._network()
        cgroups.make(self.cgroup)
        self._containerd()
        self._kubelet()
        self._kube_proxy()

    def _sh(self, *commands: str) -> None:
        for command in commands:
            subprocess.run(command.split(), check=True)

    def _spawn(self, name: str, *argv: str | Path) -> subprocess.Popen[bytes]:
        log = (self.here / f"{name}.log").open("ab")
        return subprocess.Popen([str(a) for a in argv], stdout=log, stderr=subprocess.STDOUT, env=self.environment)

    def _network(self) -> None:
        for folder in OWN_FOLDERS:
            Path(folder).mkdir(parents=True, exist_ok=True)
        self._sh(
            f"hostname {self.name}",
            "mount --make-rshared /",
            *(f"mount -t tmpfs tmpfs {folder}" for folder in OWN_FOLDERS),
            "mount --make-rshared /run",
            "ip link set lo up",
            f"ip addr add {self.address}/24 dev eth0",
            "ip link set eth0 up",
            f"ip route add default via {network.HOST}",
        )
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        for other in set(range(self.count)) - {self.index}:
            self._sh(f"ip route add {network.pod_range(other)} via {network.node_address(other)}")
        bridge = {
            "type": "bridge",
            "bridge": "cni0",
            "isGateway": True,
            "ipMasq": False,
            "hairpinMode": True,
            "ipam": {
                "type": "host-local",
                "dataDir": str(self.here / "ipam"),
                "ranges": [[{"subnet": network.pod_range(self.index)}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        }
        ports = {"type": "portmap", "capabilities": {"portMappings": True}, "snat": False}
        (self.here / "cni").mkdir(exist_ok=True)
        (self.here / "cni/10-bridge.conflist").write_text(
            json.dumps({"cniVersion": "1.0.0", "name": "bridge", "plugins": [bridge, ports]})
        )

    def _containerd(self) -> None:
        registry = f"http://{network.HOST}:{network.REGISTRY_PORT}"
        hosts = self.here / "certs.d" / paths.REGISTRY_NAME
        hosts.mkdir(parents=True, exist_ok=True)
        (hosts / "hosts.toml").write_text(
            f'server = "{registry}"\n[host."{registry}"]\n  capabilities = ["pull", "resolve"]\n'
        )
        self.store.mkdir(parents=True, exist_ok=True)
        self._forget_earlier_containers()
        config = self._containerd_config(disabled=("io.containerd.nri.v1.nri",))
        self._serve(self._spawn("containerd", binaries.path("containerd"), "-c", config))

    def _containerd_config(self, disabled: tuple[str, ...]) -> Path:
        config = self.here / "containerd.toml"
        config.write_text(f"""
version = 3
root = "{self.store}"
state = "/run/containerd"
disabled_plugins = {json.dumps(disabled)}
[grpc]
  address = "{SOCKET}"
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "overlayfs"
  discard_unpacked_layers = true      # the image store keeps no second, compressed copy
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "{images.pause().reference}"
  [plugins."io.containerd.cri.v1.images".registry]
    config_path = "{self.here}/certs.d"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true       # CAP_SYS_RESOURCE may be missing
  disable_apparmor = true
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["/usr/lib/cni"]
    conf_dir = "{self.here}/cni"
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
      BinaryName = "/usr/sbin/runc"
      SystemdCgroup = false
""")
        return config

    def _serve(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while subprocess.run([*self._ctr(), "version"], capture_output=True, check=False).returncode:
            if process.poll() is not None or time.monotonic() > deadline:
                raise ClusterError(f"containerd of {self.name} did not start; its log: {self.here}/containerd.log")
            time.sleep(0.05)

    def _ctr(self) -> list[str]:
        return [str(binaries.path("ctr")), "-a", SOCKET, "-n", "k8s.io"]

    def _ask(self, *arguments: str) -> str:
        return check([*self._ctr(), *arguments], what=f"ctr {' '.join(arguments[:2])} on {self.name}")

    def _forget_earlier_containers(self) -> None:
        """Images survive in the store, and so would the records of containers that a stop has killed.

        containerd without its CRI plugin removes them, with their snapshots; with the plugin they would come back as
        Pods of a cluster that no longer exists.
        """
        if not (self.store / "io.containerd.metadata.v1.bolt").exists():
            return
        config = self._containerd_config(disabled=("io.containerd.nri.v1.nri", "io.containerd.grpc.v1.cri"))
        process = self._spawn("containerd", binaries.path("containerd"), "-c", config)
        self._serve(process)
        if containers := self._ask("containers", "ls", "-q").split():
            self._ask("containers", "rm", *containers)
        for line in self._ask("sandboxes", "ls").splitlines()[1:]:
            self._ask("sandboxes", "rm", "--force", line.split()[0])
        self._remove_superseded_images()
        process.terminate()
        process.wait(timeout=START_TIMEOUT_S)
        shutil.rmtree(self.store / "io.containerd.grpc.v1.cri", ignore_errors=True)

    def _remove_superseded_images(self) -> None:
        """Older images of the project: 6 GB each, unless they share layers with the current ones.

        Those are what a pull starts from, so nothing goes before the current ones are here.
        """
        listed = [line.split() for line in self._ask("images", "ls").splitlines()[1:]]
        current = images.current_references()
        kept = {digest for reference, _, digest, *_ in listed if reference in current}
        superseded = [reference for reference, _, digest, *_ in listed if digest not in kept]
        if superseded and any(reference == images.runtime().reference for reference, *_ in listed):
            self._ask("images", "rm", "--sync", *superseded)

    def _kubelet(self) -> None:
        pki = self.run / "pki"
        (self.here / "resolv.conf").write_text("nameserver 127.0.0.1\n")
        config = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "failCgroupV1": False,
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self.cgroup}",
            "enforceNodeAllocatable": [],
            "featureGates": {"KubeletInUserNamespace": True},
            "oomScoreAdj": 0,
            "failSwapOn": False,
            "localStorageCapacityIsolation": False,
            "evictionHard": {"memory.available": "100Mi"},
            "imageGCHighThresholdPercent": 100,
            "imageGCLowThresholdPercent": 99,
            "containerRuntimeEndpoint": f"unix://{SOCKET}",
            "address": self.address,
            "healthzBindAddress": "127.0.0.1",
            "serializeImagePulls": False,
            "nodeStatusUpdateFrequency": "3s",
            "nodeLeaseDurationSeconds": 12,
            "clusterDNS": [network.DNS_SERVICE],
            "clusterDomain": "cluster.local",
            "resolvConf": str(self.here / "resolv.conf"),
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(pki / "ca.crt")},
            },
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": str(pki / f"kubelet-{self.index}.crt"),
            "tlsPrivateKeyFile": str(pki / f"kubelet-{self.index}.key"),
            "podLogsDir": str(self.here / "podlogs"),
            "volumePluginDir": str(self.here / "volumeplugins"),
            "makeIPTablesUtilChains": False,
        }
        (self.here / "kubelet.json").write_text(json.dumps(config))
        self._spawn(
            "kubelet",
            binaries.path("kubelet"),
            f"--config={self.here}/kubelet.json",
            f"--kubeconfig={pki}/kubelet-{self.index}.kubeconfig",
            f"--root-dir={self.here}/kubelet",
            f"--node-ip={self.address}",
            f"--hostname-override={self.name}",
        )

    def _kube_proxy(self) -> None:
        config = {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": "nftables",
            "clusterCIDR": network.PODS,
            "clientConnection": {"kubeconfig": f"{self.run}/pki/kube-proxy.kubeconfig"},
            "hostnameOverride": self.name,
            "bindAddress": self.address,
            "conntrack": {"maxPerCore": 0},
            "healthzBindAddress": "127.0.0.1:10256",
            "metricsBindAddress": "127.0.0.1:10249",
        }
        (self.here / "kube-proxy.json").write_text(json.dumps(config))
        self._spawn("kube-proxy", binaries.path("kube-proxy"), f"--config={self.here}/kube-proxy.json")


def main() -> None:
    node = Node(Path(sys.argv[1]), int(sys.argv[2]))
    try:
        node.start()
    except (ClusterError, subprocess.SubprocessError, OSError) as error:
        sys.exit(f"{node.name}: {error}")
    while True:  # pid 1 reaps the shims' orphans
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            time.sleep(1)


if __name__ == "__main__":
    main()
