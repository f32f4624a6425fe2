"""A scale-down that is rehearsed: the pod that is to go leaves traffic first, warm and ready, and costs no request."""

import json

import pytest

from examples.demo import install
from tests.e2e.system import NAMESPACE, OPERATOR_NAMESPACE, SERVICE, System, steady_then_burst

pytestmark = pytest.mark.cluster("nodes=2")


def _reuse(system: System, rehearsal_s: int) -> None:
    values = ("--reuse-values", "--set", f"operator.rehearsalSeconds={rehearsal_s}", "--wait", "--timeout", "120s")
    system.cluster.helm("upgrade", install.RELEASE, str(install.CHART), "-n", OPERATOR_NAMESPACE, *values)


def _in_traffic(system: System) -> set[str]:
    """Pods that the Service sends requests to."""
    of_service = ("-n", NAMESPACE, "-l", f"kubernetes.io/service-name={SERVICE}")
    slices = system.cluster.get("endpointslices", *of_service)["items"]
    endpoints = [endpoint for one in slices for endpoint in one.get("endpoints") or ()]
    return {endpoint["targetRef"]["name"] for endpoint in endpoints if endpoint["conditions"].get("ready")}


def test_a_pod_leaves_traffic_before_it_is_removed_and_no_request_fails(system: System) -> None:
    system.apply(scaling={"minReplicas": 2, "maxReplicas": 2})
    system.wait_ready(replicas=2)
    _reuse(system, rehearsal_s=8)
    try:
        system.wait_until("both pods are in traffic", lambda: len(_in_traffic(system)) == 2)
        down_at_once = {"scaleDown": {"stabilizationWindowSeconds": 0}}
        system.apply(scaling={"minReplicas": 1, "maxReplicas": 2, "behavior": down_at_once})
        with system.load("rehearsal", steady_then_burst(100, 2, 2, 0, 1)) as load:
            system.wait_until("one pod leaves traffic", lambda: len(_in_traffic(system)) == 1, timeout_s=110)
            ready = {pod.name for pod in system.pods() if pod.ready}
            assert (len(ready), system.deployment()["spec"]["replicas"]) == (2, 2), "the pod on trial stays warm"
            (kept,) = _in_traffic(system)
            system.wait_until(
                "the other pod is removed", lambda: {pod.name for pod in system.pods()} == {kept}, timeout_s=60
            )
        assert load.failed == []
        events = system.cluster.get("events.v1.events.k8s.io", "-n", NAMESPACE)["items"]
        assert "RehearsalStarted" in {event["reason"] for event in events}, json.dumps(events)
    finally:
        _reuse(system, rehearsal_s=0)
