"""The baselines' laws, each against what its source says."""

import pytest

from prism_operator.simulate.baselines.dynamo import Dynamo
from prism_operator.simulate.baselines.history import histogram_quantile
from prism_operator.simulate.baselines.hpa import Behavior, Hpa, RateLimit
from prism_operator.simulate.baselines.keda_slo import BEHAVIOR, TPOT_BUCKETS_S, KedaSlo
from prism_operator.simulate.baselines.knative import Knative
from prism_operator.simulate.baselines.proteus import Choice, Proteus
from prism_operator.simulate.baselines.slackfit import SlackFit
from prism_operator.simulate.control import PodSignals, Signals


def pod(
    name: str = "pod-0", running: int = 0, waiting: int = 0, token_s: float | None = 0.02, **changes: float
) -> PodSignals:
    fields = {"oldest_wait_s": 0.0, "kv_used": 0.0, "waiting_prompt_tokens": 0, "age_s": 100.0} | changes
    return PodSignals(name=name, running=running, waiting=waiting, token_s=token_s, **fields)  # type: ignore[arg-type]


def signals(now_s: float, pods: list[PodSignals], provisioned: int | None = None, offered: int = 0) -> Signals:
    return Signals(
        now_s=now_s,
        observation=None,
        pods=pods,
        provisioned=len(pods) if provisioned is None else provisioned,
        first_tokens=(),
        predictions=(),
        offered=offered,
    )


def pods(count: int, **changes: float) -> list[PodSignals]:
    return [pod(f"pod-{n}", **changes) for n in range(count)]  # type: ignore[arg-type]


# -- HPA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("running", "wanted"), [(10, 4), (10.9, 4), (12, 5), (20, 8), (5, 2)])
def test_hpa_takes_the_ratio_and_stands_still_inside_the_tolerance(running: float, wanted: int) -> None:
    hpa = Hpa(10, 1, 20, behavior=Behavior(down_window_s=0))
    assert hpa.decide(signals(0, pods(4, running=running))).replicas == wanted


def test_hpa_counts_pods_that_are_not_ready_as_idle_on_the_way_up() -> None:
    """Two of four ready at twice the target: the four together are at it, so nothing is ordered."""
    assert Hpa(10, 1, 20).decide(signals(0, pods(2, running=20), provisioned=4)).replicas == 4
    assert Hpa(10, 1, 20).decide(signals(0, pods(2, running=40), provisioned=4)).replicas == 8


def test_hpa_keeps_the_largest_recommendation_of_five_minutes() -> None:
    hpa = Hpa(10, 1, 20)
    orders = [hpa.decide(signals(15 * n, pods(4, running=10 if n == 0 else 1))).replicas for n in range(22)]
    assert orders[:20] == [4] * 20
    assert orders[20] == 1


def test_a_rate_limit_of_four_pods_or_double_a_period_bounds_a_scale_up() -> None:
    limit = RateLimit(Behavior(up_window_s=0, up_period_s=60), 1, 100)
    assert limit.limit(0, 2, 50) == 6
    assert limit.limit(15, 6, 50) == 6
    assert limit.limit(75, 6, 50) == 12


# -- KEDA with llm-d's law ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("saturation", "provisioned", "ready", "wanted"),
    [
        (0.50, 4, 4, 4),
        (0.60, 4, 4, 5),
        (1.10, 3, 3, 6),
        (2.0, 3, 3, 11),
        (2.0, 6, 3, 11),
        (0.20, 6, 6, 3),
        (0.0, 6, 6, 0),
    ],
)
def test_llmds_law_gives_the_published_replicas(saturation: float, provisioned: int, ready: int, wanted: int) -> None:
    assert KedaSlo(3, 0.1, 3, 8).law(saturation, provisioned, ready) == wanted


def test_llmds_law_takes_no_credit_on_the_way_down() -> None:
    """Credited, 0.5 with half of the pods ready would read as 0.25, and shed replicas in the middle of a scale-up."""
    assert KedaSlo(3, 0.1, 3, 8).law(0.5, 6, 3) == 6


def test_llmds_behavior_goes_down_one_pod_in_two_minutes() -> None:
    limit = RateLimit(BEHAVIOR, 1, 8)
    current, seen = 8, []
    for tick in range(40):
        current = limit.limit(15 * tick, current, 1)
        seen.append(current)
    assert seen.index(7) * 15 == 180, "the count that was found is remembered for a whole window"
    assert seen.index(6) * 15 == 300
    assert seen.index(5) * 15 == 420


def test_a_quantile_of_coarse_buckets_says_58_ms_for_all_of_40_to_60() -> None:
    for tpot_s in (0.041, 0.059):
        assert histogram_quantile(0.9, TPOT_BUCKETS_S, [(tpot_s, 10.0)]) == pytest.approx(0.058)
    assert histogram_quantile(0.9, TPOT_BUCKETS_S, []) is None


# -- Knative --------------------------------------------------------------------------------------------------------


def test_knative_panics_at_twice_what_is_ready_and_keeps_its_maximum_for_a_minute() -> None:
    scaler = Knative(10, 1, 50)
    assert scaler.decide(signals(0, [pod(running=7)])).replicas == 1
    for tick in range(1, 5):
        asked = scaler.decide(signals(2 * tick, [pod(running=30)])).replicas
    assert asked is not None
    assert asked >= 4
    calm = [scaler.decide(signals(10 + 2 * n, pods(4, running=0.1))).replicas for n in range(28)]
    assert min(replicas for replicas in calm if replicas is not None) >= asked
    later = [scaler.decide(signals(80 + 2 * n, pods(4, running=0.1))).replicas for n in range(40)]
    assert later[-1] == 2, "at most half of what is ready at once"


# -- Dynamo ---------------------------------------------------------------------------------------------------------


def dynamo() -> Dynamo:
    return Dynamo(1.0, 0.1, capacity_per_s=2.0, prefill_token_s=0.001, least=1, most=10)


def test_dynamo_adds_one_replica_when_every_engine_is_too_slow_and_none_while_one_starts() -> None:
    slow = pods(2, token_s=0.2)
    assert dynamo().decide(signals(5, slow)).replicas == 3
    assert dynamo().decide(signals(5, slow, provisioned=3)).replicas == 3
    assert dynamo().decide(signals(5, [slow[0], pod("pod-9", token_s=0.09)])).replicas == 2


def test_dynamo_never_goes_below_what_the_rate_needs() -> None:
    scaler = dynamo()
    scaler.decide(signals(0, pods(5, token_s=0.09)))
    scaler.decide(signals(180, pods(5, token_s=0.09), offered=180 * 7))
    assert scaler.decide(signals(185, pods(5, token_s=0.01))).replicas == 4


# -- points ---------------------------------------------------------------------------------------------------------

CHOICES = [Choice("low", 0.9, 4.0), Choice("mid", 0.97, 3.0), Choice("full", 1.0, 2.0)]


def assigned(demand: int) -> list[str]:
    orders = Proteus(4, CHOICES).decide(signals(20, pods(4), offered=demand * 20))
    return sorted(orders.pod_points.values())


def test_proteus_gives_up_as_little_accuracy_as_the_demand_needs() -> None:
    assert assigned(7) == ["full"] * 4
    assert assigned(8) == ["full", "full", "full", "mid"]
    assert assigned(14) == ["low", "low", "low", "mid"] or assigned(14).count("low") >= 2
    assert assigned(100) == ["low"] * 4


def test_slackfit_takes_the_most_accurate_point_whose_latency_fits_the_slack() -> None:
    speeds = {"full": 1.0, "mid": 0.8, "low": 0.5}
    fit = SlackFit(1, ttft_s=1.0, tpot_s=0.1, prefill_token_s=0.001, speeds=speeds)

    def point(**changes: float) -> str:
        return fit.decide(signals(0, [pod(**changes)])).pod_points["pod-0"]  # type: ignore[arg-type]

    assert point(token_s=0.05) == "full"
    assert point(token_s=0.05, waiting=1, oldest_wait_s=0.3, waiting_prompt_tokens=750) == "mid"
    assert point(token_s=0.04, waiting=1, oldest_wait_s=0.9, waiting_prompt_tokens=750) == "low"
