"""A runtime's process is killed under load: its own streams break, everybody else's go on."""

import pytest

from tests.e2e.system import NAMESPACE, System

pytestmark = pytest.mark.cluster("nodes=2")


def test_a_killed_runtime_is_restarted_and_only_its_own_streams_break(system: System) -> None:
    system.apply(scaling={"minReplicas": 2, "maxReplicas": 2})
    system.wait_ready(replicas=2)
    victim = system.pods()[0]
    before = victim.restarts
    arrivals = [(at / 4, 64, 160) for at in range(60)]

    def decoding() -> bool:
        page = system.metrics(victim)
        return page is not None and page.running > 0

    with system.load("pod_kill", arrivals) as load:
        system.wait_until("the victim decodes", decoding)
        system.kill(NAMESPACE, victim.name)
        system.wait_until(
            "the kubelet restarted it",
            lambda: any(pod.name == victim.name and pod.restarts > before for pod in system.pods()),
        )
    broken = load.failed
    assert broken, "the victim had streams in flight"
    ends = ("Payload", "Disconnected", "Reset")
    assert all(any(end in (answer.error or "") for end in ends) for answer in broken), broken
    assert len(broken) < len(load.answers) / 2, "requests that had not reached the victim must go on"
    system.wait_ready(replicas=2)
