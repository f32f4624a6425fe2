"""Figures of a demo from its records."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.demo import results
from examples.demo.records import PodSample
from examples.demo.results import burst_of, histogram_quantile, moment, quantile, replica_seconds, summarise
from tests.unit.demo.episodes import CLASS, LADDER, OBJECTIVES, answer, burst_times, episode, pod, sample


def test_attainment_counts_shed_and_failed_requests_as_missed() -> None:
    answers = [
        answer(),
        answer(outcome="shed", status=429, ttft_s=None, tpot_s=None),
        answer(outcome="failed", status=0, ttft_s=None, tpot_s=None),
        answer(ttft_s=1.6),
        answer(tpot_s=0.21),
    ]
    assert results.attainment(answers, OBJECTIVES) == pytest.approx(1 / 5)


def test_an_answer_exactly_at_its_objectives_is_met() -> None:
    assert results.is_met(answer(ttft_s=1.5, tpot_s=0.2), OBJECTIVES)


def test_an_answer_of_one_token_has_no_time_per_token_to_miss() -> None:
    assert results.is_met(answer(output_tokens=1, tpot_s=None), OBJECTIVES)


def test_a_stream_that_broke_off_is_not_met_though_its_first_token_was_in_time() -> None:
    assert not results.is_met(answer(outcome="failed", error="the stream ended without [DONE]"), OBJECTIVES)


def test_attainment_of_nothing_is_unknown() -> None:
    assert results.attainment([], OBJECTIVES) is None


def test_the_burst_is_found_between_calm_and_calm() -> None:
    burst = burst_of(burst_times(calm_s=20, burst_s=15))
    assert burst is not None
    assert 16 <= burst.onset_s <= 20
    assert 34 <= burst.end_s <= 39


def test_evenly_spaced_arrivals_have_no_burst() -> None:
    assert burst_of([index / 2 for index in range(150)]) is None


@given(st.lists(st.floats(0, 200), max_size=80))
def test_a_burst_lies_within_the_trace_and_ends_after_it_begins(times: list[float]) -> None:
    burst = burst_of(times)
    if burst is not None:
        assert min(times) <= burst.onset_s <= burst.end_s <= max(times)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50), st.floats(0.01, 1))
def test_a_quantile_is_a_value_that_occurred_with_enough_values_below(values: list[float], share: float) -> None:
    found = quantile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values) - 1e-9


def test_replica_seconds_integrate_existing_pods_from_the_start_to_the_end() -> None:
    samples = [sample(-2, existing=1), sample(3, existing=1), sample(5, existing=3), sample(9, existing=2)]
    assert replica_seconds(samples, until_s=10) == pytest.approx(1 * 5 + 3 * 4 + 2 * 1)


def test_replica_seconds_do_not_count_what_was_watched_after_the_end() -> None:
    samples = [sample(0, existing=1), sample(4, existing=2), sample(30, existing=5)]
    assert replica_seconds(samples, until_s=10) == pytest.approx(1 * 4 + 2 * 6)


def test_tokens_of_before_the_first_sample_do_not_count_and_those_of_a_new_pod_all_do() -> None:
    samples = [
        sample(0, pods={"a": pod(tokens={"full": 100})}),
        sample(1, pods={"a": pod(tokens={"full": 130, "b500": 10}), "b": pod(tokens={"b500": 7})}),
        sample(2, pods={"b": pod(tokens={"b500": 9})}),
    ]
    assert results.tokens_by_point(samples) == {"full": 30, "b500": 19}


def test_lag_is_the_share_of_busy_time_during_the_replay() -> None:
    def busy(busy_s: float, lag_s: float) -> PodSample:
        return PodSample({}, 0, 0, {}, busy_s, lag_s)

    samples = [
        sample(0, pods={"a": busy(10, 5)}),
        sample(1, pods={"a": busy(20, 6), "b": busy(10, 1)}),
    ]
    assert results.lag_share(samples) == pytest.approx((1 + 1) / (10 + 10))
    assert results.lag_share([sample(0)]) is None


def test_mean_relative_quality_is_weighted_by_tokens() -> None:
    assert results.mean_relative_quality({"full": 300, "b500": 100}, LADDER) == pytest.approx((300 + 98) / 400)


def test_time_to_the_lower_point_counts_from_the_onset() -> None:
    times = burst_times()
    burst = burst_of(times)
    assert burst is not None
    samples = [sample(t, pods={"a": pod("full" if t < burst.onset_s + 3 else "b750")}) for t in range(60)]
    figures = summarise(episode([answer(t) for t in times], samples))
    assert figures.onset_to_lower_s == pytest.approx(3, abs=1)
    assert figures.lowest_budget == 750


def test_a_first_token_at_a_lower_point_is_seen_before_the_next_sample() -> None:
    times = burst_times()
    burst = burst_of(times)
    assert burst is not None
    answers = [answer(t) for t in times] + [answer(burst.onset_s + 0.5, ttft_s=0.25, point="b750")]
    samples = [sample(0, pods={"a": pod()}), sample(burst.onset_s + 9, pods={"a": pod("b750")})]
    figures = summarise(episode(answers, samples, arrivals_s=times))
    assert figures.onset_to_lower_s == pytest.approx(0.75)


def test_a_dip_before_the_burst_is_not_the_answer_to_it() -> None:
    times = burst_times()
    burst = burst_of(times)
    assert burst is not None
    low = [(5, 8), (burst.onset_s + 4, 70)]
    samples = [
        sample(t, pods={"a": pod("b750" if any(start <= t < end for start, end in low) else "full")}) for t in range(60)
    ]
    figures = summarise(episode([answer(t) for t in times], samples))
    assert figures.onset_to_lower_s == pytest.approx(4, abs=1)


def test_a_budget_that_never_fell_has_no_time_to_fall_or_to_return() -> None:
    times = burst_times()
    figures = summarise(episode([answer(t) for t in times], [sample(t, pods={"a": pod()}) for t in range(60)]))
    assert figures.onset_to_lower_s is None
    assert figures.return_to_full_s is None


def test_return_to_full_counts_from_the_end_of_the_burst_to_the_last_pod() -> None:
    times = burst_times()
    burst = burst_of(times)
    assert burst is not None
    samples = [sample(t, pods={"a": pod("b500" if 22 <= t < 50 else "full"), "b": pod()}) for t in range(70)]
    figures = summarise(episode([answer(t) for t in times], samples))
    assert figures.return_to_full_s == pytest.approx(50 - burst.end_s)


def test_a_moment_knows_nothing_of_what_comes_later() -> None:
    answers = [answer(1.0, end_s=2.0), answer(3.0, end_s=9.0, ttft_s=5.0)]
    samples = [sample(0, pods={"a": pod(waiting=1)}), sample(8, existing=2, pods={"a": pod(waiting=9)})]
    now = moment(episode(answers, samples), at_s=4.0)
    assert (now.attainment, now.waiting, now.ready, now.per_hour) == (1.0, 1, 1, 2.5)
    assert now.arrivals_per_s == pytest.approx(2 / 5)
    assert now.points == {"a": "full"}


def test_a_histograms_quantile_is_linear_within_its_bucket() -> None:
    buckets = {0.005: 50.0, 0.01: 100.0, math.inf: 100.0}
    assert histogram_quantile(buckets, 0.99) == pytest.approx(0.0099)


def test_a_histograms_quantile_beyond_the_largest_bound_is_that_bound() -> None:
    assert histogram_quantile({0.005: 1.0, math.inf: 100.0}, 0.99) == 0.005


def test_a_histogram_without_counts_has_no_quantile() -> None:
    assert histogram_quantile({}, 0.99) is None
    assert histogram_quantile({0.005: 0.0, math.inf: 0.0}, 0.99) is None


@pytest.mark.parametrize(("misses", "verb"), [(0, "raised attainment from 80.0%"), (20, "lowered attainment")])
def test_the_comparison_says_what_the_knob_bought_also_when_it_cost(misses: int, verb: str) -> None:
    def figures(missed: int) -> results.Summary:
        return summarise(episode([answer(float(i), ttft_s=9 if i < missed else 0.2) for i in range(50)], []))

    assert verb in results.comparison(figures(misses), figures(10))


@pytest.mark.parametrize(("misses", "doubted"), [(9, True), (0, False)])
def test_the_comparison_says_when_one_run_cannot_tell_the_difference_from_chance(misses: int, doubted: bool) -> None:
    def figures(missed: int) -> results.Summary:
        return summarise(episode([answer(float(i), ttft_s=9 if i < missed else 0.2) for i in range(50)], []))

    assert ("chance" in results.comparison(figures(misses), figures(10))) is doubted


def test_the_comparison_admits_that_nothing_changed() -> None:
    same = summarise(episode([answer(float(i)) for i in range(50)], []))
    assert "left attainment at 100.0%" in results.comparison(same, same)


def test_the_class_that_is_asked_for_decides_the_lowest_budget() -> None:
    seen = sample(0, pods={"a": pod("b500")})
    assert results.lowest_budget_of(seen, CLASS, LADDER) == 500
    assert results.lowest_budget_of(seen, "batch", LADDER) is None
