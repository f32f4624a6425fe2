"""The local cluster is a real Kubernetes: each line here is something that a mock would get wrong."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.localcluster import binaries, images, paths, plugin
from tests.localcluster.cluster import GPU, Cluster
from tests.localcluster.failure import ClusterError
from tests.localcluster.process import within
from tests.localcluster.running import leftovers, recorded

pytestmark = pytest.mark.cluster("nodes=2")

WIDGETS = """
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: widgets.harness.example}
spec:
  group: harness.example
  scope: Namespaced
  names: {kind: Widget, plural: widgets, singular: widget}
  versions:
  - name: v1
    served: true
    storage: true
    subresources: {status: {}}
    schema:
      openAPIV3Schema:
        type: object
        properties:
          spec:
            type: object
            x-kubernetes-validations:
            - {rule: "self.low <= self.high", message: "low must not exceed high"}
            properties:
              low: {type: integer, default: 1}
              high: {type: integer}
          status:
            type: object
            properties: {seen: {type: integer}}
"""


def widget(name: str, **spec: object) -> str:
    metadata = {"name": name}
    body = {"apiVersion": "harness.example/v1", "kind": "Widget", "metadata": metadata, "spec": spec}
    return json.dumps(body | {"status": {"seen": 7}})


@pytest.fixture(scope="module")
def widgets(cluster: Cluster) -> None:
    cluster.kubectl("apply", "-f", "-", input=WIDGETS)
    cluster.kubectl("wait", "crd/widgets.harness.example", "--for=condition=Established", "--timeout=30s")
    cluster.wait_until("widgets are served", lambda: cluster.get("widgets", "-A")["items"] == [])


def restricted_pod(image: str, name: str, labels: dict[str, str] | None = None, **pod: Any) -> dict[str, Any]:
    """A Pod that Pod Security `restricted` admits."""
    context = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "readOnlyRootFilesystem": True}
    container = {"name": "main", "image": image, "securityContext": context} | dict(pod.pop("container", {}))
    profile = {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}}
    spec = {"containers": [container], "securityContext": profile, "terminationGracePeriodSeconds": 1} | pod
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels or {}}, "spec": spec}


def test_a_custom_resource_is_defaulted_pruned_and_loses_its_status_on_create(
    cluster: Cluster, namespace: str, widgets: None
) -> None:
    cluster.kubectl("create", "-n", namespace, "-f", "-", "--validate=false", input=widget("w", high=3, unknown=1))
    stored = cluster.get("widget", "w", "-n", namespace)
    assert stored["spec"] == {"low": 1, "high": 3}
    assert "status" not in stored


def test_a_wrong_type_and_a_broken_rule_are_refused(cluster: Cluster, namespace: str, widgets: None) -> None:
    with pytest.raises(ClusterError, match="must be of type integer"):
        cluster.kubectl("create", "-n", namespace, "-f", "-", "--validate=false", input=widget("w", high="three"))
    with pytest.raises(ClusterError, match="low must not exceed high"):
        cluster.kubectl("create", "-n", namespace, "-f", "-", input=widget("w", low=5, high=3))


def test_a_status_write_leaves_the_generation_and_a_stale_replace_conflicts(
    cluster: Cluster, namespace: str, widgets: None
) -> None:
    cluster.kubectl("create", "-n", namespace, "-f", "-", input=widget("w", high=3))
    before = cluster.get("widget", "w", "-n", namespace)
    patch = ("patch", "widget", "w", "-n", namespace, "--type=merge")
    cluster.kubectl(*patch, "--subresource=status", "-p", '{"status":{"seen":1}}')
    after = cluster.get("widget", "w", "-n", namespace)
    assert (after["status"], after["metadata"]["generation"]) == ({"seen": 1}, before["metadata"]["generation"])
    with pytest.raises(ClusterError, match="the object has been modified"):
        cluster.kubectl("replace", "-n", namespace, "-f", "-", input=json.dumps(before))


def test_a_pod_runs_restricted_with_an_image_volume_and_a_gpu(cluster: Cluster, namespace: str) -> None:
    volume = {"name": "data", "image": {"reference": images.coredns().reference}}
    container = {
        "resources": {"limits": {"nvidia.com/gpu": "2"}},
        "volumeMounts": [{"name": "data", "mountPath": "/data", "readOnly": True}],
    }
    pod = restricted_pod(images.pause().reference, "holder", container=container, volumes=[volume])
    cluster.kubectl("create", "-n", namespace, "-f", "-", input=json.dumps(pod))
    cluster.kubectl("wait", "-n", namespace, "pod/holder", "--for=condition=Ready", "--timeout=60s")
    assert cluster.container_pid(namespace, "holder") > 0


def test_a_service_is_reached_by_name_and_its_logs_are_read(cluster: Cluster, namespace: str) -> None:
    arguments = {"args": ["-dns.port", "1053"], "ports": [{"containerPort": 1053, "protocol": "UDP"}]}
    pod = restricted_pod(images.coredns().reference, "server", {"app": "server"}, container=arguments)
    ports = [{"port": 1053, "protocol": "UDP"}]
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "server"},
        "spec": {"selector": {"app": "server"}, "ports": ports},
    }
    cluster.kubectl("create", "-n", namespace, "-f", "-", input=json.dumps(pod))
    cluster.kubectl("create", "-n", namespace, "-f", "-", input=json.dumps(service))
    cluster.kubectl("wait", "-n", namespace, "pod/server", "--for=condition=Ready", "--timeout=60s")
    address = cluster.get("service", "server", "-n", namespace)["spec"]["clusterIP"]
    ask = (
        "import socket, struct, sys; name = sys.argv[1]; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM);"
        "s.settimeout(2); q = b''.join(bytes([len(p)]) + p.encode() for p in name.split('.')) + b'\\0';"
        "s.sendto(struct.pack('>6H', 1, 0x100, 1, 0, 0, 0) + q + struct.pack('>2H', 1, 1), ('10.96.0.10', 53));"
        "print('.'.join(map(str, s.recv(512)[-4:])))"
    )

    def resolved() -> bool:
        argv = ["python3", "-c", ask, f"server.{namespace}.svc.cluster.local"]
        process = cluster.inside(argv, node="node-1", stdout=-1, stderr=-1, text=True)
        return bool(process.communicate(timeout=30)[0].strip() == address)

    cluster.wait_until("DNS answers with the Service's address", resolved, timeout_s=60)
    assert "CoreDNS" in cluster.kubectl("logs", "-n", namespace, "server")


@pytest.fixture(scope="module")
def own_cluster() -> Iterator[Cluster]:
    """A small cluster that tests may break, beside the shared one."""
    started = Cluster.up("selftest", nodes=1, gpus_per_node=3)
    yield started
    started.down()


def records_of_containers(cluster: Cluster) -> str:
    """What containerd of the first node remembers: containers and sandboxes."""
    enter = within(cluster.node_pid("node-0"), "-m")
    ctr = [*enter, str(binaries.path("ctr")), "-a", "/run/containerd/containerd.sock", "-n", "k8s.io"]
    listed = [
        subprocess.run([*ctr, kind, "ls"], capture_output=True, text=True, check=True).stdout.splitlines()[1:]
        for kind in ("containers", "sandboxes")
    ]
    return "\n".join(line for lines in listed for line in lines)


def run_a_pod(cluster: Cluster) -> dict[str, Any]:
    pod = restricted_pod(images.pause().reference, "holder")
    cluster.kubectl("create", "-f", "-", input=json.dumps(pod))
    cluster.kubectl("wait", "pod/holder", "--for=condition=Ready", "--timeout=60s")
    found: dict[str, Any] = cluster.get("pod", "holder")
    return found


def test_a_lost_node_rejoins_with_its_gpus_and_without_its_old_containers(own_cluster: Cluster) -> None:
    before = run_a_pod(own_cluster)["status"]["containerStatuses"][0]["containerID"].removeprefix("containerd://")
    assert before in records_of_containers(own_cluster)
    own_cluster.crash_node("node-0")
    own_cluster.rejoin_node("node-0")

    def started_anew() -> bool:
        status = own_cluster.get("pod", "holder")["status"]["containerStatuses"][0]
        return bool(status["state"].get("running")) and status["containerID"] != f"containerd://{before}"

    own_cluster.wait_until("the Pod runs in a new container", started_anew, timeout_s=60)
    assert before not in records_of_containers(own_cluster)
    assert own_cluster.get("node", "node-0")["status"]["allocatable"][GPU] == "3"


def test_a_start_after_sigkill_ends_the_stale_run_keeps_images_and_forgets_containers(own_cluster: Cluster) -> None:
    if not own_cluster.get("pods")["items"]:
        run_a_pod(own_cluster)
    held = own_cluster.get("pod", "holder")["status"]["containerStatuses"][0]["containerID"].removeprefix(
        "containerd://"
    )
    stale = recorded(paths.run_folder("selftest"))["controlplane"]
    stale.kill()
    with pytest.raises(ClusterError, match="no cluster 'selftest' is running"):
        Cluster.attach("selftest")
    again = Cluster.up("selftest", nodes=1)
    assert again.get("pods")["items"] == []
    assert held not in records_of_containers(again)
    run_a_pod(again)
    told = [event["message"] for event in again.get("events")["items"] if event["reason"] == "Pulled"]
    assert any("already present on machine" in message for message in told), told


def test_an_interrupted_start_and_a_stop_leave_nothing() -> None:
    argv = [sys.executable, "-m", "tests.localcluster", "up", "--name", "interrupted", "--nodes", "1"]

    def hear_ctrl_c() -> None:
        """A job that a shell started in the background ignores SIGINT, and so would its children."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "preexec_fn": hear_ctrl_c}
    with subprocess.Popen(argv, cwd=paths.REPOSITORY, **options) as start:
        assert start.stderr is not None
        first_step = start.stderr.readline()
        start.send_signal(signal.SIGINT)
        assert start.wait(timeout=60) == 130, first_step
    assert "etcd serves" in first_step
    assert leftovers("interrupted") == []


@pytest.mark.parametrize(("in_ci", "outcome"), [(True, pytest.fail.Exception), (False, pytest.skip.Exception)])
def test_a_missing_cluster_fails_in_ci_and_skips_elsewhere(
    in_ci: bool, outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", "true" if in_ci else "")
    with pytest.raises(outcome, match="no root"):
        plugin.unavailable("no root; run it as root")


def test_a_marker_tells_what_the_cluster_lacks(cluster: Cluster) -> None:
    assert plugin.lacking(cluster, ("crd", "own", "nodes=2")) == []
    assert plugin.lacking(cluster, ("nodes=99", "gpus=8")) == ["nodes=99"]
