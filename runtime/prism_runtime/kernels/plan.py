"""The plan tensor: which sub-experts run for which row, on the device where the kernels read it.

Constant tables hold one row per operating point, in ladder order. The live plan is `class_point`, one ladder index per
service class: a swap writes a few integers and never recompiles anything. Rows are attached once per forward; every
layer of that forward reads the same ones, so a row has exactly one operating point.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PREFIX = 0
"""Selection mode: the first `count` sub-experts of every routed expert run."""

PADDING = -1
"""Class of a row that belongs to no request; no sub-expert runs for it and its output is zero."""


@dataclass(frozen=True, slots=True)
class PlanTables:
    """What an operating point means to the kernels; P points in ladder order, L MoE layers.

    mode   [P]     int32    selection mode; PREFIX is the only one
    count  [P, L, R] int32  sub-experts that run of the expert a token's router ranked first, second, ...; R is the
                            router's top-k, or 1 where all ranks get the same. 0 to `sub_experts`, the first rank 1
                            or more. Lower ranks weigh less, so a budget buys more on the higher ones
    tau    [P, L]  float32  selection threshold; not read in prefix mode

    Raises ValueError for another mode, a count out of range, or shapes that disagree.
    """

    mode: Tensor
    count: Tensor
    tau: Tensor
    sub_experts: int

    def __post_init__(self) -> None:
        points, layers, _ = self.count.shape
        if self.mode.shape != (points,) or self.tau.shape != (points, layers):
            raise ValueError(
                f"plan tables disagree: mode {tuple(self.mode.shape)}, count {tuple(self.count.shape)}, "
                f"tau {tuple(self.tau.shape)}; expected [P], [P, L, R], [P, L]"
            )
        if unknown := set(self.mode.tolist()) - {PREFIX}:
            raise ValueError(
                f"selection modes {sorted(unknown)} are not known to this version; known: {PREFIX} (prefix)"
            )
        low, high = int(self.count.min()), int(self.count.max())
        first = int(self.count[..., 0].min())
        if low < 0 or first < 1 or high > self.sub_experts:
            raise ValueError(
                f"sub-expert counts must be 0 to {self.sub_experts}, those of the first rank 1 or more; "
                f"found {low} to {high}, first rank {first}"
            )

    @classmethod
    def uniform(cls, counts: Sequence[int], layers: int, sub_experts: int) -> "PlanTables":
        """Prefix tables with one count per operating point, the same in every layer and for every rank."""
        return cls.prefix(torch.tensor(counts, dtype=torch.int32)[:, None, None].expand(-1, layers, 1), sub_experts)

    @classmethod
    def prefix(cls, count: Tensor, sub_experts: int) -> "PlanTables":
        """Prefix tables with these counts [P, L, R]."""
        mode = torch.full((len(count),), PREFIX, dtype=torch.int32)
        return cls(mode, count.contiguous(), torch.zeros(count.shape[:2]), sub_experts)


class PlanTensor:
    """The live plan of one model on one device, and the counters of what it made run.

    class_point  [classes]  int32  ladder index of each service class
    row_class    [T]        int32  class of each row of the current forward, PADDING for none
    ran, routed  []         int64  sub-experts run and sub-experts routed since the last `reset_counters`, summed over
                                   rows and layers; their ratio is the realised activation budget

    One thread steps the engine and writes here between forwards; nothing here is locked.
    """

    def __init__(self, tables: PlanTables, classes: int, device: torch.device | str = "cpu") -> None:
        self.sub_experts = tables.sub_experts
        self.mode = tables.mode.to(device)
        self.count = tables.count.to(device)
        self.tau = tables.tau.to(device)
        points = len(tables.mode)
        self.class_point = torch.full((classes,), points - 1, dtype=torch.int32, device=device)
        self.row_class = torch.zeros(0, dtype=torch.int32, device=device)
        self.ran = torch.zeros((), dtype=torch.int64, device=device)
        self.routed = torch.zeros((), dtype=torch.int64, device=device)
        self._host_count: list[list[list[int]]] = tables.count.tolist()
        self._host_point = [points - 1] * classes
        self._row_count = torch.zeros(self.count.shape[1], 0, self.count.shape[2], dtype=torch.int32, device=device)
        self._row_points: set[int] = set()

    @property
    def points(self) -> int:
        return len(self.mode)

    def check(self, class_point: Sequence[int]) -> None:
        """Raises ValueError unless there is one known ladder index per class."""
        classes = len(self._host_point)
        if len(class_point) != classes or not all(0 <= point < self.points for point in class_point):
            raise ValueError(
                f"class_point must hold {classes} ladder indices from 0 to {self.points - 1}; "
                f"found {tuple(class_point)}"
            )

    def write(self, class_point: Sequence[int]) -> None:
        """Make a plan live. Raises ValueError as `check` does."""
        self.check(class_point)
        self._host_point = list(class_point)
        self.class_point.copy_(torch.tensor(self._host_point, dtype=torch.int32))

    def attach_rows(self, row_class: Sequence[int]) -> None:
        """Say which class each row of the next forward belongs to; must precede every forward."""
        self.row_class = torch.tensor(row_class, dtype=torch.int32, device=self.count.device)
        point = self.class_point[self.row_class.clamp(min=0)]
        count = torch.where(self.row_class[:, None, None] == PADDING, 0, self.count[point])
        self._row_count = count.transpose(0, 1).contiguous()
        self._row_points = {self._host_point[c] for c in set(row_class) if c != PADDING}

    def row_counts(self, layer: int) -> Tensor:
        """[T, R] int32: sub-experts that run for a row, by the router's rank of the expert; 0 for padding."""
        return self._row_count[layer]

    def levels(self, layer: int) -> list[int]:
        """Distinct counts above 0 among the attached rows, ascending; known to the host without a sync."""
        return sorted({count for point in self._row_points for count in self._host_count[point][layer]} - {0})

    def reset_counters(self) -> None:
        self.ran.zero_()
        self.routed.zero_()

    @property
    def realised_budget(self) -> float:
        """Share of the routed sub-experts that ran since the last `reset_counters`; 1.0 before any row."""
        routed = int(self.routed)
        return int(self.ran) / routed if routed else 1.0
