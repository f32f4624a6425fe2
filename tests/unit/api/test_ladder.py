"""The ladder: order of operating points, quality floors, clamping."""

from decimal import Decimal

import pytest

from prism_api.points import Ladder, OperatingPoint


def point(name: str, budget: int, low: str) -> OperatingPoint:
    quality = {"relative_quality": low, "relative_quality_low": low}
    return OperatingPoint.model_validate({"name": name, "budget_permille": budget, "policy": "prefix", **quality})


FULL = point("full", 1000, "1")
B750 = point("b750", 750, "0.97")
B500 = point("b500", 500, "0.91")


def test_points_are_ordered_by_budget_however_they_are_given() -> None:
    ladder = Ladder([FULL, B500, B750])
    assert ladder.names == ["b500", "b750", "full"]
    assert [ladder.index(name) for name in ladder.names] == [0, 1, 2]
    assert len(ladder) == 3
    assert "b750" in ladder
    assert "b800" not in ladder


@pytest.mark.parametrize(
    ("floor", "expected"),
    [("0", "b500"), ("0.91", "b500"), ("0.910001", "b750"), ("0.97", "b750"), ("0.98", "full"), ("1", "full")],
)
def test_the_floor_is_the_smallest_point_whose_lower_bound_keeps_it(floor: str, expected: str) -> None:
    assert Ladder([B500, B750, FULL]).floor_for(Decimal(floor)).name == expected


def test_full_keeps_every_floor_even_if_its_own_bound_was_measured_below_one() -> None:
    assert Ladder([B500, point("full", 1000, "0.999")]).floor_for(Decimal(1)).name == "full"


@pytest.mark.parametrize(("name", "expected"), [("b500", "b750"), ("b750", "b750"), ("full", "full")])
def test_clamping_raises_a_point_to_the_floor(name: str, expected: str) -> None:
    assert Ladder([B500, B750, FULL]).clamp(name, floor="b750", ceiling="full") == expected


def test_clamping_lowers_a_point_to_the_ceiling() -> None:
    assert Ladder([B500, B750, FULL]).clamp("full", floor="b500", ceiling="b750") == "b750"


def test_an_unknown_point_is_answered_with_the_known_ones() -> None:
    with pytest.raises(KeyError, match="unknown operating point 'b800'; known: b500, full"):
        Ladder([B500, FULL]).index("b800")


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "must contain 'full' with budgetPermille 1000"),
        ([B500, B750], "must contain 'full'"),
        ([B500, point("full", 900, "1")], "must contain 'full'"),
        ([B500, B500, FULL], "distinct names and budgets"),
        ([B500, point("other", 500, "0.9"), FULL], "distinct names and budgets"),
        ([point("b500", 500, "0.99"), B750, FULL], "'b500' has 0.99, 'b750' has 0.97"),
    ],
    ids=["empty", "no full", "full too low", "one name twice", "one budget twice", "quality falls"],
)
def test_points_that_are_no_ladder_are_refused(points: list[OperatingPoint], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ladder(points)
