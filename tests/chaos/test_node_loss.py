"""One of two nodes is lost: its pods are replaced, the service keeps answering, the budget covers the gap."""

import time
from collections.abc import Iterator

import pytest

from tests.e2e.system import System, record, steady_then_burst

pytestmark = pytest.mark.cluster("nodes=2")


@pytest.fixture
def lost_node(system: System) -> Iterator[str]:
    """A node to lose, which is back afterwards whatever was found: without it nothing of the cluster can be removed."""
    yield "node-1"
    system.cluster.rejoin_node("node-1")


def test_a_lost_node_is_covered_by_the_budget_until_its_pods_are_replaced(system: System, lost_node: str) -> None:
    system.apply(scaling={"minReplicas": 2, "maxReplicas": 3})
    system.wait_ready(replicas=2)
    if {pod.node for pod in system.pods()} != {"node-0", "node-1"}:
        pytest.fail(f"the pods are not spread over both nodes: {system.pods()}")
    operator_node = system.operator_pod()["spec"]["nodeName"]
    # Two pods hold this at full, the one that is left does at the floor alone.
    arrivals = steady_then_burst(75, calm_per_s=7.5, burst_per_s=7.5, burst_at_s=0, burst_s=0)
    lowest = 1000
    with system.load("node_kill", arrivals) as load:
        time.sleep(8)
        system.cluster.crash_node(lost_node)
        crashed_s = time.monotonic() - load.began_s
        while load.running:
            lowest = min([lowest, *system.budgets().values()])
            time.sleep(0.5)
    stranded = [r for r in load.failed if r.sent_s <= crashed_s + 20]
    late = [r for r in load.failed if r.sent_s > crashed_s + 20]
    record("node_kill", failed_requests=len(load.failed), after_failover=len(late), requests=len(load.answers))
    assert late == [], "the service did not recover"
    assert len(stranded) < len(load.answers)
    system.wait_until(
        "two pods on the surviving node", lambda: sum(p.ready for p in system.pods() if p.node == "node-0") >= 2
    )
    if operator_node == "node-0":
        assert lowest < 1000, "the budget did not cover the gap"
