"""The operator is killed in the middle of a burst: pods go on inside their envelope, and nothing jumps afterwards."""

import time

import pytest

from tests.e2e.system import OPERATOR_NAMESPACE, System, record, steady_then_burst

pytestmark = pytest.mark.cluster("nodes=2")


def test_a_killed_operator_costs_no_request_and_its_successor_resumes_without_a_jump(system: System) -> None:
    earlier = _moves(system, "Replicas")  # of the test before: the service and its history are the same
    floor = 625
    system.apply(scaling={"minReplicas": 2, "maxReplicas": 2}, budget={"min": f"b{floor}"})
    system.wait_ready(replicas=2)
    samples: list[tuple[float, dict[str, int]]] = []
    # Far more than two replicas hold at the point above the lowest, so that the burst keeps both there.
    arrivals = steady_then_burst(58, calm_per_s=2, burst_per_s=20, burst_at_s=6, burst_s=48)
    with system.load("operator_kill", arrivals) as load:
        system.wait_until(
            "both pods run at the lowest point", lambda: set(system.budgets().values()) == {floor}, timeout_s=30
        )
        system.wait_until("the status tells the move", lambda: bool(_moves(system, "Budget")), timeout_s=10)
        told = system.status()["decisions"]
        epoch, replicas = system.status()["budget"]["epoch"], system.deployment()["spec"]["replicas"]
        system.kill(OPERATOR_NAMESPACE, system.operator_pod()["metadata"]["name"])
        killed = time.monotonic()

        def resumed() -> bool:
            samples.append((round(time.monotonic() - killed, 1), system.budgets()))
            budget = system.status()["budget"]
            return bool(budget["epoch"] > epoch and budget["ackedReplicas"] == 2)

        system.wait_until("the restarted operator's directive is acknowledged", resumed, timeout_s=40)
        remembered = system.status()["decisions"]
    record("operator_kill", failed_requests=len(load.failed), requests=len(load.answers))
    assert load.failed == []
    assert len(samples) > 10
    answered = [budgets for _, budgets in samples if budgets]
    assert len(answered) >= 0.9 * len(samples), f"the pods stopped answering: {samples}"
    assert all(set(budgets.values()) == {floor} for budgets in answered), f"a budget jumped: {samples}"
    assert system.deployment()["spec"]["replicas"] == replicas
    # The status keeps the last five: the successor's own, then as many of its predecessor's as have room, newest first.
    own = remembered.index(told[0]) if told[0] in remembered else len(remembered)
    assert own < len(remembered) == min(5, own + len(told)), f"it forgot: {told}, then {remembered}"
    assert remembered[own:] == told[: len(remembered) - own]
    moved = [move for move in _moves(system, "Replicas") if move not in earlier]
    assert len(moved) <= 1, f"the replica count flapped: {system.status()}"


def _moves(system: System, kind: str) -> list[dict[str, object]]:
    """What the status tells of a knob's moves, newest first."""
    return [decision for decision in system.status().get("decisions", []) if decision["kind"] == kind]
