"""The operator as the chart installs it, with the rights that the chart gives it, on a real Kubernetes.

Pods of the services here never start (their images do not exist): what happens between operator and pods is tested on
running pods in tests/e2e, and on real sockets in tests/unit/control.
"""

import json
import zlib
from collections.abc import Callable, Iterator

import pytest
from rich.console import Console

from tests.localcluster.cluster import Cluster
from tests.localcluster.failure import ClusterError
from tests.unit.control.services import model_spec, service_wire

pytestmark = pytest.mark.cluster(needs="crd")

OPERATOR_NAMESPACE = "prism-operator-test"
TENANT, STRANGER = "operator-tenant", "operator-stranger"
CHILDREN = ("deployment", "service", "poddisruptionbudget", "networkpolicy")


@pytest.fixture(scope="module")
def operator(cluster: Cluster) -> Iterator[Cluster]:
    """Two replicas of the operator, let into the tenant's namespace and not into the stranger's."""
    repository, _, tag = cluster.image("operator", Console(stderr=True)).rpartition(":")
    for namespace in (TENANT, STRANGER):
        cluster.kubectl("create", "namespace", namespace)
        model = {"apiVersion": "moeprism.io/v1alpha1", "kind": "PrismModel", "spec": model_spec().to_wire()}
        apply(cluster, {**model, "metadata": {"name": "small-moe", "namespace": namespace}})
    cluster.helm(
        *("install", "prism-test", "helm/prism", "--namespace", OPERATOR_NAMESPACE, "--create-namespace"),
        *("--set", f"image.repository={repository},image.tag={tag},tenantNamespaces={{{TENANT}}}"),
        *("--set", "crds.install=false,replicas=2,operator.slowLoopSeconds=5", "--wait", "--timeout", "120s"),
    )
    try:
        yield cluster
    finally:
        cluster.helm("uninstall", "prism-test", "--namespace", OPERATOR_NAMESPACE)
        for namespace in (TENANT, STRANGER, OPERATOR_NAMESPACE):
            cluster.kubectl("delete", "namespace", namespace, "--wait=false")


@pytest.fixture
def service(operator: Cluster, request: pytest.FixtureRequest) -> Iterator[str]:
    """A PrismService of the test's own, with its children."""
    name = f"s{zlib.crc32(request.node.name.encode()):x}"
    apply_service(operator, name)
    eventually(operator, f"children of {name}", lambda: all(exists(operator, kind, name) for kind in CHILDREN))
    yield name
    operator.kubectl("delete", "prismservice", name, "-n", TENANT, "--ignore-not-found", "--wait=false")


def apply(cluster: Cluster, obj: dict) -> None:
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", input=json.dumps(obj))


def apply_service(cluster: Cluster, name: str, namespace: str = TENANT, **spec) -> None:
    metadata = {"name": name, "namespace": namespace}
    kind = {"apiVersion": "moeprism.io/v1alpha1", "kind": "PrismService"}
    apply(cluster, {**kind, "metadata": metadata, "spec": service_wire(**spec)})


def exists(cluster: Cluster, kind: str, name: str, namespace: str = TENANT) -> bool:
    return bool(cluster.get(kind, "-n", namespace, "--field-selector", f"metadata.name={name}")["items"])


def eventually(cluster: Cluster, what: str, ready: Callable[[], bool], timeout_s: float = 60) -> None:
    cluster.wait_until(what, ready, timeout_s)


def condition(cluster: Cluster, name: str, kind: str, namespace: str = TENANT) -> dict:
    status = cluster.get("prismservice", name, "-n", namespace).get("status", {})
    return next((c for c in status.get("conditions", []) if c["type"] == kind), {})


def replicas(cluster: Cluster, name: str) -> int:
    return cluster.get("deployment", name, "-n", TENANT)["spec"]["replicas"]


def versions(cluster: Cluster, name: str) -> dict[str, str]:
    """resourceVersion of what only the operator writes; a Deployment's and a budget's status have other writers."""
    found = {kind: cluster.get(kind, name, "-n", TENANT)["metadata"] for kind in CHILDREN}
    secret = cluster.get("secret", f"{name}-control-tls", "-n", TENANT)["metadata"]
    quiet = {kind: found[kind]["resourceVersion"] for kind in ("service", "networkpolicy")}
    generations = {kind: str(found[kind]["generation"]) for kind in ("deployment", "poddisruptionbudget")}
    return {**quiet, **generations, "secret": secret["resourceVersion"]}


def test_a_service_gets_its_children_owned_by_it_and_every_condition(operator, service):
    uid = operator.get("prismservice", service, "-n", TENANT)["metadata"]["uid"]
    for kind, name in [*((kind, service) for kind in CHILDREN), ("secret", f"{service}-control-tls")]:
        (owner,) = operator.get(kind, name, "-n", TENANT)["metadata"]["ownerReferences"]
        assert (owner["uid"], owner["controller"], owner["blockOwnerDeletion"]) == (uid, True, False)
    eventually(operator, "status", lambda: condition(operator, service, "Ready") != {})
    assert condition(operator, service, "Accepted")["status"] == "True"
    assert condition(operator, service, "Ready")["reason"] == "WaitingForReplicas"


def test_a_second_reconcile_writes_nothing(operator, service):
    eventually(operator, "status", lambda: condition(operator, service, "Ready") != {})
    before = versions(operator, service)
    apply_service(operator, service, disruption={"maxUnavailable": 2})
    budget = ("poddisruptionbudget", service, "-n", TENANT)
    eventually(operator, "the change", lambda: operator.get(*budget)["spec"]["maxUnavailable"] == 2)
    after = versions(operator, service)
    assert after.pop("poddisruptionbudget") != before.pop("poddisruptionbudget")
    assert after == before


def test_nothing_of_the_operator_is_written_into_a_service_but_its_status(operator, service):
    eventually(operator, "status", lambda: condition(operator, service, "Ready") != {})
    metadata = json.loads(
        operator.kubectl("get", "prismservice", service, "-n", TENANT, "-o", "json", "--show-managed-fields")
    )["metadata"]
    assert "finalizers" not in metadata
    assert "annotations" not in metadata
    writers = {(entry["manager"], entry.get("subresource", "")) for entry in metadata["managedFields"]}
    assert {subresource for manager, subresource in writers if manager == "prism-operator"} == {"status"}


def test_a_foreign_scale_of_the_deployment_is_put_back_and_reported(operator, service):
    operator.kubectl("scale", "deployment", service, "-n", TENANT, "--replicas=3")
    events = ("events", "-n", TENANT, "--field-selector", f"regarding.name={service},reason=ReplicasReverted")
    eventually(operator, "an event", lambda: bool(operator.get("events.v1.events.k8s.io", *events[1:])["items"]))
    assert replicas(operator, service) == 1


def test_replicas_of_an_external_owner_come_through_the_scale_subresource(operator, service):
    operator.kubectl("delete", "prismservice", service, "-n", TENANT)
    eventually(operator, "collection", lambda: not exists(operator, "deployment", service))
    apply_service(operator, service, replicas=1, scaling={"control": "External", "maxReplicas": 8})
    eventually(operator, "a Deployment", lambda: exists(operator, "deployment", service))
    operator.kubectl("scale", "prismservice", service, "-n", TENANT, "--replicas=2")
    eventually(operator, "two replicas", lambda: replicas(operator, service) == 2)


def test_a_spec_that_cannot_be_planned_says_what_would_work_and_touches_no_child(operator, service):
    before = versions(operator, service)
    apply_service(operator, service, budget={"min": "b999"}, disruption={"maxUnavailable": 2})
    eventually(operator, "refusal", lambda: condition(operator, service, "Accepted").get("status") == "False")
    refusal = condition(operator, service, "Accepted")
    assert refusal["reason"] == "UnknownOperatingPoint"
    assert "b500, b750, full" in refusal["message"]
    assert versions(operator, service) == before


def test_an_object_of_that_name_that_is_somebody_elses_is_left_alone(operator):
    name = "taken"
    port = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": TENANT}}
    apply(operator, {**port, "spec": {"ports": [{"port": 1234}]}})
    before = operator.get("service", name, "-n", TENANT)
    apply_service(operator, name)
    eventually(operator, "condition", lambda: condition(operator, name, "ScalingActive").get("status") == "False")
    assert condition(operator, name, "ScalingActive")["reason"] == "ConflictingOwner"
    assert operator.get("service", name, "-n", TENANT) == before
    operator.kubectl("delete", "prismservice", name, "-n", TENANT)


def test_a_namespace_that_did_not_let_the_operator_in_is_told_how_to(operator):
    apply_service(operator, "outside", namespace=STRANGER)
    kind = ("outside", "Accepted", STRANGER)
    eventually(operator, "condition", lambda: condition(operator, *kind).get("reason") == "NamespaceNotEnabled")
    assert "tenantNamespaces" in condition(operator, *kind)["message"]
    assert not exists(operator, "deployment", "outside", STRANGER)


def test_deleting_a_service_leaves_its_children_to_garbage_collection_even_without_an_operator(operator, service):
    operator.kubectl("scale", "deployment", "-n", OPERATOR_NAMESPACE, "--all", "--replicas=0")
    pods = ("pods", "-n", OPERATOR_NAMESPACE)
    eventually(operator, "no operator", lambda: operator.get(*pods)["items"] == [])
    try:
        operator.kubectl("delete", "prismservice", service, "-n", TENANT, "--timeout=20s")
        for kind in CHILDREN:
            eventually(operator, f"{kind} collected", lambda kind=kind: not exists(operator, kind, service), 90)
    finally:
        operator.kubectl("scale", "deployment", "-n", OPERATOR_NAMESPACE, "--all", "--replicas=2")
        operator.kubectl("rollout", "status", "deployment", "-n", OPERATOR_NAMESPACE, "--timeout=90s")


def holder(cluster: Cluster) -> str:
    try:
        return cluster.get("lease", "prism-operator", "-n", OPERATOR_NAMESPACE)["spec"].get("holderIdentity") or ""
    except ClusterError:
        return ""


def epoch(cluster: Cluster) -> int:
    fence = cluster.get("lease", "prism-fence", "-n", OPERATOR_NAMESPACE)
    return int(fence["metadata"]["annotations"]["moeprism.io/epoch"])


def test_a_standby_takes_over_from_a_killed_leader_with_a_higher_epoch(operator, service):
    eventually(operator, "a leader", lambda: holder(operator) != "")
    first, before = holder(operator), epoch(operator)
    operator.kubectl("delete", "pod", first.rpartition("_")[0], "-n", OPERATOR_NAMESPACE, "--force", "--grace-period=0")
    eventually(operator, "another leader", lambda: holder(operator) not in ("", first), 60)
    eventually(operator, "a higher epoch", lambda: epoch(operator) > before)
    apply_service(operator, service, disruption={"maxUnavailable": 3})
    budget = ("poddisruptionbudget", service, "-n", TENANT)
    eventually(operator, "the new leader's work", lambda: operator.get(*budget)["spec"]["maxUnavailable"] == 3)
