"""The governor that the simulator plays moves as the runtime's does, whatever a pod feels and is told."""

from hypothesis import given, settings
from hypothesis import strategies as st

from prism_api.control import ClassDirective, Directive, Envelope, GovernorSettings, ServiceReference
from prism_operator.simulate.governor import PACE_SMOOTHING, PodGovernor
from prism_runtime.engine.governor import ClassSignals, Governor
from prism_runtime.engine.signals import TPOT_SMOOTHING
from tests.unit.plan.factories import DIGEST, POINTS, service_policy

NAME = "interactive"
LADDER = list(POINTS)
POLICY = service_policy()
TTFT_S, TPOT_S = 1.5, 0.2

orders = st.integers(0, 4).flatmap(lambda top: st.tuples(st.just(top), st.integers(0, top)))
moments = st.tuples(
    st.floats(0.01, 4.0),
    st.one_of(st.none(), st.floats(0.0, 3.0)),
    st.one_of(st.none(), st.floats(0.001, 0.4)),
    st.one_of(st.none(), orders),
)
"""Seconds since the one before, age of the oldest waiting request, length of a step that just ended, a new order."""


def _directive(sequence: int, top: int, floor: int) -> Directive:
    return Directive(
        service=ServiceReference(namespace="demo", name="chat", uid="uid"),
        model_digest=DIGEST,
        holder="operator",
        epoch=1,
        sequence=sequence,
        default_class=NAME,
        classes=[
            ClassDirective(
                name=NAME,
                priority=0,
                ttft_ms=round(1000 * TTFT_S),
                tpot_ms=round(1000 * TPOT_S),
                point=LADDER[top],
                floor=LADDER[floor],
                ceiling=LADDER[top],
            )
        ],
        envelope=Envelope(ttl_ms=3_600_000, safe_point=LADDER[0]),
        governor=GovernorSettings(
            high=round(1000 * POLICY.loop.governor_high),
            low=round(1000 * POLICY.loop.low),
            dwell_down_ms=POLICY.effective.dwell_down_ms,
            dwell_up_ms=POLICY.effective.dwell_up_ms,
        ),
        reason="Steady",
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(moments, max_size=60))
def test_both_governors_stand_at_the_same_point_after_every_step(
    history: list[tuple[float, float | None, float | None, tuple[int, int] | None]],
) -> None:
    real = Governor(POLICY.ladder, model_digest=DIGEST, boot_point="full", now_s=0.0)
    twin = PodGovernor(POLICY, {NAME: "full"}, 0.0)
    real.apply(_directive(1, 4, 0), 0.0)
    twin.order({NAME: "full"}, {NAME: LADDER[0]}, 0.0)
    now_s, sequence, pace_s = 0.0, 1, None
    for gap_s, waited_s, step_s, order in history:
        now_s += gap_s
        if order is not None:
            top, floor = order
            sequence += 1
            real.apply(_directive(sequence, top, floor), now_s)
            twin.order({NAME: LADDER[top]}, {NAME: LADDER[floor]}, now_s)
        pace_s = None if step_s is None else (pace_s or step_s) + TPOT_SMOOTHING * (step_s - (pace_s or step_s))
        twin.stepped([] if step_s is None else [NAME], step_s or 0.0, 1)
        real.tick({NAME: ClassSignals(queue_wait_s=waited_s or 0.0, tpot_s=pace_s)}, now_s)
        twin.follow({} if waited_s is None else {NAME: now_s - waited_s}, now_s)
        assert twin.points == {NAME: LADDER[real.point_of(NAME)]}


def test_both_smooth_the_time_between_tokens_alike() -> None:
    assert PACE_SMOOTHING == TPOT_SMOOTHING


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 3), st.floats(0.0, 100.0))
def test_time_without_work_is_made_up_for_as_if_every_moment_had_been_looked_at(down: int, idle_s: float) -> None:
    at_once, watched = (PodGovernor(POLICY, {NAME: "full"}, 0.0) for _ in range(2))
    for one in (at_once, watched):
        one.order({NAME: "full"}, {NAME: LADDER[0]}, 0.0)
        for step in range(down):
            one.follow({NAME: -10.0}, 1.0 + step)
        one.follow({}, 10.0)
    at_once.idle_until(10.0 + idle_s)
    for moment in range(int(idle_s * 20) + 1):
        watched.follow({}, 10.0 + moment / 20)
    apart = abs(LADDER.index(at_once.points[NAME]) - LADDER.index(watched.points[NAME]))
    assert apart <= 1, "a look every 50 ms may be late by one look a step"
