"""What the evaluation says of methods whose effect is known by hand."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from prism_runtime.refactor.baselines import OracleGate, Prefix, TopK, contiguous_groups
from prism_runtime.refactor.bytes import (
    StepSelection,
    StepSubject,
    TouchCount,
    Touching,
    against_experts,
    best_selection,
    interleave,
    measure_touching,
)
from prism_runtime.refactor.evaluate import Subject, Watching, candidates_of, evaluate_methods, run_of
from prism_runtime.refactor.method import Method, Slots
from prism_runtime.refactor.text import TokenSequence
from prism_runtime.refactor.watch import Watch

torch.set_num_threads(1)

SLOTS = Slots(
    layer=0,
    x=torch.zeros(2, 2),
    rms=torch.ones(2),
    expert_ids=torch.tensor([[0, 1], [0, 1]]),
    router_weights=torch.full((2, 2), 0.5),
    activations=torch.tensor([[[4.0, 0], [0, 3]], [[4, 0], [0, 3]]]),
    down=torch.tensor([[[1.0, 0], [1, 0]], [[0, 1], [0, 1]]]),
)
SEQUENCES = [TokenSequence("a", (0, 1)), TokenSequence("b", (0, 1))]


@dataclass
class TwoTokens:
    """A model with a vocabulary of two and one MoE layer that sees `SLOTS`; a method turns its prediction around."""

    log_full: Tensor = field(default_factory=lambda: torch.tensor([0.2, 0.8]).log())
    log_point: Tensor = field(default_factory=lambda: torch.tensor([0.8, 0.2]).log())
    realised: float = 0.0
    realised_by_layer: Sequence[float] = (0.0,)

    def reset(self) -> None:
        self.realised = 0.0

    def log_probabilities(self, batch: Sequence[TokenSequence], method: Method | None) -> Tensor:
        if method is None:
            return self.log_full.expand(len(batch), 2, 2)
        by_token = ("x", "rms", "expert_ids", "router_weights", "activations")
        slots = replace(SLOTS, **{name: getattr(SLOTS, name)[: len(batch)] for name in by_token})
        self.realised = float(method.choose(slots).keep.float().mean())
        self.realised_by_layer = [self.realised]
        return self.log_point.expand(len(batch), 2, 2)


def test_kl_cross_entropy_and_flips_of_a_turned_prediction() -> None:
    (row,) = evaluate_methods(TwoTokens(), SEQUENCES, [Subject("top-k", 0.5, TopK(1))])
    assert row.kl.tolist() == pytest.approx([0.6 * np.log(4)] * 2)
    assert (row.median, row.p99, row.largest) == pytest.approx([0.6 * np.log(4)] * 3)
    assert row.cross_entropy.tolist() == pytest.approx([-np.log(0.2)] * 2)
    assert row.same_top1.tolist() == [0.0, 0.0]
    assert row.lost.tolist() == [1.0, 1.0]  # the target is 1: the full model was right, the point is wrong
    assert row.gained.tolist() == [0.0, 0.0]
    assert (row.realised, row.realised_by_layer) == (0.5, [0.5])


def test_the_full_model_against_itself_has_no_kl_and_no_flips() -> None:
    model = TwoTokens(log_point=torch.tensor([0.2, 0.8]).log())
    (row,) = evaluate_methods(model, SEQUENCES, [Subject("top-k", 1.0, TopK(2))])
    assert row.kl.tolist() == [0.0, 0.0]
    assert row.same_top1.tolist() == [1.0, 1.0]
    assert row.lost.tolist() == row.gained.tolist() == [0.0, 0.0]


def test_measurements_become_candidates_and_runs() -> None:
    model = TwoTokens()
    sequences = [*SEQUENCES, *SEQUENCES]
    rows = evaluate_methods(model, sequences, [Subject("top-k", 0.5, TopK(1)), Subject("top-k", 1.0, TopK(2))])
    candidates = candidates_of(rows)
    assert candidates.nominal.tolist() == candidates.realised.tolist() == [0.5, 1.0]
    assert candidates.kl.shape == (2, 4)
    assert run_of(rows, ["a", "b", "a", "b"]).kl.tolist() == pytest.approx([0.6 * np.log(4)] * 2)


def test_watching_fills_in_layer_errors_on_both_trajectories_and_leaves_the_choice_alone() -> None:
    watching = Watching(layers=1, sub_experts=2, every=1)
    (row,) = evaluate_methods(TwoTokens(), SEQUENCES, [Subject("top-k", 0.5, TopK(1))], watching)
    assert row.sparse is not None
    assert row.dense is not None
    assert row.sparse.error == row.dense.error == pytest.approx([3 / 5])  # of (2, 1.5) only (2, 0) ran
    assert row.realised == 0.5


def test_a_watched_method_on_the_dense_trajectory_runs_everything() -> None:
    watch = Watch(TopK(1), layers=1, sub_experts=2, dense=True)
    watch.domains = ["a", "b"]
    assert watch.choose(SLOTS).keep.all()


def test_captured_energy_is_compared_with_the_best_choice_of_the_same_number() -> None:
    oracle = OracleGate("oracle", contiguous_groups((2, 2), 1, 2), 2)
    watch = Watch(Prefix("prefix", torch.tensor([[1, 1]]), 2), layers=1, sub_experts=2, dense=False, oracle=oracle)
    watch.domains = ["a", "b"]
    watch.choose(SLOTS)
    seen = watch.observation()
    assert seen.captured == pytest.approx([16 / 25])
    assert seen.capturable == pytest.approx([1.0])
    assert seen.usage == {"a": [[1.0, 0.0]], "b": [[1.0, 0.0]]}


# -- bytes touched in a decode step: sequences are rows 0..S-1, 2 positions each -------------------------------------

STEPS = Slots(
    layer=0,
    x=torch.zeros(4, 2),
    rms=torch.ones(4),
    expert_ids=torch.tensor([[0], [1], [0], [2]]),  # position 0: expert 0 twice; position 1: experts 1 and 2
    router_weights=torch.ones(4, 1),
    activations=torch.tensor([[[3.0, 1]], [[1, 5]], [[1, 2]], [[1, 4]]]),
    down=torch.tensor([[[1.0, 0], [0, 1]]]).expand(3, 2, 2),
)


def neuron_gate(log_tau: float) -> OracleGate:
    gate = OracleGate("oracle", contiguous_groups((3, 2), 1, 2), 2)
    gate.log_tau = torch.tensor([log_tau])
    return gate


def test_tokens_of_one_step_share_what_they_touch() -> None:
    counted = TouchCount(neuron_gate(float(torch.tensor(1.5).log())), step_tokens=2)
    keep = counted.choose(STEPS).keep
    assert keep[:, 0].int().tolist() == [[1, 0], [0, 1], [0, 1], [0, 1]]
    # Step 0 touches both neurons of expert 0, step 1 one of expert 1 and one of expert 2: 4 of 2 + 4.
    assert counted.share == pytest.approx(4 / 6)


def test_tokens_alone_touch_what_they_keep() -> None:
    counted = TouchCount(neuron_gate(float(torch.tensor(1.5).log())), step_tokens=1)
    counted.choose(STEPS)
    assert counted.share == pytest.approx(4 / 8)


def test_a_step_selection_spends_its_bytes_on_the_step_s_largest_sums() -> None:
    selection = StepSelection(neuron_gate(0.0), budget=0.5, step_tokens=2)
    counted = TouchCount(selection, step_tokens=2)
    keep = counted.choose(STEPS).keep[:, 0].int().tolist()
    # Step 0: expert 0 sums 9 + 1 and 1 + 4, one of two is bought. Step 1: 25 and 16 are the best two of four.
    assert keep == [[1, 0], [0, 1], [1, 0], [0, 1]]
    assert counted.share == pytest.approx(0.5)


def test_domains_take_turns_in_a_step() -> None:
    given = [TokenSequence("a", (1,)), TokenSequence("a", (2,)), TokenSequence("b", (3,)), TokenSequence("b", (4,))]
    assert [sequence.ids[0] for sequence in interleave(given)] == [1, 3, 2, 4]


def test_too_few_sequences_for_one_step_are_refused() -> None:
    with pytest.raises(ValueError, match="steps of 8 tokens need as many sequences; found 2"):
        measure_touching(TwoTokens(), SEQUENCES, [], 8)


def test_selections_are_compared_at_one_share_of_bytes() -> None:
    def touching(selection: str, share: float, kl: float) -> Touching:
        return Touching(selection, selection, 8, share, np.array([kl, kl]))

    measured = [touching("token", 0.4, 0.04), touching("token", 0.6, 0.01), touching("experts", 0.5, 0.1)]
    found = best_selection(measured, 0.5)
    assert list(found) == ["token", "experts"]
    assert found["token"].tolist() == pytest.approx([0.02, 0.02])
    assert list(best_selection(measured, 0.45)) == ["token"]


def test_top_k_is_divided_by_every_other_selection_at_its_own_bytes() -> None:
    def touching(selection: str, share: float, kl: float) -> Touching:
        return Touching(selection, f"{selection} {share}", 8, share, np.array([kl, 2 * kl]))

    measured = [touching("token", 0.4, 0.04), touching("token", 0.6, 0.01), touching("experts", 0.5, 0.1)]
    found = against_experts(measured, ["a", "a"])
    assert list(found) == ["experts 0.5"]
    assert list(found["experts 0.5"]) == ["token"]
    ratio = found["experts 0.5"]["token"]
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx((5.0, 5.0, 5.0))
    assert against_experts(measured, ["a", "b"]) == {}


def test_fixed_reads_are_part_of_the_touched_share() -> None:
    subject = StepSubject("experts", lambda _: TopK(1), fixed=0.125)
    (row,) = measure_touching(TwoTokens(), SEQUENCES, [subject], 1)
    assert row.share == pytest.approx(0.625)
