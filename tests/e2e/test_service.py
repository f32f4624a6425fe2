"""A PrismService from `kubectl apply` to serving, as its owner sees it."""

import json
import time

import pytest

from tests.e2e.system import NAMESPACE, SERVICE, System, steady_then_burst

pytestmark = pytest.mark.cluster("nodes=2")
OWNED = ("deployment", "service", "secret", "poddisruptionbudget", "networkpolicy")


def test_an_applied_service_becomes_ready_and_kubectl_wait_sees_it(system: System) -> None:
    wait = ("wait", "-n", NAMESPACE, f"psvc/{SERVICE}", "--for=condition=Ready", "--timeout=180s")
    assert "condition met" in system.cluster.kubectl(*wait)
    system.wait_ready(replicas=1)
    conditions = {c["type"]: c["status"] for c in system.status()["conditions"]}
    assert conditions["Accepted"] == conditions["ModelResolved"] == "True"
    assert conditions["QualityDegraded"] == "False"


def test_everything_that_belongs_to_a_service_is_owned_by_it(system: System) -> None:
    owner = system.cluster.get("psvc", SERVICE, "-n", NAMESPACE)["metadata"]["uid"]
    for kind in OWNED:
        items = system.cluster.get(kind, "-n", NAMESPACE)["items"]
        owned = [i for i in items if any(o["uid"] == owner for o in i["metadata"].get("ownerReferences", ()))]
        assert owned, f"no {kind} is owned by the service"


def test_get_shows_the_columns_that_an_admin_looks_for(system: System) -> None:
    system.wait_ready(replicas=1)
    header, row = system.cluster.kubectl("get", "psvc", "-n", NAMESPACE).splitlines()
    assert header.split() == [
        *("NAME", "READY", "MODEL", "BUDGET", "DESIRED", "READYREPLICAS", "OBJECTIVES", "DEGRADED", "$/H", "AGE")
    ]
    assert row.split()[:6] == [SERVICE, "True", "small-moe", "1000", "1", "1"]


def test_pods_run_restricted_with_requests_and_a_memory_limit(system: System) -> None:
    (item,) = system.cluster.get("pods", "-n", NAMESPACE, "-l", f"moeprism.io/service={SERVICE}")["items"]
    (container,) = item["spec"]["containers"]
    security = container["securityContext"]
    assert security["readOnlyRootFilesystem"] is True
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert item["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert item["spec"]["automountServiceAccountToken"] is False
    assert {"cpu", "memory"} <= set(container["resources"]["requests"])
    assert "memory" in container["resources"]["limits"]


def test_pods_run_the_compiled_kernels_that_their_image_brings(system: System) -> None:
    system.wait_ready(replicas=1)
    (item,) = system.cluster.get("pods", "-n", NAMESPACE, "-l", f"moeprism.io/service={SERVICE}")["items"]
    lines = system.cluster.kubectl("logs", "-n", NAMESPACE, item["metadata"]["name"]).splitlines()
    said = [json.loads(line) for line in lines if line.startswith("{")]
    loaded = {line["program"]: line["processor"] for line in said if line["message"] == "compiled code loaded"}
    assert {"cpu_experts", "cpu_gate"} <= set(loaded), "pods fell back to torch"
    assert "native" not in loaded.values(), "a pod compiled what its image should bring"


def test_a_burst_lowers_the_budget_within_two_seconds_fails_nothing_and_full_returns(system: System) -> None:
    system.apply(scaling={"minReplicas": 1, "maxReplicas": 1})
    system.wait_ready(replicas=1)
    onset_s = 8.0
    arrivals = steady_then_burst(24, calm_per_s=1.5, burst_per_s=9.0, burst_at_s=onset_s, burst_s=8)
    lowered_at_s = None
    with system.load("burst", arrivals) as load:
        while load.running and time.monotonic() - load.began_s < 60:
            if lowered_at_s is None and any(permille < 1000 for permille in system.budgets().values()):
                lowered_at_s = time.monotonic() - load.began_s
            time.sleep(0.1)
    assert load.failed == []
    assert lowered_at_s is not None, "the budget never fell"
    begun = min(answer.sent_s for answer in load.answers)
    assert onset_s <= lowered_at_s - begun <= onset_s + 4, "the sampling itself takes up to a second"
    system.wait_until("the budget is back at full", lambda: set(system.budgets().values()) == {1000}, timeout_s=90)
    reasons = [decision["reason"] for decision in system.status()["decisions"]]
    assert len(reasons) <= 5
    assert "Restore" in reasons


def test_replicas_follow_the_scale_subresource_when_control_is_external(system: System) -> None:
    bounds = {"control": "External", "minReplicas": 1, "maxReplicas": 3}
    system.apply(scaling=bounds, replicas=1)
    try:
        system.cluster.kubectl("scale", "psvc", SERVICE, "-n", NAMESPACE, "--replicas=2")
        system.wait_until("the Deployment follows", lambda: system.deployment()["spec"]["replicas"] == 2, timeout_s=30)
    finally:
        body = json.dumps(
            [
                {"op": "remove", "path": "/spec/replicas"},
                {"op": "replace", "path": "/spec/scaling/control", "value": "Managed"},
            ]
        )
        system.cluster.kubectl("patch", "psvc", SERVICE, "-n", NAMESPACE, "--type=json", "-p", body)
