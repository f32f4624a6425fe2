"""The operator's Deployment and what stands around it."""

import argparse
from typing import Any

import pytest
import yaml

from prism_api.crd import all_definitions
from prism_operator import settings
from prism_operator.plan.pod_template import SERVICE_LABEL, ChildSettings
from tests.unit.chart.rendering import NAMESPACE, HelmError, Object, objects, of_kind, rendered

CLUSTER_SCOPED = {"ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition"}


def deployment(*values: str) -> Object:
    return of_kind("Deployment", *values)["prism-operator"]


def pod(*values: str) -> Object:
    spec: Object = deployment(*values)["spec"]["template"]["spec"]
    return spec


def container(*values: str) -> Object:
    (only,) = pod(*values)["containers"]
    found: Object = only
    return found


def settings_of(*values: str) -> settings.Settings:
    """The operator's settings as it would read them from the rendered environment."""
    from_pod = {"metadata.name": "prism-operator-x", "metadata.namespace": NAMESPACE, "status.podIP": "10.0.0.9"}
    environ = {
        entry["name"]: entry["value"] if "value" in entry else from_pod[entry["valueFrom"]["fieldRef"]["fieldPath"]]
        for entry in container(*values)["env"]
    }
    parser = argparse.ArgumentParser()
    settings.add_arguments(parser)
    return settings.from_arguments(parser.parse_args([]), environ)


def test_the_operator_reads_from_its_environment_what_the_values_say() -> None:
    read = settings_of()
    assert (read.namespace, read.listen) == (NAMESPACE, "10.0.0.9")
    assert read.identity.startswith("prism-operator-x_")
    assert (read.fast_loop_s, read.slow_loop_s, read.log_level) == (1, 30, "INFO")
    assert (read.metrics_port, read.health_port, read.watch_namespaces) == (9090, 8080, ())
    changed = settings_of(
        "operator.fastLoopSeconds=0.5",
        "operator.slowLoopSeconds=5",
        "operator.rehearsalSeconds=60",
        "operator.logLevel=DEBUG",
        "operator.fleet.maxPerHour=99.5",
        "operator.fleet.maxAccelerators=64",
        "watchNamespaces={team-a,team-b}",
        "ports.metrics=9191",
    )
    assert (read.fleet_max_per_hour, read.fleet_max_accelerators) == (None, None)
    assert (str(changed.fleet_max_per_hour), changed.fleet_max_accelerators) == ("99.5", 64)
    assert (read.rehearsal_s, changed.rehearsal_s) == (0, 60)
    assert (changed.fast_loop_s, changed.slow_loop_s, changed.log_level) == (0.5, 5, "DEBUG")
    assert (changed.watch_namespaces, changed.metrics_port) == (("team-a", "team-b"), 9191)


def test_the_pods_keep_to_pod_security_restricted_in_full() -> None:
    security, own = pod()["securityContext"], container()["securityContext"]
    assert (security["runAsNonRoot"], security["runAsUser"], security["runAsGroup"]) == (True, 65532, 65532)
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert own == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert [volume for volume in pod()["volumes"] if volume.keys() - {"name", "emptyDir"}] == []
    assert pod().keys().isdisjoint({"hostNetwork", "hostPID", "hostIPC"})
    assert container()["volumeMounts"] == [{"name": "tmp", "mountPath": "/tmp"}]


def test_there_are_requests_and_a_memory_limit_and_no_cpu_limit() -> None:
    resources = container()["resources"]
    assert set(resources["requests"]) == {"cpu", "memory"}
    assert set(resources["limits"]) == {"memory"}


def test_probes_ask_the_health_port() -> None:
    ports = {port["name"]: port["containerPort"] for port in container("ports.health=8181")["ports"]}
    assert ports == {"metrics": 9090, "health": 8181}
    probes = {name: container()[f"{name}Probe"]["httpGet"] for name in ("liveness", "readiness")}
    assert probes == {
        "liveness": {"path": "/healthz", "port": "health"},
        "readiness": {"path": "/readyz", "port": "health"},
    }


def test_services_admit_the_operator_by_a_label_that_its_pods_carry() -> None:
    wanted = ChildSettings(operator_namespace=NAMESPACE).operator_labels
    assert wanted.items() <= deployment()["spec"]["template"]["metadata"]["labels"].items()


def test_the_operator_may_reach_the_control_port_of_every_services_pods() -> None:
    policy = of_kind("NetworkPolicy")["prism-operator"]["spec"]
    to_pods = [rule for rule in policy["egress"] if "podSelector" in rule.get("to", [{}])[0]]
    (rule,) = to_pods
    assert rule["ports"] == [{"protocol": "TCP", "port": ChildSettings(operator_namespace=NAMESPACE).control_port}]
    (expression,) = rule["to"][0]["podSelector"]["matchExpressions"]
    assert expression == {"key": SERVICE_LABEL, "operator": "Exists"}


def test_nobody_reaches_the_metrics_port_where_no_peer_is_named() -> None:
    policy = of_kind("NetworkPolicy", "networkPolicy.metricsFrom=null")["prism-operator"]["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in policy


def test_a_disruption_budget_stands_only_where_a_second_pod_can_take_over() -> None:
    assert of_kind("PodDisruptionBudget")["prism-operator"]["spec"]["maxUnavailable"] == 1
    assert of_kind("PodDisruptionBudget", "replicas=1") == {}


def test_selectors_find_the_pods() -> None:
    labels = deployment()["spec"]["template"]["metadata"]["labels"].items()
    selectors = [
        deployment()["spec"]["selector"]["matchLabels"],
        of_kind("PodDisruptionBudget")["prism-operator"]["spec"]["selector"]["matchLabels"],
        of_kind("NetworkPolicy")["prism-operator"]["spec"]["podSelector"]["matchLabels"],
        of_kind("Service")["prism-operator-metrics"]["spec"]["selector"],
    ]
    assert all(selector.items() <= labels for selector in selectors)


@pytest.mark.parametrize(
    ("values", "image"),
    [
        ((), "registry.local:5000/moeprism/operator:0.1.0"),
        (("image.repository=example/operator", "image.tag=1.2"), "example/operator:1.2"),
        (("image.tag=123456789012",), "registry.local:5000/moeprism/operator:123456789012"),
        (
            ("image.tag=1.2", f"image.digest=sha256:{'0' * 64}"),
            f"registry.local:5000/moeprism/operator@sha256:{'0' * 64}",
        ),
    ],
    ids=["the chart's version", "a tag", "a tag of digits", "a digest wins over a tag"],
)
def test_the_image_is_named_by_version_tag_or_digest(values: tuple[str, ...], image: str) -> None:
    assert container(*values)["image"] == image


def test_every_object_is_in_the_release_namespace_and_labelled() -> None:
    for obj in objects():
        metadata = obj["metadata"]
        expected = None if obj["kind"] in CLUSTER_SCOPED else NAMESPACE
        assert metadata.get("namespace") == expected, metadata["name"]
        assert metadata["labels"]["app.kubernetes.io/part-of"] == "moe-prism"


def test_two_releases_share_no_name_but_those_of_the_crds() -> None:
    def names(release: str) -> set[tuple[str, str]]:
        return {(obj["kind"], obj["metadata"]["name"]) for obj in objects(release=release)}

    assert {kind for kind, _ in names("prism") & names("second")} == {"CustomResourceDefinition"}


def test_the_crds_are_the_generated_ones_and_stay_when_the_chart_goes() -> None:
    definitions: dict[str, Any] = {d["metadata"]["name"]: d for d in all_definitions().values()}
    installed = of_kind("CustomResourceDefinition")
    assert set(installed) == set(definitions)
    for name, crd in installed.items():
        assert crd["spec"] == definitions[name]["spec"]
        annotations = definitions[name]["metadata"]["annotations"] | {"helm.sh/resource-policy": "keep"}
        assert crd["metadata"]["annotations"] == annotations


def test_the_crds_can_be_left_to_somebody_else() -> None:
    assert of_kind("CustomResourceDefinition", "crds.install=false") == {}


def test_integers_keep_their_digits_on_the_way_through_helm() -> None:
    """Helm reads YAML into floating point; large bounds must not come out with an exponent."""
    assert "maximum: 9007199254740992\n" in rendered()
    assert yaml.safe_load("maximum: 9.007e+15") == {"maximum": 9.007e15}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("replica=3", "replica"),
        ("replicas=0", "replicas"),
        ("operator.logLevel=debug", "logLevel"),
        ("operator.fastLoopSeconds=0", "fastLoopSeconds"),
        ("operator.slowLoop=5", "slowLoop"),
        ("image.digest=latest", "digest"),
        ("tenantNamespaces={Team_A}", "tenantNamespaces"),
        ("resources.limits.cpu=1", "cpu"),
        ("crds.install=yes-please", "install"),
    ],
)
def test_a_value_that_does_not_exist_or_cannot_be_is_refused_by_name(value: str, message: str) -> None:
    with pytest.raises(HelmError, match=message):
        rendered(value)
