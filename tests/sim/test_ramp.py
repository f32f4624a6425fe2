"""llm-d's published run: our reproduction of its law against what was published, and Prism beside it."""

import statistics

import pytest

from prism_operator.plan.policy import resolve
from prism_operator.plan.types import LoopSettings, ServicePolicy
from prism_operator.simulate import ramp
from prism_operator.simulate.baselines.keda_slo import KedaSlo
from prism_operator.simulate.baselines.static import Static
from prism_operator.simulate.control import Controller, Prism
from prism_operator.simulate.fleet import Fleet
from prism_operator.simulate.score import Score, score
from prism_operator.simulate.world import World

SEEDS = (0, 1, 2, 3)


def episode(controller: Controller, seed: int, speed_up: float = 1.5) -> Score:
    profile = ramp.knob(ramp.shipped_profile(ramp.PROFILE), speed_up)
    fleet = Fleet(policy(), profile, ramp.LEAST, lambda n: ramp.START_S, controller, World(seed=seed))
    ramp.play(fleet, seed)
    return score(fleet, controller.name, seed)


def policy() -> ServicePolicy:
    resolved = resolve(ramp.service(), ramp.model(), LoopSettings())
    assert isinstance(resolved, ServicePolicy), str(resolved)
    return resolved


@pytest.fixture(scope="module")
def law() -> list[Score]:
    return [episode(KedaSlo(3.0, 0.1, ramp.LEAST, ramp.MOST), seed) for seed in SEEDS]


def test_the_law_comes_within_two_points_and_a_third_of_a_replica_of_what_was_published(law: list[Score]) -> None:
    assert statistics.fmean(one.attainment for one in law) == pytest.approx(ramp.PUBLISHED_ATTAINMENT, abs=0.02)
    assert statistics.fmean(one.mean_replicas for one in law) == pytest.approx(ramp.PUBLISHED_REPLICAS, abs=0.3)


def test_the_laws_misses_are_first_tokens_in_one_transient(law: list[Score]) -> None:
    """As published: almost entirely TTFT, until the pods of the first capacity crossing are ready."""
    for one in law:
        assert one.tpot_s[2] is not None
        assert one.tpot_s[2] < ramp.TPOT_MS / 1000
        assert (one.ttft_s[0] or 0) < 1.0
        assert one.peak_replicas == ramp.MOST


def test_eight_replicas_meet_every_objective_as_published() -> None:
    assert episode(Static(ramp.MOST), 0).attainment > 0.999


def test_prism_holds_the_objectives_with_a_small_knob_and_gives_up_little_quality_for_it() -> None:
    """At every default, with points that are at most 1.2 times as fast as `full`."""
    for seed in SEEDS[:2]:
        ours = episode(Prism(policy()), seed, 1.2)
        assert ours.attainment >= 0.98
        assert ours.mean_replicas <= ramp.PUBLISHED_REPLICAS
        assert ours.relative_quality is not None
        assert ours.relative_quality >= 0.985
        assert ours.floor_violations == 0


@pytest.mark.parametrize("speed_up", [1.5, 2.0])
def test_prism_attains_more_than_the_law_with_no_more_replicas(law: list[Score], speed_up: float) -> None:
    ours = episode(Prism(policy()), 0, speed_up)
    assert ours.attainment >= law[0].attainment
    assert ours.mean_replicas <= ramp.PUBLISHED_REPLICAS
    assert ours.floor_violations == 0
