"""The chart's roles on the real authorizer: what the operator and a namespace's admin may do, and what not."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.manifests import prism_service
from tests.localcluster.cluster import Cluster
from tests.localcluster.failure import ClusterError

pytestmark = pytest.mark.cluster("crd")

CHART = Path(__file__).parents[2] / "helm/prism"


@dataclass(frozen=True)
class Release:
    """An installed chart; `tenant` let the operator in, `stranger` did not."""

    cluster: Cluster
    prefix: str
    namespace: str
    tenant: str
    stranger: str

    @property
    def operator(self) -> str:
        return f"system:serviceaccount:{self.namespace}:{self.prefix}-operator"

    def can(self, user: str, verb: str, resource: str, namespace: str, *flags: str) -> bool:
        """The authorizer's answer for a user."""
        arguments = ("auth", "can-i", verb, resource, "-n", namespace, f"--as={user}", "--quiet", *flags)
        try:
            self.cluster.kubectl(*arguments)
        except ClusterError:
            return False
        return True

    def bind(self, user: str, name: str, role: str, subject: str) -> None:
        """Create a RoleBinding in the stranger's namespace as a user."""
        arguments = ("create", "rolebinding", name, "-n", self.stranger, f"--clusterrole={role}", f"--as={user}")
        self.cluster.kubectl(*arguments, subject)


@pytest.fixture
def release(cluster: Cluster, namespace: str) -> Iterator[Release]:
    """The chart in a namespace that enforces Pod Security `restricted`; the CRDs are the session's."""
    prefix, tenant, stranger = f"prism-{namespace}", f"{namespace}-tenant", f"{namespace}-stranger"
    for name in (tenant, stranger):
        cluster.kubectl("create", "namespace", name)
    values = ("--set", "crds.install=false", "--set", f"tenantNamespaces={{{tenant}}}")
    try:
        cluster.helm("install", prefix, str(CHART), "-n", namespace, *values)
        yield Release(cluster, prefix, namespace, tenant, stranger)
        cluster.helm("uninstall", prefix, "-n", namespace)
    finally:
        cluster.kubectl("delete", "namespace", tenant, stranger, "--wait=false")


def test_the_operator_works_in_a_tenants_namespace_and_reads_no_secret_outside(release: Release) -> None:
    def allowed(resource: str, namespace: str, verb: str = "get", *flags: str) -> bool:
        return release.can(release.operator, verb, resource, namespace, *flags)

    assert allowed("prismservices.moeprism.io", release.stranger, "watch")
    assert allowed("prismservices.moeprism.io", release.stranger, "patch", "--subresource=status")
    assert not allowed("prismservices.moeprism.io", release.tenant, "update")
    assert allowed("deployments.apps", release.tenant, "patch")
    assert allowed("secrets", release.tenant, "create")
    assert not allowed("deployments.apps", release.stranger)
    assert not allowed("secrets", release.stranger)
    assert not allowed("secrets", "kube-system")
    assert not allowed("secrets", release.tenant, "list")


def test_in_its_own_namespace_the_operator_reads_its_ca_and_its_leases_only(release: Release) -> None:
    def allowed(resource: str) -> bool:
        return release.can(release.operator, "get", resource, release.namespace)

    assert allowed("secrets/prism-ca")
    assert not allowed("secrets/other")
    assert allowed("leases.coordination.k8s.io/prism-operator")
    assert not allowed("leases.coordination.k8s.io/other")


def test_a_namespaces_admin_may_let_the_operator_in_and_bind_nothing_stronger(release: Release) -> None:
    cluster, admin = release.cluster, "alice"
    cluster.kubectl(
        "create", "rolebinding", "alice-is-admin", "-n", release.stranger, "--clusterrole=admin", f"--user={admin}"
    )
    cluster.wait_until(
        "the role `admin` holds the chart's rights",
        lambda: release.can(admin, "create", "prismservices.moeprism.io", release.stranger),
    )
    assert not release.can(release.operator, "get", "secrets", release.stranger)
    operator = f"--serviceaccount={release.namespace}:{release.prefix}-operator"
    release.bind(admin, "prism", f"{release.prefix}-tenant", operator)
    assert release.can(release.operator, "get", "secrets", release.stranger)
    with pytest.raises(ClusterError, match="attempting to grant RBAC permissions not currently held"):
        release.bind(admin, "stronger", "cluster-admin", operator)


def test_a_viewer_reads_services_and_changes_none(release: Release) -> None:
    cluster, viewer = release.cluster, "bob"
    cluster.kubectl(
        "create", "rolebinding", "bob-may-look", "-n", release.stranger, "--clusterrole=view", f"--user={viewer}"
    )
    cluster.wait_until(
        "the role `view` holds the chart's rights",
        lambda: release.can(viewer, "list", "prismservices.moeprism.io", release.stranger),
    )
    manifest = json.dumps(prism_service())
    with pytest.raises(ClusterError, match="forbidden"):
        cluster.kubectl("create", "-n", release.stranger, f"--as={viewer}", "-f", "-", input=manifest)


def test_the_operators_pods_are_admitted_under_pod_security_restricted(release: Release) -> None:
    deployment = release.cluster.get("deployment", f"{release.prefix}-operator", "-n", release.namespace)
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "admitted"},
        "spec": deployment["spec"]["template"]["spec"],
    }

    def create() -> str:
        arguments = ("create", "-n", release.namespace, "--dry-run=server", "-f", "-")
        return release.cluster.kubectl(*arguments, input=json.dumps(pod))

    assert "admitted" in create()
    pod["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = True
    with pytest.raises(ClusterError, match='violates PodSecurity "restricted'):
        create()


def test_an_upgrade_changes_what_the_values_change(release: Release) -> None:
    cluster = release.cluster
    values = (
        "--reuse-values",
        "--set",
        "operator.slowLoopSeconds=5",
        "--set",
        f"tenantNamespaces={{{release.stranger}}}",
    )
    cluster.helm("upgrade", release.prefix, str(CHART), "-n", release.namespace, *values)
    deployment = cluster.get("deployment", f"{release.prefix}-operator", "-n", release.namespace)
    env = {e["name"]: e.get("value") for e in deployment["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert env["PRISM_OPERATOR_SLOW_LOOP_SECONDS"] == "5"
    assert release.can(release.operator, "get", "secrets", release.stranger)
    assert not release.can(release.operator, "get", "secrets", release.tenant)
