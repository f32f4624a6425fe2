"""Comparing the simulator with the cluster: what counts as evidence, and what the difference is."""

from pathlib import Path
from typing import Any

import pytest

from evidence import planner_cluster
from evidence.figures import NotTaken
from evidence.planner import CLUSTER, COLLECTORS
from evidence.planner_cluster import ELASTIC, HELD, Simulated, differences, figures


def report(elastic: float | None = 0.97, held: float | None = 0.66, **changes: Any) -> dict[str, Any]:
    def summary(attainment: float | None) -> dict[str, Any]:
        return {"attainment": attainment, "lag_share": 0.01, "failed": 0} | changes

    return {"summaries": {ELASTIC: summary(elastic), HELD: summary(held)}}


def test_difference_is_simulated_minus_measured_in_points_for_each_demo() -> None:
    assert differences(ELASTIC, [report(0.97), report(0.99)], 0.98) == pytest.approx([1.0, -1.0])
    assert differences(HELD, [report(held=0.70)], 0.65) == pytest.approx([-5.0])


@pytest.mark.parametrize(
    ("taken", "why"),
    [
        (report(lag_share=0.2), "demo 1: the time by which pods missed their pace is 20.0%, and may be 5%"),
        (report(lag_share=None), "is not known"),
        (report(failed=3), "demo 1: 3 requests failed"),
        (report(elastic=None), "demo 1 has no answers of the service 'elastic'"),
        ({"summaries": {}}, "demo 1 has no answers of the service 'elastic'"),
    ],
)
def test_demo_that_measured_the_machine_and_not_the_service_is_no_evidence(taken: dict[str, Any], why: str) -> None:
    with pytest.raises(NotTaken, match=why):
        differences(ELASTIC, [taken], 0.98)


def test_both_services_become_figures_and_one_that_cannot_be_taken_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner_cluster, "simulated", lambda which, path: Simulated(0.98, 0.01))
    runs = [report(0.96, None), report(0.98, None), report(0.97, None)]
    elastic, held = figures(runs, Path("slice.csv"))
    assert (elastic.id, held.id) == CLUSTER
    assert elastic.value == pytest.approx(1.0)
    assert elastic.low is not None
    assert elastic.low < 1.0
    assert (held.value, held.why) == (None, "demo 1 has no answers of the service 'held'")
    assert set(CLUSTER) <= set(COLLECTORS)


def test_simulation_of_the_shipped_slice_shows_what_the_slice_was_cut_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its burst is for the knob: with it nearly every request meets its objectives, without it many do not."""
    monkeypatch.setattr(planner_cluster, "SEEDS", (0, 1))
    planner_cluster.simulated.cache_clear()
    elastic, held = (planner_cluster.simulated(which, planner_cluster.trace.SHIPPED) for which in (ELASTIC, HELD))
    planner_cluster.simulated.cache_clear()
    assert elastic.mean > 0.95
    assert held.mean < 0.85
