"""What the chart lets the operator and the cluster's users do: what is needed, and nothing beyond it."""

from typing import Any

from prism_operator.control import kube
from prism_operator.control.certificates import CA_SECRET
from prism_operator.control.fence import FENCE_NAME
from prism_operator.control.lease import LEADER_LEASE
from tests.unit.chart.rendering import NAMESPACE, Object, objects, of_kind

OPERATOR = {"kind": "ServiceAccount", "name": "prism-operator", "namespace": NAMESPACE}
Right = tuple[str, str, str, str]


def needed_rights() -> set[Right]:
    """(group, resource, verb, scope) of the table in which the port to the API server lists what it does."""
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table_lines(kube.__doc__ or "")]
    rights = {(group, resource, verb, scope) for group, resource, verbs, scope in rows for verb in verbs.split(", ")}
    assert len(rights) > 20
    return rights


def table_lines(text: str) -> list[str]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return lines[2:]


def rights_of(role: Object, scope: str) -> set[Right]:
    return {
        (group or "core", resource, verb, scope)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def test_the_operator_gets_exactly_the_rights_that_its_port_to_the_api_server_lists() -> None:
    cluster_roles, roles = of_kind("ClusterRole"), of_kind("Role")
    granted = (
        rights_of(cluster_roles["prism-operator"], "watched")
        | rights_of(cluster_roles["prism-operator-crds"], "cluster")
        | rights_of(cluster_roles["prism-tenant"], "tenant")
        | rights_of(roles["prism-operator"], "own")
    )
    assert granted == needed_rights()


def test_no_role_has_a_wildcard_or_a_verb_that_raises_rights() -> None:
    rules = [rule for obj in objects() if obj["kind"] in ("ClusterRole", "Role") for rule in obj["rules"]]
    assert len(rules) > 10
    assert [rule for rule in rules if "*" in (*rule["apiGroups"], *rule["resources"], *rule["verbs"])] == []
    assert [rule for rule in rules if {"impersonate", "escalate"} & set(rule["verbs"])] == []


def test_in_its_own_namespace_the_operator_reads_only_its_own_secret_and_leases() -> None:
    named: dict[str, Any] = {}
    for rule in of_kind("Role")["prism-operator"]["rules"]:
        if rule["verbs"] != ["create"]:  # a create cannot be limited by name
            named[rule["resources"][0]] = set(rule["resourceNames"])
    assert named == {"leases": {LEADER_LEASE, FENCE_NAME}, "secrets": {CA_SECRET}}


def test_without_tenants_the_operator_may_touch_workloads_nowhere() -> None:
    assert [b for b in objects() if b["kind"] == "RoleBinding" and b["roleRef"]["name"] == "prism-tenant"] == []
    assert set(of_kind("ClusterRoleBinding")) == {"prism-operator", "prism-operator-crds"}


def test_tenant_rights_are_bound_in_each_tenant_namespace_and_never_cluster_wide() -> None:
    rendered = objects("tenantNamespaces={team-a,team-b}")
    bindings = [obj for obj in rendered if obj.get("roleRef", {}).get("name") == "prism-tenant"]
    assert [(b["kind"], b["metadata"]["namespace"]) for b in bindings] == [
        ("RoleBinding", "team-a"),
        ("RoleBinding", "team-b"),
    ]
    assert all(b["subjects"] == [OPERATOR] for b in bindings)


def test_with_watched_namespaces_nothing_but_the_look_at_the_crds_is_cluster_wide() -> None:
    rendered = objects("watchNamespaces={team-a,team-b}", "tenantNamespaces={team-b}")
    assert [obj["roleRef"]["name"] for obj in rendered if obj["kind"] == "ClusterRoleBinding"] == [
        "prism-operator-crds"
    ]
    bound = sorted(
        (obj["metadata"]["namespace"], obj["roleRef"]["name"]) for obj in rendered if obj["kind"] == "RoleBinding"
    )
    assert bound == [
        (NAMESPACE, "prism-operator"),
        ("team-a", "prism-operator"),
        ("team-a", "prism-tenant"),
        ("team-b", "prism-operator"),
        ("team-b", "prism-tenant"),
    ]


def test_users_get_rights_through_the_clusters_own_roles() -> None:
    roles = of_kind("ClusterRole")
    label = "rbac.authorization.k8s.io/aggregate-to-"
    aggregated = {
        name: key.removeprefix(label)
        for name, role in roles.items()
        for key in role["metadata"]["labels"]
        if key.startswith(label)
    }
    assert aggregated == {"prism-view": "view", "prism-edit": "edit", "prism-admin": "admin"}
    assert {verb for _, _, verb, _ in rights_of(roles["prism-view"], "")} == {"get", "list", "watch"}
    assert ("moeprism.io", "prismservices/scale", "update", "") in rights_of(roles["prism-edit"], "")
    assert not any("status" in resource for _, resource, _, _ in rights_of(roles["prism-edit"], ""))


def test_admins_may_bind_the_tenant_role_and_no_other() -> None:
    (rule,) = of_kind("ClusterRole")["prism-admin"]["rules"]
    assert (rule["resources"], rule["verbs"], rule["resourceNames"]) == (["clusterroles"], ["bind"], ["prism-tenant"])


def test_roles_for_users_can_be_left_out() -> None:
    assert set(of_kind("ClusterRole", "userRoles.aggregate=false")) == {
        "prism-operator",
        "prism-operator-crds",
        "prism-tenant",
    }
