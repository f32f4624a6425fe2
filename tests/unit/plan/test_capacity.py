"""Closed-form capacity: each limit binds where it should, and the simulated engine agrees."""

from dataclasses import replace

import pytest

from prism_operator.plan.capacity import ClassLoad, replicas_for, sustainable_rate, time_per_token_s
from prism_operator.plan.demand import Lengths
from tests.sim.fleet import Fleet, poisson
from tests.unit.plan.factories import POINTS, point_profile, profile, service_policy

LENGTHS = Lengths(64, 32)
CLASS = service_policy().classes[0]


def test_lower_points_hold_more() -> None:
    limits = profile()
    rates = [sustainable_rate(limits.points[name], limits, CLASS, LENGTHS).per_s for name in POINTS]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] / rates[-1] == pytest.approx(1.6, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "tpot_s", "ttft_s", "lengths", "binding"),
    [
        ({"max_sequences": 4}, 10.0, 60.0, LENGTHS, "sequences"),
        ({"kv_tokens": 200}, 10.0, 60.0, LENGTHS, "kv"),
        ({"max_sequences": 4096, "prefill_tokens_per_step": 8}, 10.0, None, LENGTHS, "prefill"),
        ({"max_sequences": 4096}, 0.05, 60.0, LENGTHS, "tpot"),
        ({"max_sequences": 4096, "kv_tokens": 10**7}, 10.0, 0.2, Lengths(256, 8), "ttft"),
    ],
)
def test_the_limit_that_binds_is_named(
    changes: dict[str, int], tpot_s: float, ttft_s: float | None, lengths: Lengths, binding: str
) -> None:
    limits = profile(**changes)
    objectives = replace(CLASS, tpot_s=tpot_s, ttft_s=ttft_s)
    assert sustainable_rate(limits.points["full"], limits, objectives, lengths).binding == binding


def test_objective_that_a_lone_request_misses_leaves_no_capacity() -> None:
    limits = profile()
    capacity = sustainable_rate(limits.points["full"], limits, replace(CLASS, tpot_s=0.02), LENGTHS)
    assert (capacity.per_s, capacity.binding) == (0.0, "tpot")


def test_fit_error_is_taken_off() -> None:
    limits = profile()
    vague = limits.points["full"].model_copy(update={"fit_error_permille": 200})
    exact = sustainable_rate(limits.points["full"], limits, CLASS, LENGTHS).per_s
    assert sustainable_rate(vague, limits, CLASS, LENGTHS).per_s == pytest.approx(0.8 * exact)


def test_point_without_profile_makes_the_need_unknown() -> None:
    loads = [ClassLoad(CLASS, 3.0, LENGTHS)]
    limits = profile(points={"full": point_profile(1.0)})
    assert replicas_for(loads, {"interactive": "b500"}, limits) is None
    assert replicas_for(loads, {"interactive": "full"}, limits) is not None


def test_need_is_linear_in_load_and_zero_without() -> None:
    limits, points = profile(), {"interactive": "full"}
    one = replicas_for([ClassLoad(CLASS, 3.0, LENGTHS)], points, limits)
    two = replicas_for([ClassLoad(CLASS, 6.0, LENGTHS)], points, limits)
    assert one is not None
    assert two == pytest.approx(2 * one)
    assert replicas_for([ClassLoad(CLASS, 0.0, LENGTHS)], points, limits) == 0


def test_a_class_at_full_keeps_the_base_cost_of_the_shared_step_up() -> None:
    limits = profile()
    bulk = replace(CLASS, name="bulk")
    loads = [ClassLoad(CLASS, 2.0, LENGTHS), ClassLoad(bulk, 2.0, LENGTHS)]
    mixed = replicas_for(loads, {"interactive": "full", "bulk": "b500"}, limits)
    low = replicas_for(loads, {"interactive": "b500", "bulk": "b500"}, limits)
    high = replicas_for(loads, {"interactive": "full", "bulk": "full"}, limits)
    assert low is not None
    assert mixed is not None
    assert high is not None
    assert low < mixed < high


@pytest.mark.parametrize("rate", [1.0, 2.0, 3.0])
def test_time_per_token_agrees_with_the_simulated_engine(rate: float) -> None:
    """Within 20 %: the closed form knows no variance, the simulation pays for it."""
    policy = service_policy(budget={"control": "Off"}, scaling={"minReplicas": 1, "maxReplicas": 1})
    fleet = Fleet(policy, profile())
    fleet.run(poisson(11, [(400.0, rate)]), 400.0)
    tokens = sum(one.produced - 1 for one in fleet.finished)
    observed = sum(one.done_s - one.first_s for one in fleet.finished if one.done_s and one.first_s) / tokens
    predicted = time_per_token_s([ClassLoad(policy.classes[0], rate, LENGTHS)], {"interactive": "full"}, profile(), 1)
    assert predicted == pytest.approx(observed, rel=0.20)
