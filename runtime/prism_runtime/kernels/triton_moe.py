"""The sub-expert layer on a GPU: which cells run, where their rows lie, SwiGLU up and down, and the sum over experts.

Everything can be captured in a CUDA graph: shapes depend on the number of rows alone, nothing waits for the device, and
the live plan is read there, so a graph goes on to be right when operating points change between two replays. Points in
batch mode and points with a cap on a row's cells are chosen by `gating` in torch, which waits for the device.
"""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import triton
from torch import Tensor

from prism_runtime.kernels.activations import recognise
from prism_runtime.kernels.contract import ExpertWeights, GatedLayer, GateWeights
from prism_runtime.kernels.gating import cells_to_run, require_gate
from prism_runtime.kernels.plan import BATCH, PlanTensor
from prism_runtime.kernels.routing import slot_blocks, sub_expert_blocks
from prism_runtime.kernels.triton_choice import choose_cells, compensation_inner
from prism_runtime.kernels.triton_experts import combine, sub_expert_down, sub_expert_up
from prism_runtime.kernels.triton_routing import place_slots

PREFILL_FROM_TOKENS = 256
"""From here on an expert has rows enough for tiles of 64."""
PLACED_SLOTS = 2048
"""Up to here one program places the slots, in time quadratic in their number; beyond it torch sorts them."""
COMBINED_COLUMNS = 256
CHOSEN_CELLS, CHOSEN_DEPTH = 4, 2048
"""Gate outputs of one program, and elements of their sum in one step."""
COMPENSATED_ELEMENTS = 16384
"""Of the compensation's first matrix in one step: 64 registers a thread."""
MOST_SUB_EXPERTS = 62
"""Of an expert: the programs keep them as bits of one integer."""


@dataclass(frozen=True, slots=True)
class Tile:
    """How one of the two products is cut and compiled.

    width   neurons of a tile of the up projection, columns of one of the down projection
    depth   elements of the sum in one step
    """

    width: int
    depth: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, Any]:
        """For the compiler. Fusion is said, because its default changes with Triton 3.10."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a layer is cut.

    rows        rows of a tile
    by_slot     the two orders of work of `routing`; by slot the result is the same in every run, bit for bit
    """

    rows: int
    by_slot: bool
    up: Tile
    down: Tile


DECODE = Tiling(16, True, Tile(32, 128, 4, 4), Tile(64, 64, 4, 4))
"""16 rows are the least that tensor cores take."""
PREFILL = Tiling(64, True, Tile(64, 64, 4, 3), Tile(64, 64, 4, 3))
"""128 rows spill registers on sm_80."""
PREFILL_ATOMIC = Tiling(64, False, Tile(64, 64, 4, 3), Tile(64, 64, 4, 3))


def tiling(tokens: int, deterministic: bool = True) -> Tiling:
    """The tiling for a forward of so many tokens."""
    if tokens < PREFILL_FROM_TOKENS:
        return DECODE
    return PREFILL if deterministic else PREFILL_ATOMIC


@dataclass(frozen=True, slots=True)
class Compensation:
    """A layer's compensations, C of them, as the programs read them; the rank r is the largest, smaller ones padded.

    index  [P]  int32  which one a ladder index has, or -1
    ranks  [C]  int32  before padding
    a [C, H + 1, r], u [C, r, H], c [C, E, N, r]  float32
    """

    index: Tensor
    ranks: Tensor
    a: Tensor
    u: Tensor
    c: Tensor


_STACKED: "WeakKeyDictionary[GatedLayer, Compensation]" = WeakKeyDictionary()


def stacked_compensation(gated: GatedLayer, points: int) -> Compensation | None:
    """The layer's compensations in one tensor each, made at the first call; None if it has none."""
    if not gated.compensation:
        return None
    if gated not in _STACKED:
        ordered = sorted(gated.compensation)
        ranks = [gated.compensation[point].u.shape[0] for point in ordered]
        rank = max(ranks)
        index = torch.full((points,), -1, dtype=torch.int32)
        index[ordered] = torch.arange(len(ordered), dtype=torch.int32)
        device = gated.gate.weight.device

        def stack(name: str, axis: int) -> Tensor:
            parts = []
            for point in ordered:
                part: Tensor = getattr(gated.compensation[point], name)
                missing = list(part.shape)
                missing[axis] = rank - part.shape[axis]
                parts.append(torch.cat((part, part.new_zeros(missing)), axis))
            return torch.stack(parts).contiguous()

        _STACKED[gated] = Compensation(
            index.to(device),
            torch.tensor(ranks, dtype=torch.int32, device=device),
            stack("a", 1),
            stack("u", 0),
            stack("c", 2),
        )
    return _STACKED[gated]


def sub_expert_moe(
    hidden: Tensor,
    expert_ids: Tensor,
    router_weights: Tensor,
    layer: int,
    plan: PlanTensor,
    weights: ExpertWeights,
    gated: GatedLayer | None = None,
    residual_rms: Tensor | None = None,
) -> Tensor:
    """See `contract.SubExpertKernel`."""
    how = tiling(len(hidden))
    if plan.gated_rows:
        require_gate(gated, residual_rms)
    if any(plan.mode_of(point) == BATCH or plan.cap_of(point) for point in plan.gated_rows):
        keep, added = cells_to_run(hidden, expert_ids, router_weights, layer, plan, weights, gated, residual_rms)
        out = run_kept(hidden, expert_ids, router_weights, keep, weights, how)
        return out if added is None else out + added.to(out.dtype)
    work = _Work(hidden, expert_ids, router_weights, weights, how)
    choice = work.choose(layer, plan, None if residual_rms is None else gated, residual_rms)
    return work.combine(choice.keep, work.run(choice.keep), choice)


def run_kept(
    hidden: Tensor, expert_ids: Tensor, router_weights: Tensor, keep: Tensor, weights: ExpertWeights, how: Tiling
) -> Tensor:
    """[T, H]: the weighted sum of the sub-experts with `keep` [T, K, N] set, whatever chose them.

    The down projection's bias is added for every expert of which any sub-expert runs. Raises UnsupportedActivation.
    """
    work = _Work(hidden, expert_ids, router_weights, weights, how)
    kept = keep.to(torch.int8).contiguous()
    return work.combine(kept, work.run(kept))


OF_CHOICE = (
    *("row_class", "class_point", "mode", "outputs", "index", "ranks", "inner", "u"),
    *("ran", "routed", "extra", "spent"),
)
"""Arguments of `combine` that it does not read without a choice."""


@dataclass(frozen=True, slots=True)
class _Choice:
    """What `choose_cells` and `compensation_inner` left for `combine`, which also charges the plan."""

    keep: Tensor
    plan: PlanTensor
    gate: GateWeights | None
    outputs: Tensor
    compensation: Compensation | None
    inner: Tensor | None


class _Work:
    """One forward of one layer: its tensors as the programs want them, and their launches."""

    def __init__(
        self, hidden: Tensor, expert_ids: Tensor, router_weights: Tensor, weights: ExpertWeights, how: Tiling
    ) -> None:
        self.hidden, self.ids = hidden.contiguous(), expert_ids.contiguous()
        self.router = router_weights.float().contiguous()
        self.weights, self.how = weights, how
        self.tokens, self.top_k = expert_ids.shape
        self.experts, self.sub_experts, doubled, self.width = weights.w1.shape
        self.neurons = doubled // 2
        if self.sub_experts > MOST_SUB_EXPERTS:
            raise ValueError(
                f"the Triton kernel takes up to {MOST_SUB_EXPERTS} sub-experts an expert and these have "
                f"{self.sub_experts}; use the kernel 'reference', or refactor with fewer"
            )
        self.inputs: dict[str, Any] = {
            "hidden": self.hidden,
            "expert_ids": self.ids,
            "router_weights": self.router,
        }
        self.shape = {"K": self.top_k, "N": self.sub_experts, "H": self.width}
        self.slots, self.cells = triton.next_power_of_2(self.top_k), triton.next_power_of_2(self.sub_experts)

    def choose(self, layer: int, plan: PlanTensor, gated: GatedLayer | None, residual_rms: Tensor | None) -> _Choice:
        """The cells that run, and what compensates for the others."""
        cells = min(CHOSEN_CELLS, self.cells)
        tiles = triton.cdiv(self.sub_experts, cells)
        keep = self._empty(self.tokens, self.top_k, self.sub_experts, dtype=torch.int8)
        outputs = self._empty(self.tokens, self.top_k, tiles, dtype=torch.int32)
        gate = None if gated is None else gated.gate
        token = None if gate is None else gate.token
        kappa = None if gate is None else gate.kappa
        nothing = plan.tau
        _launch(
            choose_cells,
            (self.tokens * self.top_k, tiles),
            self.inputs
            | _live(plan)
            | {"count": plan.count, "tau": plan.tau, "shift": plan.shift, "keep": keep, "outputs": outputs}
            | {"residual_rms": nothing if residual_rms is None else residual_rms}
            | {"gate": nothing if gate is None else gate.weight, "bias": nothing if gate is None else gate.bias}
            | {"mean": nothing if gate is None else gate.mean, "token": nothing if token is None else token}
            | {"deviation": nothing if gate is None else gate.deviation}
            | {"layer": layer, "kappa": 0.0 if kappa is None else float(kappa)},
            self.shape
            | {"L": plan.count.shape[1], "R": plan.count.shape[2], "E": self.experts}
            | {"GATED": gate is not None, "TOKEN": token is not None, "ADAPTIVE": kappa is not None}
            | {"SLOTS": self.slots, "CELLS": cells, "DEPTH": _power(CHOSEN_DEPTH, self.width)},
            {"num_warps": 8},
        )
        compensation = None if gated is None else stacked_compensation(gated, plan.points)
        inner = None if compensation is None else self._compensate(plan, compensation, keep)
        return _Choice(keep, plan, gate, outputs, compensation, inner)

    def _compensate(self, plan: PlanTensor, compensation: Compensation, keep: Tensor) -> Tensor:
        """[T, r]: what `combine` multiplies with `u`."""
        rank = compensation.u.shape[1]
        ranks = triton.next_power_of_2(rank)
        inner = self._empty(self.tokens, rank)
        _launch(
            compensation_inner,
            (self.tokens,),
            self.inputs
            | {"row_class": plan.row_class, "class_point": plan.class_point, "keep": keep, "inner": inner}
            | {"index": compensation.index, "a": compensation.a, "c": compensation.c},
            self.shape
            | {"E": self.experts, "R": rank, "SLOTS": self.slots, "CELLS": self.cells, "RANK": ranks}
            | {"DEPTH": _power(max(16, COMPENSATED_ELEMENTS // ranks), self.width)},
            {"num_warps": 8},
        )
        return inner

    def run(self, keep: Tensor) -> Tensor:
        """Float32, by slot [T K, H] with rows of slots that run nothing left unwritten, else [T, H]."""
        how, weights = self.how, self.weights
        slot, block_of, start, end = self._table(keep)
        table = {"slot": slot, "block_of": block_of, "start": start, "end": end, "keep": keep}
        records = len(slot) * (self.sub_experts if how.by_slot else 1)
        activated = self._empty(records, self.neurons, dtype=self.hidden.dtype)
        shape = self.shape | {"D": self.neurons, "BY_SLOT": how.by_slot, "ROWS": how.rows, "UPCAST": _interpreted()}
        tile = _tile(how.up.width, self.neurons)
        _launch(
            sub_expert_up,
            (len(block_of), triton.cdiv(self.neurons, tile), self.sub_experts if how.by_slot else 1),
            table
            | {"hidden": self.hidden, "w1": weights.w1, "b1": weights.w1 if weights.b1 is None else weights.b1}
            | {"activated": activated},
            shape
            | {"BIAS": weights.b1 is not None, "ACTIVATION": recognise(weights.activation), "NEURONS": tile}
            | {"DEPTH": _tile(how.up.depth, self.width)},
            how.up.options,
        )
        # By sub-expert rows are added to it; by slot every row that is read later is written.
        shape_of_out = (self.tokens * self.top_k if how.by_slot else self.tokens, self.width)
        out = self._empty(*shape_of_out) if how.by_slot else torch.zeros(shape_of_out, device=self.hidden.device)
        tile = _tile(how.down.width, self.width)
        _launch(
            sub_expert_down,
            (len(block_of), triton.cdiv(self.width, tile)),
            table | {"activated": activated, "w2": weights.w2, "router_weights": self.router, "out": out},
            shape | {"COLUMNS": tile, "DEPTH": _tile(how.down.depth, self.neurons), "CELLS": self.cells},
            how.down.options,
        )
        return out

    def combine(self, keep: Tensor, summed: Tensor, choice: _Choice | None = None) -> Tensor:
        """[T, H]: what `run` gave, over the slots of a row, with biases and compensation; charges a choice's plan."""
        out, b2, nothing = torch.empty_like(self.hidden), self.weights.b2, self.ids
        of_choice: dict[str, Any] = dict.fromkeys(OF_CHOICE, nothing)
        gate, compensation, tiles, rank = None, None, 1, 1
        if choice is not None:
            plan, gate, compensation, tiles = choice.plan, choice.gate, choice.compensation, choice.outputs.shape[2]
            of_choice |= _live(plan) | {"outputs": choice.outputs, "ran": plan.ran, "routed": plan.routed}
            of_choice |= {"extra": plan.extra, "spent": plan.spent}
        if compensation is not None and choice is not None:
            rank = compensation.u.shape[1]
            of_choice |= {"index": compensation.index, "ranks": compensation.ranks, "u": compensation.u}
            of_choice["inner"] = choice.inner
        columns = _power(COMBINED_COLUMNS, self.width)
        _launch(
            combine,
            (self.tokens, triton.cdiv(self.width, columns)),
            {name: tensor for name, tensor in self.inputs.items() if name != "hidden"}
            | {"summed": summed, "keep": keep, "b2": self.weights.w1 if b2 is None else b2, "out": out}
            | of_choice,
            self.shape
            | {"E": self.experts, "D": self.neurons, "R": rank, "TILES": tiles, "BY_SLOT": self.how.by_slot}
            | {"BIAS": b2 is not None, "PLANNED": choice is not None, "GATED": gate is not None}
            | {"TOKEN": gate is not None and gate.token is not None, "COMPENSATED": compensation is not None}
            | {"SLOTS": self.slots, "CELLS": self.cells, "RANK": triton.next_power_of_2(rank), "COLUMNS": columns}
            | {"COUNTS": triton.next_power_of_2(self.top_k * tiles)},
        )
        return out

    def _table(self, keep: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(slots, owner, start, end) of the blocks, as `routing` describes them."""
        slots, rows = self.tokens * self.top_k, self.how.rows
        if not self.how.by_slot:
            by_sub = sub_expert_blocks(self.ids, keep != 0, self.experts, rows)
            return by_sub.slot, by_sub.sub, by_sub.start, by_sub.end
        if slots > PLACED_SLOTS:
            by_slot = slot_blocks(self.ids, keep != 0, self.experts, rows)
            return by_slot.slot, by_slot.expert, by_slot.start, by_slot.end
        # Empty blocks cost little each: a table of few slots may hold many and saves the launch that clears it.
        dense = slots > 4 * self.experts
        blocks = self.experts + slots // rows + 1 if dense else slots
        slot = self._empty(slots, dtype=torch.int32)
        make = torch.zeros if dense else torch.empty
        expert, start, end = make(3, blocks, dtype=torch.int32, device=self.hidden.device)
        here = min(16, triton.next_power_of_2(slots))
        _launch(
            place_slots,
            (triton.cdiv(slots, here),),
            {"expert_ids": self.ids, "keep": keep, "slot": slot, "expert": expert, "start": start, "end": end},
            {"S": slots, "E": self.experts, "N": self.sub_experts, "ROWS": rows, "DENSE": dense, "CELLS": self.cells}
            | {"HERE": here, "STEP": min(64, triton.next_power_of_2(slots))},
        )
        return slot, expert, start, end

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.hidden.device)


def _power(most: int, size: int) -> int:
    """A power of two that covers `size`, or `most`."""
    return min(most, triton.next_power_of_2(size))


def _tile(most: int, size: int) -> int:
    """A power of two, at least 16: what a side of a product's tile may be."""
    return max(16, _power(most, size))


def _interpreted() -> bool:
    return bool(triton.knobs.runtime.interpret)


def _live(plan: PlanTensor) -> dict[str, Any]:
    """Which point every row stands at, as the programs read it."""
    return {"row_class": plan.row_class, "class_point": plan.class_point, "mode": plan.mode}


def _launch(
    program: Any,
    grid: tuple[int, ...],
    arguments: dict[str, Any],
    constants: dict[str, Any],
    options: dict[str, Any] | None = None,
) -> None:
    program[grid](**arguments, **constants, **({} if _interpreted() or options is None else options))
