"""Offered load: unknown is not zero, a burst counts for the waiting that it makes, noise for none."""

import json
from dataclasses import asdict

import pytest

from prism_operator.plan import demand
from prism_operator.plan.types import ClassDelta, DemandState, ServicePolicy
from tests.unit.plan.factories import delta, demand_of, observation, pod, service_class, service_policy

NAME = "interactive"


def test_class_without_report_is_unknown_and_class_without_arrivals_is_zero() -> None:
    policy = service_policy()
    idle = demand_of(policy, 0)
    silent = idle
    for tick in range(5):
        silent = demand.update(silent, observation(61.0 + tick), policy)
    assert demand.pressing_rate(DemandState(), NAME, policy) is None
    idle_rate = demand.pressing_rate(idle, NAME, policy)
    assert idle_rate is not None
    assert idle_rate.per_s == 0.0
    assert demand.pressing_rate(silent, NAME, policy) is None
    assert demand.long_rate(silent, NAME, policy) is None


def test_missed_polls_leave_the_last_rate_until_it_is_too_old() -> None:
    """Three polls may be missed; two of them are as long as the shortest window."""
    policy = service_policy()
    state, rates = demand_of(policy, 4), []
    for tick in range(1, 5):
        state = demand.update(state, observation(60.0 + tick), policy)
        rates.append(demand.pressing_rate(state, NAME, policy))
    assert [None if rate is None else rate.per_s for rate in rates] == [4.0, 4.0, 4.0, None]


def test_shed_requests_count_as_offered() -> None:
    policy = service_policy()
    state = DemandState()
    for tick in range(11):
        classes = {NAME: ClassDelta(arrived=5, shed=5)}
        state = demand.update(state, observation(float(tick), classes=classes), policy)
    rate = demand.pressing_rate(state, NAME, policy)
    assert rate is not None
    assert rate.per_s == pytest.approx(5.0)


def test_first_observation_only_opens_the_interval() -> None:
    policy = service_policy()
    state = demand.update(DemandState(), observation(10.0, classes={NAME: delta(1000)}), policy)
    assert demand.pressing_rate(state, NAME, policy) is None


def test_repeated_observation_is_counted_once() -> None:
    policy = service_policy()
    state = demand_of(policy, 4)
    again = demand.update(state, observation(60.0, classes={NAME: delta(4)}), policy)
    assert again == state


def test_rate_is_scaled_up_by_the_share_of_pods_heard() -> None:
    policy = service_policy()
    pods = (pod("a"), pod("b", stale=True))
    rate = demand.pressing_rate(demand_of(policy, 4, pods=pods), NAME, policy)
    assert rate is not None
    assert rate.per_s == pytest.approx(8.0)


def _pressing(state: DemandState, resolved: ServicePolicy) -> float:
    rate = demand.pressing_rate(state, NAME, resolved)
    assert rate is not None
    return rate.per_s


def test_steady_load_presses_with_its_rate() -> None:
    policy = service_policy()
    assert _pressing(demand_of(policy, 4), policy) == pytest.approx(4.0)


def test_burst_presses_with_what_lets_its_last_request_wait_no_longer_than_its_patience() -> None:
    """20 in two seconds, and 0.6 of 1.5 s may be waited: the other 19 must be done within 2.9 s."""
    policy = service_policy()
    state = demand_of(policy, 0)
    for tick in (1, 2):
        state = demand.update(state, observation(60.0 + tick, classes={NAME: delta(10)}), policy)
    assert _pressing(state, policy) == pytest.approx(19 / 2.9)


def test_burst_is_forgotten_as_fast_as_a_pool_of_that_capacity_works_it_off() -> None:
    """Nothing came in the eight seconds since, so less capacity is enough to have no late request by now."""
    policy = service_policy()
    state = demand_of(policy, 0)
    state = demand.update(state, observation(61.0, classes={NAME: delta(40)}), policy)
    for tick in range(8):
        state = demand.update(state, observation(62.0 + tick, classes={NAME: delta(0)}), policy)
        assert _pressing(state, policy) == pytest.approx(39 / (tick + 2.9))


def test_burst_that_builds_up_presses_with_what_surely_comes_before_the_next_decision() -> None:
    """49 in the last second: 35 more are as good as certain in the next, and all 83 must be done 0.9 s after that."""
    policy = service_policy()
    state = demand.update(demand_of(policy, 0), observation(61.0, classes={NAME: delta(49)}), policy)
    assert _pressing(state, policy) == pytest.approx((49 + 35 - 1) / 2.9)


def test_what_surely_comes_is_scaled_up_by_the_share_of_pods_heard() -> None:
    policy = service_policy()
    pods = (pod("a"), pod("b", stale=True))
    state = demand.update(demand_of(policy, 0), observation(61.0, pods, classes={NAME: delta(49)}), policy)
    assert _pressing(state, policy) == pytest.approx((2 * (49 + 35) - 1) / 2.9)


def test_a_few_more_arrivals_than_usual_are_noise() -> None:
    policy = service_policy()
    state = demand_of(policy, 2)
    state = demand.update(state, observation(61.0, classes={NAME: delta(4)}), policy)
    assert _pressing(state, policy) == pytest.approx(2.0, rel=0.05)


def test_a_lone_request_waits_for_nobody() -> None:
    policy = service_policy()
    state = demand.update(demand_of(policy, 0), observation(61.0, classes={NAME: delta(1)}), policy)
    assert _pressing(state, policy) == pytest.approx(1 / 60)


def test_class_without_a_ttft_objective_is_patient_for_the_short_window() -> None:
    policy = service_policy(classes=[service_class(objectives={"tpotMilliseconds": 200})])
    state = demand.update(demand_of(policy, 0), observation(61.0, classes={NAME: delta(15)}), policy)
    state = demand.update(state, observation(62.0, classes={NAME: delta(0)}), policy)
    assert _pressing(state, policy) == pytest.approx(14 / 8)


@pytest.mark.parametrize(("arrivals", "lasting"), [((40, 0, 0, 0, 0, 0), 39 / 6.9), ((20,) * 6, 19 / 1.9)])
def test_what_lasts_is_the_least_that_pressed_in_the_short_window(arrivals: tuple[int, ...], lasting: float) -> None:
    """Of a blip what is left of it after six seconds, of a step what pressed in its first."""
    policy = service_policy()
    state = demand_of(policy, 0)
    for tick, count in enumerate(arrivals):
        state = demand.update(state, observation(61.0 + tick, classes={NAME: delta(count)}), policy)
    rate = demand.lasting_rate(state, NAME, policy)
    assert rate is not None
    assert rate.per_s == pytest.approx(lasting)
    assert demand.lasting_rate(DemandState(), NAME, policy) is None


def test_peak_finds_a_burst_that_no_longer_presses() -> None:
    policy = service_policy()
    state = demand.update(demand_of(policy, 0), observation(61.0, classes={NAME: delta(40)}), policy)
    for tick in range(25):
        state = demand.update(state, observation(62.0 + tick, classes={NAME: delta(0)}), policy)
    peak = demand.peak_rate(state, NAME, policy, 30.0)
    assert peak is not None
    assert (peak.per_s, peak.arrivals) == (pytest.approx(39 / 1.9), 40)
    assert _pressing(state, policy) < 2.0
    assert demand.peak_rate(DemandState(), NAME, policy, 30.0) is None


def test_counts_after_a_silence_cover_all_of_it() -> None:
    policy = service_policy()
    state = demand_of(policy, 4)
    state = demand.update(state, observation(61.0), policy)
    state = demand.update(state, observation(62.0), policy)
    state = demand.update(state, observation(63.0, classes={NAME: delta(12)}), policy)
    rate = demand.pressing_rate(state, NAME, policy)
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
