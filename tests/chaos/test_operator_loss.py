"""The operator is killed in the middle of a burst: pods go on inside their envelope, and nothing jumps afterwards."""

import time

import pytest

from tests.e2e.system import OPERATOR_NAMESPACE, System, record, steady_then_burst

pytestmark = pytest.mark.cluster("nodes=2")


def test_a_killed_operator_costs_no_request_and_its_successor_resumes_without_a_jump(system: System) -> None:
    system.apply(scaling={"minReplicas": 2, "maxReplicas": 2})
    system.wait_ready(replicas=2)
    epoch = system.status()["budget"]["epoch"]
    samples: list[tuple[float, dict[str, int]]] = []
    arrivals = steady_then_burst(50, calm_per_s=2, burst_per_s=14, burst_at_s=8, burst_s=34)
    with system.load("operator_kill", arrivals) as load:
        system.wait_until("a pod runs below full", lambda: min(system.budgets().values()) < 1000, timeout_s=40)
        replicas = system.deployment()["spec"]["replicas"]
        system.kill(OPERATOR_NAMESPACE, system.operator_pod()["metadata"]["name"])
        killed = time.monotonic()
        while time.monotonic() - killed < 25:
            samples.append((time.monotonic() - killed, system.budgets()))
            time.sleep(0.2)
        system.wait_until(
            "a new epoch is acknowledged",
            lambda: system.status()["budget"]["epoch"] > epoch and system.status()["budget"]["ackedReplicas"] == 2,
            timeout_s=60,
        )
    record("operator_kill", failed_requests=len(load.failed), requests=len(load.answers))
    assert load.failed == []
    floor = system.floor_permille()
    assert all(permille >= floor for _, budgets in samples for permille in budgets.values())
    assert all(permille < 1000 for at, budgets in samples if at < 15 for permille in budgets.values()), (
        f"a pod jumped to full while the burst went on: {samples}"
    )
    assert system.deployment()["spec"]["replicas"] == replicas
    moves = [d for d in system.status()["decisions"] if d["kind"] == "Replicas"]
    assert len(moves) <= 1, f"the replica count flapped: {moves}"
