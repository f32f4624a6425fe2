"""The plan tensor: which sub-experts run for which row, on the device where the kernels read it.

Constant tables hold one row per operating point, in ladder order. The live plan is `class_point`, one ladder index per
service class: a swap writes a few integers and never recompiles anything. Rows are attached once per forward; every
layer of that forward reads the same ones, so a row has exactly one operating point. What kernels read lies where it lay
in the last forward, and writing it waits for nothing: a captured CUDA graph of a step stays valid.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PREFIX = 0
"""Selection mode: the first `count` sub-experts of every routed expert run."""

THRESHOLD = 1
"""Selection mode: a sub-expert runs for a row if its predicted contribution reaches `tau`. Rows are independent."""

BATCH = 2
"""Selection mode: the `share` of the cells with the largest predicted contribution runs, over the rows of one point in
one forward. A cell is one sub-expert of one routed expert of one row. A row then depends on its batch mates."""

MODES = {PREFIX: "prefix", THRESHOLD: "threshold", BATCH: "batch"}

PADDING = -1
"""Class of a row that belongs to no request; no sub-expert runs for it and its output is zero."""

UNCAPPED = 0

ROWS_RESERVED = 512
"""Rows of the buffers at first: a decode step has fewer, and a step's prompt tokens are so many at most by default."""


@dataclass(frozen=True, slots=True)
class PlanTables:
    """What an operating point means to the kernels; P points in ladder order, L MoE layers.

    mode   [P]     int32    selection mode; one ladder may mix them
    count  [P, L, R] int32  sub-experts that run of the expert a token's router ranked first, second, ...; R is the
                            router's top-k, or 1 where all ranks get the same. 0 to `sub_experts`, the first rank 1
                            or more. Lower ranks weigh less, so a budget buys more on the higher ones. Read in prefix
                            mode alone
    tau    [P, L]  float32  logarithm of the threshold; read in threshold mode alone
    share  [P, L]  float32  share of the cells that runs, above 0 to 1; read in batch mode alone
    cap    [P]     int32    most cells of one row and layer in threshold mode, at least 1, or UNCAPPED

    Raises ValueError for an unknown mode, a value out of range, or shapes that disagree.
    """

    mode: Tensor
    count: Tensor
    tau: Tensor
    share: Tensor
    cap: Tensor
    sub_experts: int

    def __post_init__(self) -> None:
        points, layers, _ = self.count.shape
        shapes = {"mode": (points,), "tau": (points, layers), "share": (points, layers), "cap": (points,)}
        if any(getattr(self, name).shape != shape for name, shape in shapes.items()):
            found = ", ".join(f"{name} {tuple(getattr(self, name).shape)}" for name in ("count", *shapes))
            raise ValueError(
                f"plan tables disagree: {found}; expected count [P, L, R], mode and cap [P], tau and share [P, L]"
            )
        if unknown := set(self.mode.tolist()) - set(MODES):
            known = ", ".join(f"{number} ({name})" for number, name in MODES.items())
            raise ValueError(f"selection modes {sorted(unknown)} are not known to this version; known: {known}")
        self._check_counts(self.count[self.mode == PREFIX])
        if not self.tau[self.mode == THRESHOLD].isfinite().all():
            raise ValueError("thresholds must be finite; for a point that runs everything use prefix mode")
        share = self.share[self.mode == BATCH]
        if not ((share > 0) & (share <= 1)).all():
            raise ValueError(f"shares of batch points must be above 0 and at most 1; found {share.tolist()}")
        if int(self.cap.min()) < UNCAPPED:
            raise ValueError(f"caps must be 1 or more, or {UNCAPPED} for none; found {self.cap.tolist()}")

    def _check_counts(self, count: Tensor) -> None:
        if not count.numel():
            return
        low, high, first = int(count.min()), int(count.max()), int(count[..., 0].min())
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
        none = torch.zeros(len(count), dtype=torch.int32)
        return cls(
            mode=torch.full_like(none, PREFIX),
            count=count.contiguous(),
            tau=torch.zeros(count.shape[:2]),
            share=torch.ones(count.shape[:2]),
            cap=none,
            sub_experts=sub_experts,
        )

    @property
    def gated(self) -> bool:
        """True if a point needs a gate: not all are prefixes."""
        return bool((self.mode != PREFIX).any())


class PlanTensor:
    """The live plan of one model on one device, and the counters of what it made run.

    class_point  [classes]  int32  ladder index of each service class
    row_class    [T]        int32  class of each row of the current forward, PADDING for none
    ran, routed  []         int64  sub-experts run and sub-experts routed since the last `reset_counters`, summed over
                                   rows and layers
    extra        []         float64  what gates and compensation cost since then, in sub-experts: one is 3 d H
                                   multiply-adds. (ran + extra) / routed is the realised activation budget
    shift        [P]        float32  added to the threshold of a point in every layer; the drift guard's
    spent        [P, 2]     float64  (ran + extra, routed) of the threshold and batch points alone, since the start

    `row_class` and `row_counts` lie in buffers of `rows` rows: they keep their place until a forward has more.

    One thread steps the engine and writes here between forwards; nothing here is locked.
    """

    def __init__(
        self, tables: PlanTables, classes: int, device: torch.device | str = "cpu", rows: int = ROWS_RESERVED
    ) -> None:
        self.sub_experts = tables.sub_experts
        self.mode = tables.mode.to(device)
        # Rows of gated points run no prefix: the prefix path then passes over them as it does over padding.
        self.count = torch.where(tables.mode[:, None, None] == PREFIX, tables.count, 0).to(device)
        self.tau = tables.tau.to(device)
        points = len(tables.mode)
        self.shift = torch.zeros(points, device=device)
        self.spent = torch.zeros(points, 2, dtype=torch.float64, device=device)
        self.class_point = torch.full((classes,), points - 1, dtype=torch.int32, device=device)
        self.ran = torch.zeros((), dtype=torch.int64, device=device)
        self.routed = torch.zeros((), dtype=torch.int64, device=device)
        self.extra = torch.zeros((), dtype=torch.float64, device=device)
        self._host_mode: list[int] = tables.mode.tolist()
        self._host_count: list[list[list[int]]] = self.count.tolist()
        self._host_share: list[list[float]] = tables.share.tolist()
        self._host_cap: list[int] = tables.cap.tolist()
        self._host_point = [points - 1] * classes
        layers, ranks = self.count.shape[1:]
        # By class, and last the zeros that PADDING, which is -1, takes.
        self._class_count = torch.zeros(layers, classes + 1, ranks, dtype=torch.int32, device=device)
        self._reserve(rows)
        self.write(self._host_point)
        self._row_points: set[int] = set()
        self._gated: dict[int, Tensor] = {}
        self._gated_tokens = [0] * points

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
        self.class_point.copy_(torch.tensor(self._host_point, dtype=torch.int32), non_blocking=True)
        self._class_count[:, :-1] = self.count[self.class_point].transpose(0, 1)

    def attach_rows(self, row_class: Sequence[int]) -> None:
        """Say which class each row of the next forward belongs to; must precede every forward."""
        rows = len(row_class)
        if rows > len(self._row_class):
            self._reserve(max(rows, 2 * len(self._row_class)))
        self.row_class = self._row_class[:rows]
        # From ordinary memory such a copy is read before the call returns; unlike a blocking one it does not wait for
        # what the device does.
        self.row_class.copy_(torch.tensor(row_class, dtype=torch.int32), non_blocking=True)
        self._row_count[:, :rows] = self._class_count[:, self.row_class]
        self._row_points = {self._host_point[c] for c in set(row_class) if c != PADDING}
        self._gated = {}
        for gated in sorted(point for point in self._row_points if self._host_mode[point] != PREFIX):
            at = [row for row, c in enumerate(row_class) if c != PADDING and self._host_point[c] == gated]
            self._gated[gated] = torch.tensor(at).to(self.count.device, non_blocking=True)
            self._gated_tokens[gated] += len(at)

    def _reserve(self, rows: int) -> None:
        """New buffers; no row is attached."""
        layers, _, ranks = self._class_count.shape
        self._row_class = torch.zeros(rows, dtype=torch.int32, device=self.count.device)
        self._row_count = torch.zeros(layers, rows, ranks, dtype=torch.int32, device=self.count.device)
        self.row_class = self._row_class[:0]

    # -- what kernels read --------------------------------------------------------------------------------------

    def row_counts(self, layer: int) -> Tensor:
        """[T, R] int32: prefix length of a row, by the router's rank of the expert; 0 for padding and gated rows."""
        return self._row_count[layer, : len(self.row_class)]

    def levels(self, layer: int) -> list[int]:
        """Distinct counts above 0 among the attached rows, ascending; known to the host without a sync."""
        return sorted({count for point in self._row_points for count in self._host_count[point][layer]} - {0})

    @property
    def gated_rows(self) -> dict[int, Tensor]:
        """Threshold and batch points of the attached rows, in ladder order, each with its rows, int64."""
        return self._gated

    def mode_of(self, point: int) -> int:
        return self._host_mode[point]

    def threshold(self, point: int, layer: int) -> Tensor:
        """[] float32: logarithm of the threshold with the drift guard's shift."""
        return self.tau[point, layer] + self.shift[point]

    def share_of(self, point: int, layer: int) -> float:
        return self._host_share[point][layer]

    def cap_of(self, point: int) -> int:
        return self._host_cap[point]

    def charge(self, point: int, ran: Tensor | int, extra: Tensor | float, routed: Tensor | int) -> None:
        """Count one layer's rows of a gated point: sub-experts run, what the rest costs in sub-experts, and routed."""
        self.ran += ran
        self.extra += extra
        self.routed += routed
        self.spent[point, 0] += ran + extra
        self.spent[point, 1] += routed

    # -- counters -----------------------------------------------------------------------------------------------

    def gated_tokens(self, point: int) -> int:
        """Rows of a threshold or batch point since the start; known to the host without a sync."""
        return self._gated_tokens[point]

    def reset_counters(self) -> None:
        self.ran.zero_()
        self.routed.zero_()
        self.extra.zero_()

    @property
    def realised_budget(self) -> float:
        """Share of the routed sub-experts that ran since the last `reset_counters`, with the cost of gates and
        compensation; 1.0 before any row."""
        routed = int(self.routed)
        return (int(self.ran) + float(self.extra)) / routed if routed else 1.0
