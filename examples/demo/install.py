"""Puts the operator and the demo's service on a cluster, with the commands a user would type."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from examples.demo import manifests
from prism_api.model import PrismModelSpec
from tests.localcluster import paths
from tests.localcluster.cluster import Cluster
from tests.localcluster.failure import ClusterError

RELEASE, OPERATOR_NAMESPACE = "prism", "prism-system"
CHART = paths.REPOSITORY / "helm" / "prism"
READY_WITHIN_S, GONE_WITHIN_S = 240, 120
Object = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Images:
    """References that the cluster can pull."""

    operator: str
    runtime: str
    model: str


def install_operator(cluster: Cluster, image: str) -> None:
    """Namespaces under Pod Security `restricted`, and the chart. Idempotent."""
    for namespace in (OPERATOR_NAMESPACE, _namespace()):
        cluster.wait_until(
            f"an earlier namespace {namespace} is gone", partial(_usable, cluster, namespace), GONE_WITHIN_S
        )
        labels = {"pod-security.kubernetes.io/enforce": "restricted"}
        metadata = {"name": namespace, "labels": labels}
        _apply(cluster, {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
        cluster.wait_for_namespace(namespace)
    repository, tag = image.rsplit(":", 1)
    cluster.helm(
        *("upgrade", "--install", RELEASE, str(CHART), "-n", OPERATOR_NAMESPACE, "--wait", "--timeout", "180s"),
        *("--take-ownership", "--force-conflicts"),
        *("--set", f"image.repository={repository},image.tag={tag},replicas=1"),
        *("--set", f"tenantNamespaces={{{_namespace()}}},operator.slowLoopSeconds={manifests.SLOW_LOOP_S}"),
    )


def uninstall(cluster: Cluster) -> None:
    """Everything but the CRDs and the cluster; returns when the namespaces are gone, so that an install may follow."""
    cluster.kubectl("delete", "namespace", _namespace(), "--ignore-not-found", f"--timeout={GONE_WITHIN_S}s")
    cluster.helm("uninstall", RELEASE, "-n", OPERATOR_NAMESPACE, "--ignore-not-found")
    cluster.kubectl("delete", "namespace", OPERATOR_NAMESPACE, "--ignore-not-found", f"--timeout={GONE_WITHIN_S}s")


def apply_model(cluster: Cluster, image: str) -> PrismModelSpec:
    model = manifests.model(image)
    _apply(cluster, model)
    return PrismModelSpec.model_validate(model["spec"])


def start_services(cluster: Cluster, services: Iterable[Object]) -> None:
    """Apply PrismServices, and wait until each is Ready with its fewest replicas and these follow the operator."""
    services = list(services)
    for service in services:
        _apply(cluster, service)
    for service in services:
        name, fewest = service["metadata"]["name"], service["spec"]["scaling"]["minReplicas"]
        cluster.wait_until(
            f"psvc/{name} is Ready with {fewest} replica(s) that follow the operator",
            partial(_settled, cluster, name, fewest),
            READY_WITHIN_S,
        )


def _settled(cluster: Cluster, name: str, replicas: int) -> bool:
    status = cluster.get("psvc", name, "-n", _namespace())["status"]
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in status["conditions"])
    seen = {
        "replicas": status["replicas"],
        "readyReplicas": status["readyReplicas"],
        "ackedReplicas": status["budget"]["ackedReplicas"],
    }
    if not ready or set(seen.values()) != {replicas}:
        raise ClusterError(f"Ready is {ready}, {', '.join(f'{key} {count}' for key, count in seen.items())}")
    return True


def end_service(cluster: Cluster, service: Object) -> None:
    """Delete a PrismService and do not wait for its pods, which drain."""
    name = service["metadata"]["name"]
    cluster.kubectl("delete", "psvc", name, "-n", _namespace(), "--ignore-not-found", "--wait=false")


def service_url(cluster: Cluster, service: Object) -> str:
    """The Service's cluster address, which a node reaches through its kube-proxy."""
    spec = cluster.get("service", service["metadata"]["name"], "-n", _namespace())["spec"]
    return f"http://{spec['clusterIP']}:{spec['ports'][0]['port']}"


def _apply(cluster: Cluster, document: Object) -> None:
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", input=json.dumps(document))


def _usable(cluster: Cluster, namespace: str) -> bool:
    """Absent or active: what is created in a namespace that ends is refused."""
    listed = cluster.get("namespaces", f"--field-selector=metadata.name={namespace}")["items"]
    return all(item["status"]["phase"] == "Active" for item in listed)


def _namespace() -> str:
    namespace: str = manifests.service()["metadata"]["namespace"]
    return namespace
