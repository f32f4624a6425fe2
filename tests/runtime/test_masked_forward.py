"""The masked forward is the stock model, minus what a method drops, and counts what that costs."""

import pytest
import torch

from prism_runtime.refactor.masked import Experts, MaskedModel, capture
from prism_runtime.refactor.method import Choice, Slots
from prism_runtime.refactor.metric import fisher_metric
from prism_runtime.refactor.text import TokenSequence
from tests.runtime.models import ARCHITECTURES, COUNTS, SUB_EXPERTS, VOCABULARY, masked_model, tiny_model


class Prefix:
    """Keeps the first share of every expert's neurons, and pays for two neurons a token that it does not run."""

    name = "prefix"

    def __init__(self, share: float) -> None:
        self._share = share

    def choose(self, slots: Slots) -> Choice:
        keep = torch.zeros_like(slots.activations, dtype=torch.bool)
        keep[..., : round(keep.shape[2] * self._share)] = True
        return Choice(keep, slots.router_weights, None, torch.full((len(slots.x),), 2.0))


def sequences(count: int = 3, length: int = 12) -> list[TokenSequence]:
    ids = torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(5))
    return [TokenSequence("text", tuple(row)) for row in ids.tolist()]


def stock(model, batch) -> torch.Tensor:
    with torch.inference_mode():
        ids = torch.tensor([sequence.ids for sequence in batch])
        return model(ids, use_cache=False).logits.log_softmax(-1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_a_method_and_with_one_that_keeps_all_it_is_the_stock_model(architecture: str) -> None:
    model, batch = tiny_model(architecture), sequences()
    expected = stock(model, batch)
    masked = MaskedModel(model)
    neurons = masked.experts[0].down.shape[1]
    generator = torch.Generator().manual_seed(3)
    perms = [
        torch.stack([torch.randperm(neurons, generator=generator) for _ in range(len(experts.down))])
        for experts in masked.experts
    ]
    masked.permute(perms)
    torch.testing.assert_close(masked.log_probabilities(batch), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(masked.log_probabilities(batch, Prefix(1.0)), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(stock(model, batch), expected), "the model is left as it was"


def test_beside_the_model_there_is_one_copy_of_the_experts_and_none_in_the_order_of_the_source(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("qwen3_moe")
    held = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    masked = MaskedModel(model)

    def copied() -> int:
        tensors = [tensor for each in masked.experts for tensor in (each.gate, each.up, each.down)]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(size for at, size in storages.items() if at not in held)

    experts, neurons, hidden = masked.experts[0].down.shape
    layer = 4 * 3 * experts * neurons * hidden
    identity = torch.arange(neurons).expand(experts, -1)
    seen, permuted = [], Experts.permuted
    monkeypatch.setattr(Experts, "permuted", lambda *given: (seen.append(copied()), permuted(*given))[1])
    assert copied() == 0
    for _ in range(2):
        masked.permute([identity.flip(1)] * len(masked.experts))
        assert copied() == layer * len(masked.experts)
    assert max(seen) == layer * (len(masked.experts) - 1), "a layer's last order is gone before its next is made"
    masked.permute([identity] * len(masked.experts))
    assert copied() == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dropped_neurons_are_those_that_a_stock_model_without_them_lacks(architecture: str) -> None:
    batch = sequences()
    masked = MaskedModel(tiny_model(architecture))
    for count in COUNTS[:-1]:
        expected = stock(masked_model(architecture, count), batch)
        found = masked.log_probabilities(batch, Prefix(count / SUB_EXPERTS))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_realised_budget_counts_kept_neurons_and_extras_until_it_is_reset() -> None:
    masked = MaskedModel(tiny_model("qwen3_moe"))
    slots, neurons = 2, masked.experts[0].down.shape[1]
    masked.log_probabilities(sequences(), Prefix(0.25))
    expected = 0.25 + 2 / (slots * neurons)
    assert masked.realised == pytest.approx(expected)
    assert masked.realised_by_layer == pytest.approx([expected] * len(masked.experts))
    masked.reset()
    masked.log_probabilities(sequences(), Prefix(0.5))
    assert masked.realised == pytest.approx(0.5 + 2 / (slots * neurons))


def test_captured_rows_are_what_the_router_and_the_experts_saw_in_the_order_of_the_text() -> None:
    model, batch = tiny_model("olmoe"), sequences(count=11)
    rows = capture(model, batch)
    assert [len(layer.x) for layer in rows] == [11 * 12] * len(rows)
    alone = capture(model, batch[9:10])
    for layer, single in zip(rows, alone, strict=True):
        at = slice(9 * 12, 10 * 12)
        torch.testing.assert_close(layer.x[at], single.x, rtol=1e-4, atol=1e-4)
        assert torch.equal(layer.expert_ids[at], single.expert_ids)


def test_fisher_metric_predicts_the_divergence_of_a_small_error() -> None:
    model, batch = tiny_model("qwen3_moe"), sequences(count=8)
    metric = fisher_metric(model, batch, seed=0, samples=64)[-1]
    rms = capture(model, batch)[-1].rms
    direction = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    masked = MaskedModel(model)
    reference = masked.log_probabilities(batch)

    class Shift:
        name = "shift"

        def choose(self, slots: Slots) -> Choice:
            size = 3e-2 * slots.rms[:, None] * float(slots.layer == len(rms_by_layer) - 1)
            keep = torch.ones_like(slots.activations, dtype=torch.bool)
            return Choice(keep, slots.router_weights, size * direction, torch.zeros(len(slots.x)))

    rms_by_layer = masked.experts
    shifted = masked.log_probabilities(batch, Shift())
    divergence = (reference.exp() * (reference - shifted)).sum(-1).mean()
    predicted = 0.5 * (3e-2 * direction) @ metric.form @ (3e-2 * direction)
    assert float(predicted) == pytest.approx(float(divergence), rel=0.25)
    assert len(metric.power) == len(rms)
