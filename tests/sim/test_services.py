"""Several services under one cap: what arbitration gives to whom, and that it never gives more than there is."""

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_operator.plan.fleet import Caps
from prism_operator.simulate.policies import Setting, lengths_of
from prism_operator.simulate.score import score
from prism_operator.simulate.services import Member, Together, play
from prism_operator.simulate.study import Study
from prism_operator.simulate.study import play as play_alone
from prism_operator.simulate.workload import poisson
from tests.unit.plan.factories import profile, service_policy

CALM, BUSY = 4.0, 40.0
START_S = 15.0
Segments = list[tuple[float, float]]


def member(name: str, segments: Segments, most: int = 12, stream: int = 0, **spec: Any) -> Member:
    policy = service_policy(scaling={"minReplicas": 1, "maxReplicas": most}, **spec)

    def workload(seed: int) -> Any:
        return poisson(1000 * seed + stream, segments, prompt=64, output=32, name=policy.default_class)

    return Member(name, Study(policy, profile(), workload, START_S, START_S, initial=2))


def pair(most: int = 12) -> list[Member]:
    """One that becomes busy, and one that stays calm."""
    return [
        member("bursty", [(240.0, CALM), (360.0, BUSY)], most, 1),
        member("calm", [(600.0, CALM)], most, 2),
    ]


def figures(run: Together) -> dict[str, tuple[float, float]]:
    """Attainment and mean quality by service."""
    scores = {one.name: score(fleet, "prism", 0) for one, _, fleet in run.parts}
    return {name: (one.attainment, one.relative_quality or 0.0) for name, one in scores.items()}


def test_who_needs_it_gets_what_the_other_leaves_and_both_stay_within_the_cap() -> None:
    shared = play(pair(), Caps(accelerators=8), seed=0)
    split = play(pair(most=4), Caps(), seed=0)
    assert shared.most_accelerators == 8, "what is there is used, and no more"
    for mine, theirs in zip(figures(shared)["bursty"], figures(split)["bursty"], strict=True):
        assert mine > theirs
    assert figures(shared)["calm"][0] == pytest.approx(figures(split)["calm"][0], abs=0.01)


def test_without_caps_every_service_is_as_if_it_were_alone() -> None:
    run = play(pair(), Caps(), seed=3)
    assert run.plans == []
    for one, _, fleet in run.parts:
        requests = one.study.workload(3)
        setting = Setting(one.study.policy, one.study.profile, lengths_of(requests), one.study.initial)
        alone = play_alone(one.study, setting, "prism", 3, requests)
        assert [request.done_s for request in fleet.finished] == [request.done_s for request in alone.finished]
        assert fleet.attainment() == alone.attainment()


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([2.0, 10.0, 30.0]), min_size=2, max_size=4), min_size=2, max_size=3),
    st.integers(6, 14),
    st.booleans(),
)
def test_no_order_of_any_service_exceeds_what_all_share(rates: list[list[float]], cap: int, money: bool) -> None:
    members = [
        member(f"s{number}", [(90.0, rate) for rate in each], stream=number) for number, each in enumerate(rates)
    ]
    caps = Caps(per_hour=Decimal("2.50") * cap) if money else Caps(accelerators=cap)
    run = play(members, caps, seed=1)
    assert run.most_per_hour <= float(caps.per_hour or cap * Decimal("2.50"))
    assert run.most_accelerators <= cap
