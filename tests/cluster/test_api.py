"""How the real API server treats our resources: what it refuses, fills in, prunes, scales, merges and explains."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from prism_api.base import Document
from prism_api.crd import all_definitions
from prism_api.model import PrismModelSpec
from prism_api.service import PrismServiceSpec
from tests.cluster.invalid_manifests import CREATIONS, UPDATES, Invalid
from tests.cluster.manifests import Manifest, prism_model, prism_service
from tests.localcluster.cluster import Cluster
from tests.localcluster.failure import ClusterError

pytestmark = pytest.mark.cluster("crd")

CRD_FOLDER = Path(__file__).parents[2] / "crds"
PLURALS = {"PrismService": "prismservices", "PrismModel": "prismmodels"}
NOW = "2026-01-01T00:00:00Z"


@pytest.fixture(scope="module", autouse=True)
def current_crds(cluster: Cluster) -> None:
    """The CRDs of this checkout: a cluster that is kept running may hold older ones."""
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(CRD_FOLDER))
    cluster.kubectl("wait", "--for=condition=Established", "--timeout=30s", *(f"crd/{name}" for name in crd_names()))


def crd_names() -> list[str]:
    return [definition["metadata"]["name"] for definition in all_definitions().values()]


def create(cluster: Cluster, namespace: str, manifest: Manifest, *flags: str) -> Manifest:
    """The object as the server stored it, or as it would with `--dry-run=server`."""
    answer = cluster.kubectl("-n", namespace, "create", "-f", "-", "-o", "json", *flags, input=json.dumps(manifest))
    return json.loads(answer)


def refusal(cluster: Cluster, *arguments: str, input: str | None = None) -> str:
    """The server's message for a command that must fail."""
    with pytest.raises(ClusterError) as caught:
        cluster.kubectl(*arguments, input=input)
    return str(caught.value)


# ---- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("manifest", [prism_service(), prism_model()], ids=lambda m: m["kind"])
def test_the_objects_that_the_tables_edit_are_accepted(cluster: Cluster, namespace: str, manifest: Manifest) -> None:
    assert create(cluster, namespace, manifest, "--dry-run=server")["kind"] == manifest["kind"]


@pytest.mark.parametrize("invalid", CREATIONS, ids=str)
def test_an_invalid_manifest_is_refused_with_the_field_and_the_remedy(cluster: Cluster, invalid: Invalid) -> None:
    message = refusal(
        cluster, "-n", "default", "create", "--dry-run=server", "-f", "-", input=json.dumps(invalid.manifest)
    )
    assert [answer for answer in invalid.answers if answer not in message] == [], message


@pytest.mark.parametrize("invalid", UPDATES, ids=str)
def test_a_change_of_an_immutable_field_is_refused_with_the_remedy(
    cluster: Cluster, namespace: str, invalid: Invalid
) -> None:
    create(cluster, namespace, invalid.valid)
    arguments = ("-n", namespace, "apply", "--server-side", "--force-conflicts", "-f", "-")
    message = refusal(cluster, *arguments, input=json.dumps(invalid.manifest))
    assert [answer for answer in invalid.answers if answer not in message] == [], message


def test_an_unknown_field_is_refused_by_kubectl_and_pruned_where_validation_is_off(
    cluster: Cluster, namespace: str
) -> None:
    manifest = prism_service(**{"spec.sparsity": "0.5", "spec.budget.level": 3})
    message = refusal(cluster, "-n", namespace, "create", "-f", "-", input=json.dumps(manifest))
    assert 'unknown field "spec.sparsity"' in message
    assert 'unknown field "spec.budget.level"' in message
    stored = create(cluster, namespace, manifest, "--validate=ignore")
    assert "sparsity" not in stored["spec"]
    assert "level" not in stored["spec"]["budget"]


# ---- defaults ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("manifest", "spec_type"),
    [
        (prism_service(), PrismServiceSpec),
        (prism_service(**{"spec.budget": {"control": "Off"}, "spec.pools.0.pod": {}}), PrismServiceSpec),
        (prism_model(), PrismModelSpec),
    ],
    ids=["a minimal service", "a service with half-filled blocks", "a minimal model"],
)
def test_the_server_fills_in_the_same_defaults_as_the_typed_resource(
    cluster: Cluster, namespace: str, manifest: Manifest, spec_type: type[Document]
) -> None:
    stored = create(cluster, namespace, manifest)["spec"]
    typed = spec_type.model_validate(manifest["spec"]).to_wire()
    assert without_empty(stored) == without_empty(typed)


def without_empty(node: Any) -> Any:
    """Absent, `{}` and `[]` mean the same in our resources."""
    if isinstance(node, dict):
        cleaned = {key: without_empty(value) for key, value in node.items()}
        return {key: value for key, value in cleaned.items() if value not in ({}, [])}
    return [without_empty(item) for item in node] if isinstance(node, list) else node


# ---- subresources -----------------------------------------------------------------------------------------------


def test_scale_sets_replicas_of_an_external_service(cluster: Cluster, namespace: str) -> None:
    create(cluster, namespace, prism_service(**{"spec.scaling.control": "External", "spec.replicas": 2}))
    cluster.kubectl("-n", namespace, "scale", "psvc/chat", "--replicas=5")
    path = f"/apis/moeprism.io/v1alpha1/namespaces/{namespace}/prismservices/chat/scale"
    assert json.loads(cluster.kubectl("get", "--raw", path))["spec"]["replicas"] == 5
    assert cluster.get("psvc", "chat", "-n", namespace)["spec"]["replicas"] == 5


def test_scale_reports_replicas_and_selector_from_the_status(cluster: Cluster, namespace: str) -> None:
    create(cluster, namespace, prism_service(**{"spec.scaling.control": "External", "spec.replicas": 2}))
    patch_status(cluster, namespace, "psvc", "chat", {"replicas": 3, "selector": "moeprism.io/service=chat"})
    path = f"/apis/moeprism.io/v1alpha1/namespaces/{namespace}/prismservices/chat/scale"
    status = json.loads(cluster.kubectl("get", "--raw", path))["status"]
    assert status == {"replicas": 3, "selector": "moeprism.io/service=chat"}


def test_scale_is_refused_on_a_managed_service_with_the_remedy(cluster: Cluster, namespace: str) -> None:
    create(cluster, namespace, prism_service())
    message = refusal(cluster, "-n", namespace, "scale", "psvc/chat", "--replicas=5")
    assert "must not be set when it is 'Managed'" in message
    assert "replicas" not in cluster.get("psvc", "chat", "-n", namespace)["spec"]


def test_scale_to_zero_is_refused(cluster: Cluster, namespace: str) -> None:
    create(cluster, namespace, prism_service(**{"spec.scaling.control": "External", "spec.replicas": 2}))
    message = refusal(cluster, "-n", namespace, "scale", "psvc/chat", "--replicas=0")
    assert "spec.replicas" in message
    assert "greater than or equal to 1" in message


def test_a_write_of_the_object_leaves_the_status_alone_and_the_other_way_round(
    cluster: Cluster, namespace: str
) -> None:
    stored = create(cluster, namespace, prism_service())
    stored["status"] = {"replicas": 7}
    stored["spec"]["mode"] = "Paused"
    cluster.kubectl("-n", namespace, "replace", "-f", "-", input=json.dumps(stored))
    seen = cluster.get("psvc", "chat", "-n", namespace)
    assert seen["spec"]["mode"] == "Paused"
    assert "status" not in seen
    patch = json.dumps({"spec": {"mode": "Active"}, "status": {"replicas": 3}})
    cluster.kubectl("-n", namespace, "patch", "psvc", "chat", "--subresource=status", "--type=merge", "-p", patch)
    seen = cluster.get("psvc", "chat", "-n", namespace)
    assert seen["spec"]["mode"] == "Paused"
    assert seen["status"]["replicas"] == 3


def patch_status(cluster: Cluster, namespace: str, kind: str, name: str, status: Manifest) -> None:
    patch = json.dumps({"status": status})
    cluster.kubectl("-n", namespace, "patch", kind, name, "--subresource=status", "--type=merge", "-p", patch)


FULL_STATUS = {
    "observedGeneration": 2,
    "replicas": 3,
    "readyReplicas": 2,
    "startingReplicas": 1,
    "desiredReplicas": 3,
    "selector": "moeprism.io/service=chat",
    "budget": {
        "epoch": 3,
        "sequence": 412,
        "ackedReplicas": 2,
        "staleReplicas": 0,
        "meanBudgetPermille": 875,
        "lastSwitchTime": NOW,
    },
    "classes": [
        {
            "name": "standard",
            "point": "b875",
            "effectivePods": 2,
            "attainment": "0.993",
            "ttftMilliseconds": 740,
            "tpotMilliseconds": 38,
            "relativeQuality": "0.996",
        }
    ],
    "cost": {"perHour": "7.50", "capUtilization": "1.200000"},
    "recommendation": {"replicas": 3, "points": [{"class": "standard", "point": "b875"}], "reason": "BurstBridge"},
    "decisions": [
        {
            "time": "2026-01-01T00:00:00.123456Z",
            "kind": "Budget",
            "class": "standard",
            "from": "full",
            "to": "b875",
            "reason": "BurstBridge",
            "message": "saturation 1.2",
        }
    ],
    "conditions": [
        {
            "type": "Ready",
            "status": "True",
            "reason": "AllReplicasServing",
            "message": "2 of 3 ready",
            "lastTransitionTime": NOW,
            "observedGeneration": 2,
        }
    ],
}


def test_a_full_status_is_stored_as_written(cluster: Cluster, namespace: str) -> None:
    create(cluster, namespace, prism_service())
    patch_status(cluster, namespace, "psvc", "chat", FULL_STATUS)
    assert cluster.get("psvc", "chat", "-n", namespace)["status"] == FULL_STATUS


def test_a_status_with_a_garbled_time_is_refused(cluster: Cluster, namespace: str) -> None:
    create(cluster, namespace, prism_service())
    conditions = [{**FULL_STATUS["conditions"][0], "lastTransitionTime": "yesterday"}]
    patch = json.dumps({"status": {"conditions": conditions}})
    flags = ("--subresource=status", "--type=merge", "-p", patch)
    message = refusal(cluster, "-n", namespace, "patch", "psvc", "chat", *flags)
    assert "status.conditions[0].lastTransitionTime" in message
    assert "date-time" in message


# ---- merging, selecting, explaining -----------------------------------------------------------------------------


def apply_as(cluster: Cluster, namespace: str, manager: str, manifest: Manifest) -> None:
    flags = ("--server-side", f"--field-manager={manager}", "-f", "-")
    cluster.kubectl("-n", namespace, "apply", *flags, input=json.dumps(manifest))


def test_two_managers_each_own_a_class_of_one_service(cluster: Cluster, namespace: str) -> None:
    apply_as(cluster, namespace, "platform", prism_service(**{"spec.defaultClass": "standard"}))
    gold = {"name": "gold", "priority": 100, "objectives": {"ttftMilliseconds": 800}}
    fragment = {key: prism_service()[key] for key in ("apiVersion", "kind", "metadata")} | {"spec": {"classes": [gold]}}
    apply_as(cluster, namespace, "team", fragment)
    assert class_names(cluster, namespace) == ["standard", "gold"]
    apply_as(cluster, namespace, "team", {**fragment, "spec": {}})
    assert class_names(cluster, namespace) == ["standard"]


def class_names(cluster: Cluster, namespace: str) -> list[str]:
    return [entry["name"] for entry in cluster.get("psvc", "chat", "-n", namespace)["spec"]["classes"]]


def test_services_are_selected_by_their_model(cluster: Cluster, namespace: str) -> None:
    create(cluster, namespace, prism_service("chat"))
    create(cluster, namespace, prism_service("other", **{"spec.modelRef.name": "large-moe"}))
    found = cluster.get("psvc", "-n", namespace, "--field-selector=spec.modelRef.name=large-moe")["items"]
    assert [item["metadata"]["name"] for item in found] == ["other"]


def test_kubectl_get_shows_the_printer_columns(cluster: Cluster, namespace: str) -> None:
    create(cluster, namespace, prism_service())
    patch_status(cluster, namespace, "psvc", "chat", FULL_STATUS)
    header, row = (line.split() for line in cluster.kubectl("-n", namespace, "get", "psvc", "-o", "wide").splitlines())
    shown = dict(zip(header, row, strict=False))
    wanted = ["NAME", "READY", "MODEL", "BUDGET", "DESIRED", "READYREPLICAS", "OBJECTIVES", "DEGRADED", "$/H", "AGE"]
    assert header[: len(wanted)] == wanted
    assert header[len(wanted) :] == ["MODE", "REASON"]
    assert (shown["READY"], shown["MODEL"], shown["BUDGET"], shown["DESIRED"]) == ("True", "small-moe", "875", "3")


@pytest.mark.parametrize("kind", PLURALS)
def test_kubectl_explain_lists_and_describes_every_field(cluster: Cluster, kind: str) -> None:
    plural = PLURALS[kind]
    served = json.loads(cluster.kubectl("get", "--raw", "/openapi/v3/apis/moeprism.io/v1alpha1"))
    schema = served["components"]["schemas"][f"io.moeprism.v1alpha1.{kind}"]
    fields = dict(fields_of({"type": "object", "properties": {k: schema["properties"][k] for k in ("spec", "status")}}))
    assert len(fields) > 10
    assert [path for path, node in fields.items() if not node.get("description", "").strip()] == []
    listed = set()
    for block in ("spec", "status"):
        text = cluster.kubectl("explain", f"{plural}.{block}", "--recursive")
        listed |= {line.split()[0] for line in text.partition("FIELDS:")[2].splitlines() if "\t<" in line}
    assert {path.rpartition(".")[2] for path in fields if path not in ("spec", "status")} <= listed


def fields_of(node: Manifest, path: str = "") -> list[tuple[str, Manifest]]:
    found = []
    for name, child in node.get("properties", {}).items():
        inner = f"{path}.{name}" if path else name
        found.append((inner, child))
        found += fields_of(child.get("items", child), inner)
    return found


@pytest.mark.parametrize("name", crd_names())
def test_the_server_finds_the_schema_structural_and_the_names_free(cluster: Cluster, name: str) -> None:
    conditions = {c["type"]: c["status"] for c in cluster.get("crd", name)["status"]["conditions"]}
    assert conditions == {"NamesAccepted": "True", "Established": "True"}


# ---- examples ---------------------------------------------------------------------------------------------------

EXAMPLES = Path(__file__).parents[2] / "examples"
EXAMPLE_FILES = sorted([*EXAMPLES.glob("*.yaml"), *EXAMPLES.glob("services/*/*.yaml")])


@pytest.mark.parametrize("path", EXAMPLE_FILES, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_an_example_is_accepted_as_it_stands(cluster: Cluster, namespace: str, path: Path) -> None:
    documents = [d for d in yaml.safe_load_all(path.read_text()) if d and not d["apiVersion"].startswith("keda.sh/")]
    for document in documents:
        if document["kind"] != "Namespace":
            document["metadata"]["namespace"] = namespace
            assert create(cluster, namespace, document, "--dry-run=server")["metadata"]["name"]
