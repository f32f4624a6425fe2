"""What an evaluation measures: an artifact's own operating points, and what they are compared with."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prism_api import FULL
from prism_runtime.kernels.gating import compensate
from prism_runtime.kernels.plan import BATCH, PREFIX
from prism_runtime.refactor.artifact import Artifact
from prism_runtime.refactor.baselines import (
    NeuronEnergies,
    OracleGate,
    Prefix,
    PriorGate,
    RandomSubExperts,
    StaticMask,
    ThresholdGate,
    TopK,
    calibrate_threshold,
    contiguous_groups,
    random_groups,
    sorted_groups,
    strongest_neurons,
)
from prism_runtime.refactor.bytes import EXPERTS, StepSelection, StepSubject, fixed_reads
from prism_runtime.refactor.elastic import ElasticMethod
from prism_runtime.refactor.evaluate import Subject
from prism_runtime.refactor.masked import MaskedModel, capture
from prism_runtime.refactor.method import Choice, Method, Slots
from prism_runtime.refactor.paper import PaperMethod, PaperSettings, fit_paper
from prism_runtime.refactor.progress import Advance
from prism_runtime.refactor.text import TokenSequence
from prism_runtime.refactor.trace import batches

ARTIFACT = "artifact"
TOP_K, TOP_K_RENORMALISED = "top-k", "top-k renormalised"
ORACLE = "oracle gate"
PAPER = "paper"
PAPER_SUB_EXPERTS, PAPER_GATE_NEURONS = 4, 4
PAPER_ROWS = 1500
"""Of an expert: more make the search longer and its objective better by less than its seeds differ."""
STEP_BUDGETS = (0.25, 0.375, 0.5, 0.625, 0.7, 0.775, 0.85, 0.9, 0.95)
"""Of a selection for whole steps. They reach to where per-token selections of a large step read nearly everything."""
DENSE_BUDGETS = (0.75, 0.5, 0.25)
"""Where methods are compared if a token has one expert only, and so no whole number of experts to compare with."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How the MoE layers are cut: L layers of E experts with C neurons in N sub-experts, K routed a token."""

    layers: int
    experts: int
    neurons: int
    sub_experts: int
    top_k: int

    @property
    def budgets(self) -> tuple[float, ...]:
        """Those that whole experts can meet."""
        return tuple(kept / self.top_k for kept in range(self.top_k - 1, 0, -1)) or DENSE_BUDGETS

    def groups(self, sub_experts: int | None = None) -> list[Tensor]:
        return contiguous_groups((self.experts, self.neurons), self.layers, sub_experts or self.sub_experts)


def cut_of(artifact: Artifact) -> Cut:
    shape = artifact.manifest.shape
    return Cut(len(shape.moe_layers), shape.experts, shape.neurons, shape.sub_experts, shape.top_k)


def artifact_subjects(artifact: Artifact) -> list[Subject]:
    """One subject an operating point but `full`, in ladder order, each named as its point."""
    tables, gated = artifact.tables(), artifact.gates()
    nominal = {point.name: point.budget_permille / 1000 for point in artifact.manifest.operating_points}
    subjects = []
    for index, name in enumerate(artifact.manifest.ladder.names):
        if name == FULL:
            continue
        if int(tables.mode[index]) == PREFIX:
            counts = tables.count[index].expand(-1, artifact.manifest.shape.top_k)
            subjects.append(Subject(ARTIFACT, nominal[name], Prefix(name, counts, tables.sub_experts)))
            continue
        compensated = all(index in layer.compensation for layer in gated)
        method = ElasticMethod(
            gates=[layer.gate for layer in gated],
            log_tau=tables.tau[index],
            compensation=[layer.compensation[index] for layer in gated] if compensated else None,
            mode="batch" if int(tables.mode[index]) == BATCH else "decode",
            share=tables.share[index].tolist(),
            cap=int(tables.cap[index]),
            name=name,
        )
        subjects.append(Subject(ARTIFACT, nominal[name], method))
    return subjects


def baseline_subjects(
    masked: MaskedModel,
    cut: Cut,
    text: Sequence[TokenSequence],
    calibration: Sequence[TokenSequence] | None,
    advance: Advance = lambda _: None,
) -> list[Subject]:
    """Every baseline at the budgets of whole experts; oracles on the artifact's partition and on others.

    text         oracles' thresholds are set on it to the budget: they know what is to come in any case
    calibration  static choices take their averages and thresholds from it; without it they are left out
    advance      is told each of `cut.budgets` that is done
    """
    energies = None if calibration is None else _energies(masked, calibration)
    subjects = []
    for budget in cut.budgets:
        if cut.top_k > 1:
            kept = round(budget * cut.top_k)
            subjects += [
                Subject(TOP_K, budget, TopK(kept)),
                Subject(TOP_K_RENORMALISED, budget, TopK(kept, renormalised=True)),
            ]
        cells = round(budget * cut.top_k * cut.sub_experts)
        subjects.append(Subject("random sub-experts", budget, RandomSubExperts(cells, cut.sub_experts)))
        shape = (cut.experts, cut.neurons)
        oracles = [
            OracleGate(ORACLE, cut.groups(), cut.sub_experts),
            OracleGate(
                "oracle gate, random partition", random_groups(shape, cut.layers, cut.sub_experts), cut.sub_experts
            ),
            OracleGate("neuron oracle", cut.groups(cut.neurons), cut.neurons),
        ]
        for gate in oracles:
            subjects.append(_at_budget(masked, gate, text, budget))
        if energies is not None and calibration is not None:
            masks = strongest_neurons(energies, budget)
            subjects.append(Subject("static pruning", budget, StaticMask("static pruning", masks)))
            prior = PriorGate("sorted static", sorted_groups(energies, cut.sub_experts), cut.sub_experts, energies)
            subjects.append(_at_budget(masked, prior, calibration, budget))
        advance(1)
    return subjects


def paper_subjects(
    masked: MaskedModel, cut: Cut, calibration: Sequence[TokenSequence], advance: Advance = lambda _: None
) -> list[Subject]:
    """The published method at the same budgets; `masked`, not permuted before, stands in its partition afterwards.

    Empty if an expert cannot be cut into its four sub-experts. `advance` is told each expert that is searched.
    """
    if cut.neurons % PAPER_SUB_EXPERTS:
        return []
    settings = PaperSettings(
        sub_experts=PAPER_SUB_EXPERTS,
        gate_neurons=min(PAPER_GATE_NEURONS, cut.neurons // PAPER_SUB_EXPERTS),
        rows=PAPER_ROWS,
    )
    rows = capture(masked.model, calibration)
    layers = [
        fit_paper(experts, layer_rows, settings, layer=layer, on_expert=lambda *_: advance(1))
        for layer, (experts, layer_rows) in enumerate(zip(masked.experts, rows, strict=True))
    ]
    masked.permute([layer.perm for layer in layers])
    return [
        Subject(PAPER, budget, PaperMethod(layers, round(budget * cut.top_k * PAPER_SUB_EXPERTS), cut.top_k))
        for budget in cut.budgets
    ]


def step_subjects(artifact: Artifact, cut: Cut) -> list[StepSubject]:
    """What is compared at equal weight bytes: the artifact's points, the same gate choosing for whole steps, uniform
    prefixes and plain top-k."""
    elastic: dict[float, ElasticMethod] = {}
    subjects = []
    for subject in artifact_subjects(artifact):
        if isinstance(subject.method, ElasticMethod):
            elastic[subject.nominal] = subject.method
        else:
            subjects.append(StepSubject("ranked prefix", always(subject.method)))
    return subjects + elastic_step_subjects(elastic, cut, artifact.manifest.shape.hidden) + plain_step_subjects(cut)


def elastic_step_subjects(
    methods: Mapping[float, ElasticMethod], cut: Cut, hidden: int, step_budgets: Sequence[float] = STEP_BUDGETS
) -> list[StepSubject]:
    """Every method as it is, and the gate choosing for whole steps at `step_budgets`.

    methods  by budget. A step's budget is a share of bytes and not of multiply-adds, so it is larger than theirs where
             both read as much; it takes the compensation of the method with the nearest budget
    """
    if not methods:
        return []
    subjects = [
        StepSubject("token", always(method), fixed_reads(method, cut.neurons, hidden, cut.top_k))
        for method in methods.values()
    ]
    for budget in step_budgets:
        method = methods[min(methods, key=lambda nominal: abs(nominal - budget))]
        scores = _for_step(ElasticScores(method, cut), budget)
        subjects.append(StepSubject("step", scores, fixed_reads(method, cut.neurons, hidden, cut.top_k)))
    return subjects


def plain_step_subjects(cut: Cut) -> list[StepSubject]:
    """Uniform prefixes and plain top-k, which know nothing of the token; they read nothing beside their neurons."""
    subjects = []
    for count in range(cut.sub_experts - 1, 0, -1):
        counts = torch.full((cut.layers, cut.top_k), count)
        subjects.append(StepSubject("prefix", always(Prefix(f"prefix {count}", counts, cut.sub_experts))))
    for kept in range(cut.top_k - 1, 0, -1):
        subjects.append(StepSubject(EXPERTS, always(TopK(kept))))
    return subjects


class ElasticScores(ThresholdGate):
    """The scores and the compensation of an elastic method, for a selection that is not its own."""

    def __init__(self, method: ElasticMethod, cut: Cut) -> None:
        super().__init__(method.name, cut.groups(), cut.sub_experts)
        self._method = method

    def log_scores(self, slots: Slots) -> Tensor:
        return self._method.scores(slots)

    def keep(self, slots: Slots, sub_experts: Tensor) -> Choice:
        choice = super().keep(slots, sub_experts)
        if self._method.compensation is None:
            return choice
        weights = self._method.compensation[slots.layer]
        added = compensate(slots.x, slots.expert_ids, slots.router_weights, ~sub_experts, weights)
        return Choice(choice.keep, choice.router_weights, added, choice.extra)


def _energies(masked: MaskedModel, calibration: Sequence[TokenSequence]) -> list[Tensor]:
    collector = NeuronEnergies()
    for batch in batches(calibration):
        masked.log_probabilities(batch, collector)
    return collector.of_layers()


def _at_budget(masked: MaskedModel, gate: ThresholdGate, text: Sequence[TokenSequence], budget: float) -> Subject:
    calibrate_threshold(masked, gate, text, budget)
    return Subject(gate.name, budget, gate)


def always(method: Method) -> Callable[[int], Method]:
    """The same method whatever the size of a step."""
    return lambda step_tokens: method


def _for_step(scores: ThresholdGate, budget: float) -> Callable[[int], Method]:
    return lambda step_tokens: StepSelection(scores, budget, step_tokens, f"step {budget:g}")
