"""Spec and model to policy: floors, caps, and refusals that say what would work."""

from typing import Any

import pytest

from prism_operator.plan.policy import resolve
from prism_operator.plan.types import Unusable
from tests.unit.plan.factories import model_spec, service_class, service_policy, service_spec


def _refused(**changes: Any) -> Unusable:
    outcome = resolve(service_spec(**changes), model_spec())
    assert isinstance(outcome, Unusable), outcome
    return outcome


def test_floor_is_the_lowest_point_that_keeps_the_quality() -> None:
    classes = [service_class(quality={"minRelativeQuality": "0.95"})]
    assert service_policy(classes=classes).classes[0].floor == "b750"


def test_budget_min_raises_the_floor_and_never_lowers_it() -> None:
    strict = [service_class(quality={"minRelativeQuality": "0.99"})]
    assert service_policy(budget={"min": "b625"}).classes[0].floor == "b625"
    assert service_policy(classes=strict, budget={"min": "b625"}).classes[0].floor == "b875"


def test_quality_of_one_means_the_full_model() -> None:
    classes = [service_class(quality={"minRelativeQuality": "1"})]
    assert service_policy(classes=classes).classes[0].floor == "full"


def test_missing_model_is_not_found() -> None:
    outcome = resolve(service_spec(), None)
    assert isinstance(outcome, Unusable)
    assert (outcome.condition, outcome.reason) == ("ModelResolved", "NotFound")
    assert "'small-moe'" in outcome.message


@pytest.mark.parametrize(
    ("budget", "field"),
    [
        ({"min": "b111"}, "budget.min"),
        ({"max": "b111"}, "budget.max"),
        ({"safePoint": "b111"}, "budget.safePoint"),
        ({"control": "Fixed", "operatingPoint": "b111"}, "budget.operatingPoint"),
    ],
)
def test_unknown_point_is_named_with_its_field_and_the_known_ones(budget: dict[str, Any], field: str) -> None:
    refusal = _refused(budget=budget)
    assert (refusal.condition, refusal.reason) == ("Accepted", "UnknownOperatingPoint")
    assert f"`{field}`" in refusal.message
    assert "b500, b625, b750, b875, full" in refusal.message


def test_floor_above_the_highest_point_is_unreachable() -> None:
    refusal = _refused(classes=[service_class(quality={"minRelativeQuality": "0.99"})], budget={"max": "b750"})
    assert refusal.reason == "FloorUnreachable"
    assert "'b875'" in refusal.message
    assert "`budget.max`" in refusal.message


def test_cost_cap_without_price_is_refused() -> None:
    pools = [{"name": "main", "accelerator": {"name": "cpu"}}]
    refusal = _refused(pools=pools, cost={"maxPerHour": "10"})
    assert refusal.reason == "PriceUnknown"
    assert "`pools[main].pricePerHour`" in refusal.message


def test_cost_cap_below_the_minimum_is_refused() -> None:
    refusal = _refused(cost={"maxPerHour": "4"}, scaling={"minReplicas": 2, "maxReplicas": 3})
    assert "`scaling.minReplicas` 2" in refusal.message


def test_cap_counts_whole_replicas() -> None:
    assert service_policy(cost={"maxPerHour": "9.99"}).cap_replicas == 3
    assert service_policy().cap_replicas is None


def test_model_whose_quality_is_not_monotone_is_not_ready() -> None:
    points = model_spec().to_wire()["operatingPoints"]
    points[0]["relativeQualityLow"] = "0.995"
    outcome = resolve(service_spec(), model_spec(operatingPoints=points))
    assert isinstance(outcome, Unusable)
    assert (outcome.condition, outcome.reason) == ("ModelResolved", "NotReady")
