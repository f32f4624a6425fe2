"""Offered load: unknown is not zero, bursts are believed, noise is not."""

import json
from dataclasses import asdict

import pytest

from prism_operator.plan import demand
from prism_operator.plan.types import ClassDelta, DemandState
from tests.unit.plan.factories import delta, demand_of, observation, pod, service_policy

NAME = "interactive"


def test_class_without_report_is_unknown_and_class_without_arrivals_is_zero() -> None:
    policy = service_policy()
    idle = demand_of(policy, 0)
    silent = idle
    for tick in range(5):
        silent = demand.update(silent, observation(61.0 + tick), policy)
    assert demand.short_rate(DemandState(), NAME, policy) is None
    idle_rate = demand.short_rate(idle, NAME, policy)
    assert idle_rate is not None
    assert idle_rate.per_s == 0.0
    assert demand.short_rate(silent, NAME, policy) is None
    assert demand.long_rate(silent, NAME, policy) is None


def test_missed_polls_leave_the_last_rate_until_it_is_too_old() -> None:
    """Three polls may be missed; two of them are as long as the shortest window."""
    policy = service_policy()
    state, rates = demand_of(policy, 4), []
    for tick in range(1, 5):
        state = demand.update(state, observation(60.0 + tick), policy)
        rates.append(demand.short_rate(state, NAME, policy))
    assert [None if rate is None else rate.per_s for rate in rates] == [4.0, 4.0, 4.0, None]


def test_shed_requests_count_as_offered() -> None:
    policy = service_policy()
    state = DemandState()
    for tick in range(11):
        classes = {NAME: ClassDelta(arrived=5, shed=5)}
        state = demand.update(state, observation(float(tick), classes=classes), policy)
    rate = demand.short_rate(state, NAME, policy)
    assert rate is not None
    assert rate.per_s == pytest.approx(5.0)


def test_first_observation_only_opens_the_interval() -> None:
    policy = service_policy()
    state = demand.update(DemandState(), observation(10.0, classes={NAME: delta(1000)}), policy)
    assert demand.short_rate(state, NAME, policy) is None


def test_repeated_observation_is_counted_once() -> None:
    policy = service_policy()
    state = demand_of(policy, 4)
    again = demand.update(state, observation(60.0, classes={NAME: delta(4)}), policy)
    assert again == state


def test_rate_is_scaled_up_by_the_share_of_pods_heard() -> None:
    policy = service_policy()
    pods = (pod("a"), pod("b", stale=True))
    rate = demand.short_rate(demand_of(policy, 4, pods=pods), NAME, policy)
    assert rate is not None
    assert rate.per_s == pytest.approx(8.0)


def test_two_seconds_of_a_burst_are_believed() -> None:
    policy = service_policy()
    state = demand_of(policy, 3)
    for tick in (1, 2):
        state = demand.update(state, observation(60.0 + tick, classes={NAME: delta(9)}), policy)
    rate = demand.short_rate(state, NAME, policy)
    assert rate is not None
    assert rate.per_s == pytest.approx(9.0)


def test_a_few_more_arrivals_than_usual_are_noise() -> None:
    policy = service_policy()
    state = demand_of(policy, 2)
    state = demand.update(state, observation(61.0, classes={NAME: delta(4)}), policy)
    rate = demand.short_rate(state, NAME, policy)
    assert rate is not None
    assert rate.per_s == pytest.approx(2.0, rel=0.05)


def test_counts_after_a_silence_cover_all_of_it() -> None:
    policy = service_policy()
    state = demand_of(policy, 4)
    state = demand.update(state, observation(61.0), policy)
    state = demand.update(state, observation(62.0), policy)
    state = demand.update(state, observation(63.0, classes={NAME: delta(12)}), policy)
    rate = demand.short_rate(state, NAME, policy)
    assert rate is not None
    assert rate.per_s == pytest.approx(4.0)


def test_history_is_bounded_and_keeps_every_count_of_the_window() -> None:
    policy = service_policy()
    state = demand_of(policy, 2, now_s=3000.0, seconds=3000)
    assert len(state.samples[NAME]) < 130
    assert demand.window(state, NAME, 300.0).arrived == pytest.approx(600, abs=20)


def test_mean_lengths_count_requests_in_flight_by_half() -> None:
    policy = service_policy()
    state = demand_of(policy, 1, seconds=5, prompt=64, output=32)
    steady = demand.mean_lengths(state, NAME)
    assert steady is not None
    assert (steady.prompt_tokens, steady.output_tokens) == (64, 32)
    half_done = ClassDelta(arrived=10, prompt_tokens=640, output_tokens=160)
    state = demand.update(state, observation(61.0, classes={NAME: half_done}), policy)
    burst = demand.mean_lengths(state, NAME)
    assert burst is not None
    assert burst.output_tokens == pytest.approx(32.0)


def test_attainment_counts_shed_as_missed_and_is_unknown_without_requests() -> None:
    assert demand.attainment(ClassDelta(met=8, missed=1, shed=1)) == pytest.approx(0.8)
    assert demand.attainment(ClassDelta(cancelled=3)) is None


def test_state_is_plain_enough_for_json() -> None:
    state = demand_of(service_policy(), 4)
    assert json.loads(json.dumps(asdict(state)))["last_s"] == 60.0
