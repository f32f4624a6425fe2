import pytest

from prism_api.control import ClassDirective, Directive, Envelope, Fence, ServiceReference
from prism_operator.control.guard import directive_violation, replicas_violation
from tests.unit.control.services import cap, model_spec, service_spec


def directive(floor="b750", point="b750", ceiling="full", epoch=3, sequence=4, name="gold", safe="full", digest=None):
    return Directive(
        service=ServiceReference(namespace="team-a", name="chat", uid="uid-1"),
        model_digest=digest,
        holder="operator",
        epoch=epoch,
        sequence=sequence,
        default_class=name,
        classes=[ClassDirective(name=name, ttft_ms=800, point=point, floor=floor, ceiling=ceiling)],
        envelope=Envelope(ttl_ms=30_000, safe_point=safe),
        reason="Steady",
    )


def violation(last=None, epoch=3, spec=None, **changes):
    return directive_violation(directive(**changes), spec or service_spec(), model_spec(), epoch, last)


def test_a_directive_within_every_limit_passes():
    assert violation() is None
    assert violation(last=Fence(epoch=3, sequence=4)) is None
    assert violation(last=Fence(epoch=2, sequence=900)) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"floor": "b500", "point": "b500"}, "lowest point that keeps minRelativeQuality 0.98"),
        ({"floor": "b500"}, "lowest point that keeps"),
        ({"point": "full", "ceiling": "b750"}, "outside"),
        ({"floor": "full", "point": "b750"}, "outside"),
        ({"point": "b999"}, "'b999' is unknown"),
        ({"safe": "b999"}, "safe point"),
        ({"name": "bulk"}, "classes"),
        ({"digest": "sha256:" + "b" * 64}, "artifact"),
        ({"epoch": 2}, "epoch"),
    ],
)
def test_a_directive_beyond_a_limit_is_withheld_with_the_limit(changes, words):
    assert words in violation(**changes)


def test_a_fence_never_goes_back():
    assert "below the last" in violation(last=Fence(epoch=3, sequence=5))


def test_budget_min_raises_the_floor_and_budget_max_is_a_ceiling():
    assert "lowest point" in violation(spec=service_spec(budget={"min": "full"}))
    assert "`budget.max`" in violation(spec=service_spec(budget={"max": "b750"}))
    assert violation(spec=service_spec(budget={"max": "b750"}), ceiling="b750") is None


def test_replicas_stay_within_bounds_and_cap():
    spec = service_spec(**cap("5"))
    assert [replicas_violation(n, spec) is None for n in range(5)] == [False, True, True, False, False]
    assert "cost 7.50 an hour" in replicas_violation(3, spec)
    assert "above `scaling.maxReplicas` 3" in replicas_violation(4, service_spec())
    assert "below `scaling.minReplicas` 2" in replicas_violation(
        1, service_spec(scaling={"minReplicas": 2, "maxReplicas": 3})
    )


def test_replicas_of_an_external_owner_are_obeyed_exactly():
    spec = service_spec(replicas=4, scaling={"control": "External", "maxReplicas": 8})
    assert replicas_violation(4, spec) is None
    assert "owner of /scale asks for 4" in replicas_violation(5, spec)


def test_zero_replicas_are_ordered_only_of_a_service_that_may_sleep():
    asleep = {"minReplicas": 0, "maxReplicas": 3, "idle": {"scaleToZero": "Enabled"}}
    assert replicas_violation(0, service_spec(scaling=asleep)) is None
    assert "serve nobody" in replicas_violation(0, service_spec())


def test_schedules_widen_what_may_be_ordered_and_a_cap_that_only_alerts_does_not_narrow_it():
    night = {"name": "night", "start": "00:00", "end": "06:00", "minReplicas": 1, "maxReplicas": 5}
    spec = service_spec(scaling={"minReplicas": 2, "maxReplicas": 3, "schedules": [night]})
    assert [replicas_violation(n, spec) is None for n in (0, 1, 5, 6)] == [False, True, True, False]
    alert = service_spec(cost={"maxPerHour": "5", "onCap": "Alert"})
    assert replicas_violation(3, alert) is None


def test_advice_runs_every_class_at_full_whatever_the_highest_point():
    assert violation(spec=service_spec(mode="Advisory", budget={"max": "b750"})) is None
