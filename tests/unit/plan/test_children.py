"""Children: complete, restricted, owned, and stable where pods must not restart."""

import copy
import json
import re
from typing import Any

import kubernetes_validate
import pytest

from prism_operator.plan.children import INTENT_HASH, ChildSettings, control_secret_name, intent_hash, render
from tests.unit.plan.factories import model_spec, service_class, service_spec

SETTINGS = ChildSettings(operator_namespace="prism-system")
UID = "0b1c6d2e-0000-4000-8000-000000000001"


def _render(replicas: int = 2, model: Any = None, **changes: Any) -> dict[str, dict[str, Any]]:
    children = render(
        "chat", "demo", UID, service_spec(**changes), "small-moe", model or model_spec(), replicas, SETTINGS
    )
    return {child["kind"]: child for child in children}


def _template(**changes: Any) -> dict[str, Any]:
    template: dict[str, Any] = _render(**changes)["Deployment"]["spec"]["template"]
    return template


def _container(**changes: Any) -> dict[str, Any]:
    container: dict[str, Any] = _template(**changes)["spec"]["containers"][0]
    return container


def test_children_are_the_four_kinds() -> None:
    assert set(_render()) == {"Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"}


def test_disabled_network_policy_is_not_rendered() -> None:
    assert "NetworkPolicy" not in _render(networking={"networkPolicy": "Disabled"})


def test_every_child_is_owned_labelled_and_hashed_without_a_finalizer() -> None:
    for child in _render().values():
        metadata = child["metadata"]
        assert metadata["ownerReferences"] == [
            {
                "apiVersion": "moeprism.io/v1alpha1",
                "kind": "PrismService",
                "name": "chat",
                "uid": UID,
                "controller": True,
                "blockOwnerDeletion": False,
            }
        ]
        assert metadata["labels"]["moeprism.io/service"] == "chat"
        assert metadata["labels"]["app.kubernetes.io/managed-by"] == "prism-operator"
        assert metadata["annotations"][INTENT_HASH] == intent_hash(child)
        assert "finalizers" not in metadata


def test_pods_run_under_restricted_pod_security() -> None:
    spec = _template()["spec"]
    pod, container = spec["securityContext"], _container()["securityContext"]
    assert pod["runAsNonRoot"] is True
    assert pod["runAsUser"] == 65532
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["capabilities"] == {"drop": ["ALL"]}
    assert container["readOnlyRootFilesystem"] is True
    assert container["allowPrivilegeEscalation"] is False
    assert spec["automountServiceAccountToken"] is False
    kinds = {key for volume in spec["volumes"] for key in volume if key != "name"}
    assert kinds <= {"image", "persistentVolumeClaim", "secret", "emptyDir"}


@pytest.mark.parametrize(
    "changes",
    [
        {"replicas": 7},
        {"budget": {"min": "b625", "max": "b875", "safePoint": "b750", "envelopeTTLSeconds": 60}},
        {"budget": {"control": "Fixed", "operatingPoint": "b500"}},
        {"classes": [service_class(objectives={"ttftMilliseconds": 9})]},
        {"scaling": {"minReplicas": 2, "maxReplicas": 9}},
        {"cost": {"maxPerHour": "99"}},
    ],
)
def test_pod_template_does_not_change_with_points_classes_or_replicas(changes: dict[str, Any]) -> None:
    assert _template(**changes) == _template()


def test_replicas_are_in_the_intent_in_every_mode() -> None:
    external = {"replicas": 4, "scaling": {"control": "External"}}
    spec = service_spec(**external)
    deployment = render("chat", "demo", UID, spec, "small-moe", model_spec(), 4, SETTINGS)[1]
    assert deployment["spec"]["replicas"] == 4
    assert _render(replicas=3)["Deployment"]["spec"]["replicas"] == 3


def test_hash_follows_the_replicas_and_ignores_itself() -> None:
    two, three = _render(2)["Deployment"], _render(3)["Deployment"]
    assert two["metadata"]["annotations"][INTENT_HASH] != three["metadata"]["annotations"][INTENT_HASH]
    changed = copy.deepcopy(two)
    changed["metadata"]["annotations"][INTENT_HASH] = "other"
    assert intent_hash(changed) == intent_hash(two)


def test_serving_label_selects_traffic_but_not_ownership() -> None:
    children = _render()
    assert children["Service"]["spec"]["selector"]["moeprism.io/serving"] == "true"
    assert children["Deployment"]["spec"]["selector"]["matchLabels"] == {"moeprism.io/service": "chat"}
    labels = children["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert labels["moeprism.io/serving"] == "true"
    assert 0 <= int(labels["moeprism.io/shard"]) < 64


def test_runtime_gets_its_addresses_limits_and_drain() -> None:
    arguments = _container(runtime={"image": "r", "servicePort": 9000, "engine": {"maxSequences": 32}})["args"]
    text = " ".join(arguments)
    assert arguments[:2] == ["serve", "/model"]
    for flag in (
        "--served-name small-moe",
        "--host $(POD_IP)",
        "--port 9000",
        "--control-port 8081",
        "--metrics-port 8082",
        "--tls-dir /tls",
        "--drain-seconds 45",
        "--drain-grace 5",
        "--max-sequences 32",
    ):
        assert flag in text
    assert "--max-context-tokens" not in text


def test_drain_ends_before_the_pod_is_killed() -> None:
    spec = service_spec()
    assert SETTINGS.drain_grace_s + spec.rollout.drain_seconds < _template()["spec"]["terminationGracePeriodSeconds"]


def test_pod_ip_is_defined_before_arguments_use_it() -> None:
    environment = {one["name"]: one for one in _container()["env"]}
    assert environment["POD_IP"]["valueFrom"]["fieldRef"]["fieldPath"] == "status.podIP"
    assert environment["PRISM_SERVICE_UID"]["value"] == UID
    assert environment["PRISM_IMAGE_DIGEST"]["value"] == "sha256:2"


def test_users_variables_are_passed_and_cannot_replace_ours() -> None:
    env = [{"name": "PRISM_PACE", "value": "demo"}, {"name": "PRISM_SERVICE_UID", "value": "forged"}]
    pools = [{"name": "main", "accelerator": {"name": "demo-gpu"}, "pod": {"env": env}}]
    found = [(one["name"], one.get("value")) for one in _container(pools=pools)["env"]]
    assert ("PRISM_PACE", "demo") in found
    assert [value for name, value in found if name == "PRISM_SERVICE_UID"] == [UID]


def test_accelerator_is_requested_and_limited_alike() -> None:
    accelerator = {"name": "h100", "resource": {"name": "nvidia.com/gpu", "count": 2}}
    resources = _container(pools=[{"name": "main", "accelerator": accelerator}])["resources"]
    assert resources["requests"]["nvidia.com/gpu"] == resources["limits"]["nvidia.com/gpu"] == "2"
    assert "cpu" not in resources["limits"]
    assert resources["limits"]["memory"] == resources["requests"]["memory"]


def test_model_is_mounted_from_an_image_or_a_claim_read_only() -> None:
    volumes = {volume["name"]: volume for volume in _template()["spec"]["volumes"]}
    assert volumes["model"]["image"]["reference"] == "registry.example/models/small@sha256:1"
    claim = model_spec(source={"persistentVolumeClaim": {"claimName": "models", "path": "/olmoe/"}})
    spec = _render(model=claim)["Deployment"]["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert volumes["model"]["persistentVolumeClaim"] == {"claimName": "models", "readOnly": True}
    assert spec["containers"][0]["args"][1] == "/model/olmoe"
    assert all(m["readOnly"] for m in spec["containers"][0]["volumeMounts"] if m["name"] != "scratch")


def test_certificate_may_come_after_the_pod() -> None:
    volumes = {volume["name"]: volume for volume in _template()["spec"]["volumes"]}
    assert volumes["tls"]["secret"]["secretName"] == control_secret_name("chat")
    assert volumes["tls"]["secret"]["optional"] is True


def test_control_port_admits_the_operator_alone() -> None:
    rules = _render()["NetworkPolicy"]["spec"]["ingress"]
    by_port = {rule["ports"][0]["port"]: rule.get("from") for rule in rules}
    assert by_port[8081] == [
        {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "prism-system"}},
            "podSelector": {"matchLabels": {"app.kubernetes.io/name": "prism-operator"}},
        }
    ]
    assert by_port[8000] is None


def test_rollout_and_probes_are_integers_of_the_spec() -> None:
    deployment = _render(rollout={"maxSurge": 1, "maxUnavailable": 0})["Deployment"]["spec"]
    assert deployment["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    container = _container()
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert container["livenessProbe"]["httpGet"]["path"] == "/health"
    assert container["startupProbe"]["periodSeconds"] * container["startupProbe"]["failureThreshold"] == 600


def test_second_render_equals_the_first_and_inputs_stay_as_they_were() -> None:
    pools = [
        {
            "name": "main",
            "accelerator": {"name": "demo-gpu"},
            "pod": {"nodeSelector": {"zone": "a"}, "tolerations": [{"key": "gpu", "operator": "Exists"}]},
        }
    ]
    spec, model = service_spec(pools=pools), model_spec()
    before = (spec.model_dump_json(), model.model_dump_json())
    first = render("chat", "demo", UID, spec, "small-moe", model, 2, SETTINGS)
    text = json.dumps(first)
    for child in first:
        child["metadata"]["labels"].clear()
        child["spec"].clear()
    second = render("chat", "demo", UID, spec, "small-moe", model, 2, SETTINGS)
    assert json.dumps(second) == text
    assert (spec.model_dump_json(), model.model_dump_json()) == before


def test_names_and_label_values_are_valid_for_the_longest_service() -> None:
    name = "a" * 40
    children = render(name, "demo", UID, service_spec(), "m" * 63, model_spec(), 1, SETTINGS)
    for child in children:
        for value in child["metadata"]["labels"].values():
            assert re.fullmatch(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", value)


def test_every_child_is_valid_for_the_api_server() -> None:
    claim = model_spec(source={"persistentVolumeClaim": {"claimName": "models"}})
    accelerator = {"name": "h100", "resource": {"name": "nvidia.com/gpu"}}
    pod = {"tolerations": [{"key": "gpu", "operator": "Exists"}], "priorityClassName": "high"}
    pools = [{"name": "main", "accelerator": accelerator, "pod": pod}]
    for children in (_render(), _render(model=claim, pools=pools)):
        for child in children.values():
            kubernetes_validate.validate(child, "1.37", strict=True)
