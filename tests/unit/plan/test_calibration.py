"""A profile that does not agree with what pods do is corrected, slowly and within limits."""

from dataclasses import replace

import pytest

from prism_api.control import in_out_cell
from prism_operator.plan import budget, calibration, demand, replicas
from prism_operator.plan.calibration import LEAST, MOST
from prism_operator.plan.types import (
    BudgetState,
    ClassBudgetState,
    DemandState,
    LoopSettings,
    PodView,
    ReplicaState,
)
from tests.unit.plan.factories import delta, observation, pod, point_profile, profile, service_policy

NAME = "interactive"
POLICY = service_policy(LoopSettings(calibration_s=60.0))
RATE = 3
"""A third of a second's work: 50 ms a token by the profile."""


def _run(tpot_ms: float, seconds: int = 600, pods: tuple[PodView, ...] | None = None, rate: int = RATE) -> DemandState:
    state = DemandState()
    for tick in range(seconds):
        classes = {NAME: delta(rate, tpot_ms=tpot_ms)}
        state = demand.update(state, observation(float(tick), pods or (pod(),), classes=classes), POLICY)
    return state


@pytest.mark.parametrize("tpot_ms", [45.0, 60.0])
def test_profile_that_agrees_within_a_bucket_is_left_alone(tpot_ms: float) -> None:
    assert _run(tpot_ms).cost_factor == pytest.approx(1.0)


def test_profile_that_is_too_optimistic_is_corrected() -> None:
    assert _run(90.0).cost_factor == pytest.approx(1.75, rel=0.2)


@pytest.mark.parametrize(("tpot_ms", "limit"), [(2000.0, MOST), (2.0, LEAST)])
def test_correction_is_clamped(tpot_ms: float, limit: float) -> None:
    assert _run(tpot_ms).cost_factor == pytest.approx(limit, rel=0.01)


def test_correction_is_slow() -> None:
    assert _run(2000.0, seconds=40).cost_factor < 1.7


def test_nothing_is_judged_by_a_few_requests_or_with_silent_pods() -> None:
    assert _run(2000.0, seconds=6).cost_factor == 1.0
    assert _run(2000.0, pods=(pod("a"), pod("b", stale=True))).cost_factor == 1.0


def test_nothing_is_judged_near_saturation() -> None:
    assert _run(2000.0, rate=8).cost_factor == 1.0


def test_nothing_is_judged_by_the_mean_of_a_load_whose_bursts_filled_the_pool() -> None:
    """Three a second on average, but thirty at once: they wait for each other, whatever the profile says."""
    state = DemandState()
    for tick in range(600):
        grown = delta(RATE * 10 if tick % 10 == 0 else 0, tpot_ms=2000.0)
        state = demand.update(state, observation(float(tick), classes={NAME: grown}), POLICY)
    assert state.cost_factor == 1.0


def test_corrected_profile_orders_the_replicas_that_an_optimistic_one_would_not() -> None:
    """Costs half of the true ones: by the profile 8 a second are 0.7 pods, in truth 1.4."""
    optimistic = profile(points={name: point_profile(0.5) for name in profile().points})
    pods = (pod(profile=optimistic),)
    state = replace(_run(90.0, pods=pods, rate=8), since_s=-1000.0)
    history, seen = ReplicaState(since_s=-1000.0), observation(599.0, pods)
    believed, _ = replicas.decide(seen, replace(state, cost_factor=1.0), POLICY, history)
    corrected, _ = replicas.decide(seen, state, POLICY, history)
    assert (believed.recommended, corrected.recommended) == (1, 2)


def test_corrected_profile_lowers_the_budget_that_an_optimistic_one_would_not() -> None:
    optimistic = profile(points={name: point_profile(0.5) for name in profile().points})
    pods = (pod(profile=optimistic),)
    state = _run(90.0, pods=pods, rate=8)
    memory = BudgetState({NAME: ClassBudgetState("full", -1000.0)})
    seen = observation(599.0, pods)
    believed, _ = budget.decide(seen, replace(state, cost_factor=1.0), POLICY, memory)
    corrected, _ = budget.decide(seen, state, POLICY, memory)
    assert believed.by_name(NAME).point == "full"
    assert corrected.by_name(NAME).point != "full"


def test_latencies_seen_with_another_number_of_pods_correct_nothing() -> None:
    state = DemandState()
    for tick in range(240):
        pods = (pod("a"),) if tick % 60 < 50 else (pod("a"), pod("b"))
        classes = {NAME: delta(RATE, tpot_ms=2000.0)}
        state = demand.update(state, observation(float(tick), pods, classes=classes), POLICY)
    assert state.cost_factor == 1.0


def test_factor_on_its_way_to_a_new_value_is_uncertain() -> None:
    moving, settled = _run(90.0, seconds=120), _run(90.0, seconds=2000)
    assert moving.cost_factor < calibration.cautious(moving, POLICY.loop)
    assert moving.cost_variance > settled.cost_variance
    assert calibration.cautious(settled, POLICY.loop) == pytest.approx(settled.cost_factor, rel=0.02)


def test_what_is_uncertain_is_the_average_and_not_each_observation() -> None:
    """Windows of 60 s under a time constant of 120 s: about four that count, so half of a single one's deviation."""
    state = DemandState(cost_factor=1.2, cost_variance=0.04)
    assert calibration.cautious(state, LoopSettings()) == pytest.approx(1.2 + 0.495 * 0.2, abs=0.001)


def test_profile_that_agrees_has_no_uncertainty() -> None:
    state = _run(52.0)
    assert (state.cost_factor, calibration.cautious(state, POLICY.loop)) == (1.0, 1.0)


@pytest.mark.parametrize(("output", "corrected"), [(32, True), (2, False)])
def test_outputs_so_short_that_a_prompt_beside_them_decides_their_time_correct_nothing(
    output: int, corrected: bool
) -> None:
    """The same latency twice; of two tokens, one of which waited for somebody's prompt, it is no measure of a step."""
    state = DemandState()
    for tick in range(300):
        grown = replace(delta(2, prompt=200, output=output, tpot_ms=90.0), in_out=_cells(output, 2))
        state = demand.update(state, observation(float(tick), classes={NAME: grown}), POLICY)
    assert (state.cost_factor != 1.0) is corrected


def _cells(output: int, count: int) -> tuple[int, ...]:
    cells = [0] * 16
    cells[in_out_cell(200, output)] = count
    return tuple(cells)
