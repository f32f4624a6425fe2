"""Operating points and their order."""

from collections.abc import Iterable, Sequence
from decimal import Decimal
from itertools import pairwise
from typing import Annotated

from pydantic import Field

from prism_api import FULL
from prism_api.base import Document, Name, Ratio


class OperatingPoint(Document):
    """A named, measured setting of the activation budget. Copied from an artifact's manifest, never typed by hand."""

    name: Name = Field(description="Name of the point; `full` runs every routed expert whole.")
    budget_permille: Annotated[int, Field(ge=1, le=1000)] = Field(
        description="Activation budget in per-mille: share of the routed experts' neurons that run, gate cost included."
    )
    policy: Annotated[str, Field(min_length=1, max_length=32)] = Field(
        description="How the budget picks sub-experts; opaque to the operator."
    )
    relative_quality: Ratio = Field(description="exp(-KL) to the full model on held-out text; `1` at `full`.")
    relative_quality_low: Ratio = Field(
        description="Lower 95 % bound of relativeQuality, truncated; quality floors are compared with this value."
    )


class Ladder:
    """The operating points of one model from the smallest budget to `full`: the steps a budget moves on.

    Raises ValueError if names or budgets repeat, `full` is missing or not 1000, or quality falls as budget rises.
    """

    def __init__(self, points: Iterable[OperatingPoint]) -> None:
        ordered = sorted(points, key=lambda p: p.budget_permille)
        names = [p.name for p in ordered]
        if len(set(names)) != len(names) or len({p.budget_permille for p in ordered}) != len(ordered):
            raise ValueError(f"operatingPoints must have distinct names and budgets; found {names}")
        if not ordered or ordered[-1].name != FULL or ordered[-1].budget_permille != 1000:
            raise ValueError(f"operatingPoints must contain '{FULL}' with budgetPermille 1000; found {names}")
        for lower, upper in pairwise(ordered):
            if lower.relative_quality_low > upper.relative_quality_low:
                raise ValueError(
                    f"relativeQualityLow must not fall as budgetPermille rises; '{lower.name}' has "
                    f"{lower.relative_quality_low}, '{upper.name}' has {upper.relative_quality_low}"
                )
        self.points: Sequence[OperatingPoint] = tuple(ordered)
        self._index = {name: i for i, name in enumerate(names)}

    def __len__(self) -> int:
        return len(self.points)

    def __contains__(self, name: object) -> bool:
        return name in self._index

    def __getitem__(self, name: str) -> OperatingPoint:
        return self.points[self.index(name)]

    @property
    def names(self) -> list[str]:
        return list(self._index)

    def index(self, name: str) -> int:
        """Position on the ladder, 0 = smallest budget. Raises KeyError that lists the known points."""
        try:
            return self._index[name]
        except KeyError:
            raise KeyError(f"unknown operating point '{name}'; known: {', '.join(self._index)}") from None

    def floor_for(self, min_relative_quality: Decimal) -> OperatingPoint:
        """Smallest point whose lower quality bound keeps the floor; `full` keeps every floor."""
        return next(p for p in self.points if p.name == FULL or p.relative_quality_low >= min_relative_quality)

    def clamp(self, name: str, floor: str, ceiling: str) -> str:
        """`name` moved into [floor, ceiling]."""
        position = min(max(self.index(name), self.index(floor)), self.index(ceiling))
        return self.points[position].name
