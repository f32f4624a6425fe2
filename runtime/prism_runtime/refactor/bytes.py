"""The other cost: weight bytes that a decode step reads. Small batches are bound by it, not by multiply-adds.

In one step, tokens of different sequences share every weight that any of them needs. A choice for each token alone then
touches the union of all choices, which fills up as the batch grows; a prefix touches the same share at any batch; a
choice made for the step as a whole can be held to a share of bytes and serve all its tokens. Sequences of one text are
therefore run in batches of their tokens at the same position. Shares are of the bytes that the full model touches in
the same step.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from prism_runtime.kernels.gating import ranks
from prism_runtime.refactor.baselines import MaskedForward, ThresholdGate
from prism_runtime.refactor.bootstrap import Floats, Interval, Resampling
from prism_runtime.refactor.elastic import MULTIPLY_ADDS_OF_A_NEURON, ElasticMethod
from prism_runtime.refactor.masked import LayerInput, MaskedModel, token_ids
from prism_runtime.refactor.method import Choice, Method, Slots
from prism_runtime.refactor.points import kl_at
from prism_runtime.refactor.text import TokenSequence
from prism_runtime.refactor.trace import trace_experts

EXPERTS = "experts"
"""The selection of plain top-k: whole experts."""
STEP_SIZES = (8, 32)
"""Decode batches whose bytes an operating point states; each divides the next."""
COUNTED_SEQUENCES = 64
"""Their positions are steps: 512 of 32 tokens where sequences have 256."""


class StepSelection:
    """Scores sub-experts as `gate` does and picks for the whole step: those with the largest sums of squared scores
    over the step's tokens, until the share `budget` of the touched experts' bytes is spent.

    Whatever is picked runs for every token routed to its expert. A step is the `step_tokens` sequences' tokens at one
    position; slots hold positions fastest.
    """

    def __init__(self, gate: ThresholdGate, budget: float, step_tokens: int, name: str = "step") -> None:
        self.name = name
        self._gate, self._budget, self._step_tokens = gate, budget, step_tokens

    def choose(self, slots: Slots) -> Choice:
        energy = (2 * self._gate.log_scores(slots)).exp()  # [T, K, N]
        experts, sub_experts = len(slots.down), energy.shape[-1]
        place = step_of(len(energy), self._step_tokens)[:, None] * experts + slots.expert_ids  # [T, K]
        steps = len(energy) // self._step_tokens
        sums = energy.new_zeros(steps * experts, sub_experts).index_add_(0, place.flatten(), energy.flatten(0, 1))
        routed = torch.zeros(steps * experts, dtype=torch.bool)
        routed[place.flatten()] = True
        sums = sums.masked_fill(~routed[:, None], -1.0).view(steps, -1)
        wanted = (self._budget * routed.view(steps, -1).sum(-1) * sub_experts).round().long()
        picked = sums.argsort(dim=-1, descending=True, stable=True).argsort(-1) < wanted[:, None]
        return self._gate.keep(slots, picked.view(steps * experts, sub_experts)[place])


class TouchCount:
    """Chooses as `method` does and counts what each step touches.

    length  positions of a sequence, if a batch may hold the sequences of several steps
    """

    def __init__(self, method: Method, step_tokens: int, length: int | None = None) -> None:
        self.name, self.step_tokens = method.name, step_tokens
        self._method, self._length = method, length
        self._touched = self._routed = 0.0

    def choose(self, slots: Slots) -> Choice:
        choice = self._method.choose(slots)
        experts, neurons, _ = slots.down.shape
        steps = len(slots.x) // self.step_tokens
        step = step_of(len(slots.x), self.step_tokens, self._length)
        place = (step[:, None] * experts + slots.expert_ids).flatten()
        touched = torch.zeros(steps * experts, neurons, dtype=torch.int32)
        touched.index_add_(0, place, choice.keep.flatten(0, 1).int())
        self._touched += float((touched > 0).sum())
        self._routed += len(place.unique()) * neurons
        return choice

    @property
    def share(self) -> float:
        """Neurons touched, of those of all experts that a token was routed to. Gates are not in it."""
        return self._touched / self._routed


def touched_shares(
    masked: MaskedModel,
    sequences: Sequence[TokenSequence],
    method: Method,
    fixed: float = 0.0,
    sizes: Sequence[int] = STEP_SIZES,
) -> dict[int, float]:
    """Share of the full model's weight bytes that one step reads, by its size, of a method that chooses for each token.

    fixed  see `StepSubject`
    sizes  ascending, each divides the next; those with more tokens than there are sequences are left out
    """
    mixed = interleave(sequences)[:COUNTED_SEQUENCES]
    counts: list[TouchCount] = []
    for size in (size for size in sizes if size <= len(mixed)):
        method = TouchCount(method, size, len(mixed[0].ids))
        counts.append(method)
    if not counts:
        return {}

    def visit(entering: LayerInput) -> Tensor:
        return masked.masked(method, entering)[0]

    largest = counts[-1].step_tokens
    for start in range(0, len(mixed) // largest * largest, largest):
        masked.run(token_ids(mixed[start : start + largest]), visit)
    return {count.step_tokens: min(1.0, count.share + fixed) for count in counts}


def touched_by_prefixes(
    model: PreTrainedModel,
    sequences: Sequence[TokenSequence],
    counts: Mapping[int, Tensor],
    sub_experts: int,
    sizes: Sequence[int] = STEP_SIZES,
) -> dict[int, dict[int, float]]:
    """`touched_shares` of points that run a prefix by router rank, by budget: their neurons are known from the routing
    alone, so the full model is run once, and its routing stands for theirs.

    counts  budget in per-mille -> [L, K] sub-experts that run, by MoE layer and router rank
    """
    mixed = interleave(sequences)[:COUNTED_SEQUENCES]
    fitting = [size for size in sizes if size <= len(mixed)]
    touched = {permille: dict.fromkeys(fitting, 0.0) for permille in counts}
    routed = dict.fromkeys(fitting, 0)

    def visit(layer: int, hidden: Tensor, expert_ids: Tensor, router_weights: Tensor) -> None:
        rank = ranks(router_weights)
        for size in fitting:
            step = step_of(len(expert_ids), size, len(mixed[0].ids))
            places, index = (step[:, None] * (int(expert_ids.max()) + 1) + expert_ids).unique(return_inverse=True)
            routed[size] += len(places) * sub_experts
            for permille, count in counts.items():
                longest = torch.zeros(len(places), dtype=torch.int64)
                longest.scatter_reduce_(0, index.flatten(), count[layer][rank].flatten().long(), "amax")
                touched[permille][size] += float(longest.sum())

    for start in range(0, len(mixed) // fitting[-1] * fitting[-1] if fitting else 0, max(fitting, default=1)):
        trace_experts(model, mixed[start : start + fitting[-1]], visit)
    return {permille: {size: sums[size] / routed[size] for size in fitting} for permille, sums in touched.items()}


def fixed_reads(method: ElasticMethod, neurons: int, hidden: int, top_k: int) -> float:
    """Share of a touched expert's bytes that are read whatever is kept: its gate, and its part of the compensation.

    A neuron is three rows of the hidden width, a gate's output one. What a layer reads once, at least K experts share.
    """
    sub_experts = method.gates[0].bias.shape[1]
    rows = float(sub_experts)
    if method.compensation is not None:
        rank = len(method.compensation[0].u)
        rows += rank * sub_experts / hidden + 2 * rank / top_k
    return rows / (MULTIPLY_ADDS_OF_A_NEURON * neurons)


def step_of(tokens: int, step_tokens: int, length: int | None = None) -> Tensor:
    """[T]: the step of each token, for sequences of one length laid end to end, `step_tokens` at a time."""
    length = length or tokens // step_tokens
    sequence, position = torch.arange(tokens) // length, torch.arange(tokens) % length
    return sequence // step_tokens * length + position


@dataclass(frozen=True, slots=True)
class Touching:
    """One method in steps of a number of tokens.

    selection  what is selected for: "token", "step" or "prefix", or "experts" for plain top-k
    share      [0, 1] of the full model's weight bytes, fixed reads counted
    kl         [S] mean KL of each sequence, nats
    """

    selection: str
    name: str
    step_tokens: int
    share: float
    kl: Floats


@dataclass(frozen=True, slots=True)
class StepSubject:
    """A method to be run in steps.

    method  makes the method for a number of step tokens; only those that select for a step differ
    fixed   share of a touched expert's bytes that is read beside its neurons, whatever is kept: the gate's weights
    """

    selection: str
    method: Callable[[int], Method]
    fixed: float = 0.0


def measure_touching(
    model: MaskedForward,
    sequences: Sequence[TokenSequence],
    subjects: Sequence[StepSubject],
    step_tokens: int,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Touching]:
    """Run every subject on as many full steps as the sequences give; a rest of them is left out.

    Sequences of different domains share a step, as requests do. `advance` is told the sequences of
    each batch. Raises ValueError if they are too few for one step.
    """
    mixed = interleave(sequences)
    usable = len(mixed) // step_tokens * step_tokens
    if not usable:
        raise ValueError(f"steps of {step_tokens} tokens need as many sequences; found {len(mixed)}: give longer text")
    counts = [TouchCount(subject.method(step_tokens), step_tokens) for subject in subjects]
    divergence: list[list[Tensor]] = [[] for _ in subjects]
    for start in range(0, usable, step_tokens):
        batch = mixed[start : start + step_tokens]
        full = model.log_probabilities(batch, None)
        for count, parts in zip(counts, divergence, strict=True):
            point = model.log_probabilities(batch, count)
            # One sequence at a time: a step's probabilities are large enough without copies of all of them.
            parts.append(torch.stack([(a.exp() * (a - b)).sum(-1).mean() for a, b in zip(full, point, strict=True)]))
        advance(len(batch))
    return [
        Touching(
            subject.selection,
            count.name,
            step_tokens,
            min(1.0, count.share + subject.fixed),
            torch.cat(parts).double().numpy(),
        )
        for subject, count, parts in zip(subjects, counts, divergence, strict=True)
    ]


def interleave(sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
    """The same sequences, one of each domain in turn."""
    seen: dict[str, int] = {}
    ranked = []
    for sequence in sequences:
        seen[sequence.domain] = seen.get(sequence.domain, 0) + 1
        ranked.append((seen[sequence.domain], sequence))
    return [sequence for _, sequence in sorted(ranked, key=lambda pair: pair[0])]


def against_experts(measured: Sequence[Touching], domains: Sequence[str]) -> dict[str, dict[str, Interval]]:
    """For each plain top-k, by name: its KL divided by every selection's at the bytes that it touches itself.

    domains  of the sequences that were measured, in their order; 2 of each at least, else there is no interval and
             nothing is returned
    """
    if min(Counter(domains).values()) < 2:
        return {}
    resampling = Resampling(domains)
    return {
        plain.name: {
            selection: resampling.ratio(plain.kl, kl)
            for selection, kl in best_selection(measured, plain.share).items()
            if selection != EXPERTS
        }
        for plain in measured
        if plain.selection == EXPERTS
    }


def best_selection(measured: Sequence[Touching], share: float) -> dict[str, Floats]:
    """KL of each sequence at one share of touched bytes, by selection, best mean first; between two measured shares
    linear in log KL. A selection that was not measured on both sides of the share is left out.
    """
    found = {}
    for selection in {each.selection for each in measured}:
        curve = [each for each in measured if each.selection == selection]
        at = kl_at(np.array([each.share for each in curve]), np.array([each.kl for each in curve]), share)
        if at is not None:
            found[selection] = at
    return dict(sorted(found.items(), key=lambda pair: float(pair[1].mean())))
