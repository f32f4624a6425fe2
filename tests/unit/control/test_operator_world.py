import pytest

from prism_api.control import ClassCounters, Directive, Held
from prism_operator.control.channel import Answer, Failure, Peer
from prism_operator.control.informer import DeploymentRecord, PodRecord
from prism_operator.control.world import LARGEST_EPOCH_LEAP, ServiceWorld, World
from prism_operator.plan import policy
from tests.unit.control.pod_server import DIGEST, report
from tests.unit.control.services import model_spec, service_spec

KEY = ("team-a", "chat")
UNIX_OFFSET_S = 1_700_000_000.0


def record(uid="pod-1", ready=True, created_s=100.0, ready_s=112.0, **changes):
    fields = {
        "namespace": "team-a",
        "name": uid,
        "uid": uid,
        "service": "chat",
        "ip": "10.0.0.1",
        "node": "n1",
        "phase": "Running",
        "ready": ready,
        "deleting": False,
        "unschedulable": False,
        "created_unix_s": UNIX_OFFSET_S + created_s,
        "ready_unix_s": UNIX_OFFSET_S + ready_s if ready else None,
    }
    return PodRecord(**{**fields, **changes})


def peer(uid="pod-1"):
    return Peer("team-a", "chat", uid, uid, "10.0.0.1")


def heard(service, at_s, uid="pod-1", acknowledges: Directive | None = None, **changes):
    service.see_outcome(Answer(peer(uid), report(uid, **changes), at_s, acknowledges))


def gold(arrived):
    return [ClassCounters(name="gold", arrived=arrived)]


@pytest.fixture
def service():
    world = ServiceWorld(KEY, "uid-1", unix_clock=lambda: UNIX_OFFSET_S + 200.0)
    world.spec, world.model = service_spec(), model_spec()
    world.policy = policy.resolve(world.spec, world.model)
    world.see_pod(None, record())
    return world


def observe(service, now_s=200.0):
    return service.observe(now_s)


def test_the_first_report_is_a_baseline_and_growth_is_handed_over_once(service):
    heard(service, 199.0, classes=gold(1000))
    assert observe(service).classes == {}
    heard(service, 200.0, classes=gold(1010))
    heard(service, 201.0, classes=gold(1025))
    assert observe(service, 201.0).classes["gold"].arrived == 25
    assert observe(service, 202.0).classes == {}


def test_growth_of_several_pods_is_summed(service):
    service.see_pod(None, record("pod-2"))
    for uid in ("pod-1", "pod-2"):
        heard(service, 199.0, uid, classes=gold(0))
        heard(service, 200.0, uid, classes=gold(5))
    assert observe(service).classes["gold"].arrived == 10


def test_an_unheard_class_is_unknown_and_not_idle(service):
    heard(service, 199.0, classes=gold(10))
    observe(service)
    service.see_outcome(Failure(peer(), "Unreachable", "timeout", 200.0))
    assert "gold" not in observe(service).classes


def test_a_pod_is_stale_after_three_missed_polls_and_fresh_again_after_one_answer(service):
    heard(service, 197.0)
    assert not observe(service, 200.0).pods[0].stale
    assert observe(service, 201.0).pods[0].stale
    heard(service, 201.0)
    assert not observe(service, 201.5).pods[0].stale


def test_a_pod_of_another_artifact_is_stale_however_often_it_answers(service):
    heard(service, 200.0, model={"digest": "sha256:" + "b" * 64})
    assert observe(service).pods[0].stale
    heard(service, 200.0, model={"digest": DIGEST})
    assert not observe(service).pods[0].stale


def test_a_pod_whose_counters_fall_is_not_believed_and_nothing_negative_is_counted(service):
    heard(service, 190.0, classes=gold(100))
    heard(service, 200.0, classes=gold(50))
    view = observe(service).pods[0]
    assert view.stale
    assert "fell from 100 to 50" in service.pods["pod-1"].problem
    heard(service, 201.0, classes=gold(55))
    assert observe(service, 201.0).classes["gold"].arrived == 5


def test_a_pod_that_claims_an_impossible_epoch_is_not_believed(service):
    heard(service, 200.0, held=Held(epoch=LARGEST_EPOCH_LEAP + 1, sequence=1))
    assert service.highest_epoch_held == 0
    assert observe(service).pods[0].stale
    heard(service, 200.0, held=Held(epoch=7, sequence=1))
    assert service.highest_epoch_held == 7


def test_times_of_the_cluster_are_moved_to_the_monotonic_clock(service):
    view = observe(service, now_s=5000.0).pods[0]
    assert (view.created_s, view.ready_s) == (4900.0, 4912.0)


def test_pod_ready_time_is_measured_when_a_pod_is_seen_to_become_ready(service):
    starting = record("pod-2", ready=False, created_s=150.0)
    service.see_pod(None, starting)
    service.see_pod(starting, record("pod-2", created_s=150.0, ready_s=163.5))
    assert observe(service).pod_ready_times_s == (13.5,)


def test_nothing_is_decided_before_every_ready_pod_has_answered_or_missed_its_chances(service):
    service.see_pod(None, record("pod-2"))
    heard(service, 200.0)
    assert not service.has_looked()
    for _ in range(3):
        service.see_outcome(Failure(peer("pod-2"), "Unreachable", "timeout", 200.0))
    assert service.has_looked()


def test_a_draining_pod_counts_as_deleting(service):
    heard(service, 200.0, draining=True)
    assert observe(service).ready == ()


def test_an_answer_of_a_pod_that_was_deleted_meanwhile_is_dropped(service):
    service.see_pod(record(), None)
    heard(service, 200.0)
    assert observe(service).pods == ()


def test_only_running_pods_with_an_address_are_called(service):
    service.see_pod(None, record("pod-2", ip=None, ready=False))
    service.see_pod(None, record("pod-3", phase="Succeeded", ready=False))
    assert [p.uid for p in service.peers()] == ["pod-1"]


def test_records_that_came_before_the_service_are_not_lost_and_a_new_uid_is_a_new_service():
    world = World()
    world.see_pod(None, record())
    first = world.service(KEY, "uid-1")
    assert list(first.pods) == ["pod-1"]
    assert world.service(KEY, "uid-1") is first
    assert world.service(KEY, "uid-2") is not first


def test_a_service_that_sleeps_orders_zero_replicas_and_not_what_it_had(service):
    service.see_deployment(DeploymentRecord("team-a", "chat", "u", "chat", "uid-1", None, 2, 2, False, None))
    assert observe(service).ordered_replicas == 2
    service.desired_replicas = 0
    assert observe(service).ordered_replicas == 0


def test_a_wish_to_be_woken_is_told_on_the_clock_of_the_planner(service):
    assert observe(service).woken_s is None
    service.woken_unix_s = UNIX_OFFSET_S + 190.0
    seen = observe(service)
    assert (seen.woken_s, seen.unix_s) == (190.0, UNIX_OFFSET_S + 200.0)
