"""The method of this project's recipe: a gate's prediction against a threshold, compensation for what is dropped."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prism_runtime.kernels.contract import CompensationWeights, GateWeights
from prism_runtime.kernels.gating import compensate
from prism_runtime.kernels.plan import UNCAPPED
from prism_runtime.kernels.selection import (
    floor_cells,
    gate_scores,
    keep_above,
    keep_highest,
    log_token_factor,
)
from prism_runtime.refactor.method import Choice, Slots

MULTIPLY_ADDS_OF_A_NEURON = 3
"""In units of the hidden width: a row of each of the gate, up and down projections."""


@dataclass
class ElasticMethod:
    """Selects as the run time does, with the same functions.

    log_tau       [L] thresholds of mode "decode", where every token chooses for itself
    share         [L] of mode "batch": the part of a layer's cells in a batch that run, those of the highest scores
    compensation  one a layer, or None
    cap           of mode "decode": most cells of one token and layer, or UNCAPPED
    """

    gates: Sequence[GateWeights]
    log_tau: Tensor
    compensation: Sequence[CompensationWeights] | None = None
    mode: Literal["decode", "batch"] = "decode"
    share: Sequence[float] = ()
    cap: int = UNCAPPED
    name: str = "prism"
    price: ClassVar[float] = 1.0

    def choose(self, slots: Slots) -> Choice:
        keep, extra = self.cells(slots)
        sub_experts = keep.shape[2]
        added = None
        if self.compensation is not None:
            weights = self.compensation[slots.layer]
            added = compensate(slots.x, slots.expert_ids, slots.router_weights, ~keep, weights)
            rank = len(weights.u)
            extra = extra + compensation_cost(rank, slots.x.shape[1], (~keep).sum((1, 2)))
        neurons = keep.repeat_interleave(slots.activations.shape[2] // sub_experts, dim=2)
        return Choice(neurons, slots.router_weights, added, extra)

    def cells(self, slots: Slots) -> tuple[Tensor, Tensor]:
        """(cells that run [T, K, N], cost of choosing them [T] in neurons)."""
        gate = self.gates[slots.layer]
        decode = self.mode == "decode"
        tau = self.log_tau[slots.layer]
        log_scale = slots.router_weights.log() + log_token_factor(slots.x, slots.rms, gate.token)[:, None]
        scores, outputs = gate_scores(slots.x, slots.expert_ids, log_scale, gate, tau if decode else None)
        valid = torch.ones_like(slots.expert_ids, dtype=torch.bool)
        floor = floor_cells(slots.router_weights, valid, scores.shape[2])
        if decode:
            keep = keep_above(scores, floor, valid, tau, self.cap)
        else:
            keep = keep_highest(scores, floor, valid, self.share[slots.layer])
        return keep, (outputs + float(gate.token is not None)) / MULTIPLY_ADDS_OF_A_NEURON

    def at(self, log_tau: Tensor) -> "ElasticMethod":
        """The same method at other thresholds [L]."""
        return replace(self, log_tau=log_tau)

    def scores(self, slots: Slots) -> Tensor:
        """[T, K, N]: every cell's score, none of it from the gate's mean."""
        gate = self.gates[slots.layer]
        log_scale = slots.router_weights.log() + log_token_factor(slots.x, slots.rms, gate.token)[:, None]
        return gate_scores(slots.x, slots.expert_ids, log_scale, gate, None)[0]


def compensation_cost(rank: int, hidden: int, dropped: Tensor) -> Tensor:
    """In neurons: two products of the rank with the hidden width, and one row of the rank for every dropped cell."""
    return (2 * rank + dropped * rank / hidden) / MULTIPLY_ADDS_OF_A_NEURON
