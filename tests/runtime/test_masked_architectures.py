"""The masked forward of every supported architecture: with everything kept it is the stock model, in any order of
neurons, and what a method drops is gone while shared experts, biases and clamps stay."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from prism_runtime.engine.experts_hook import experts_modules
from prism_runtime.refactor.artifact import write_checkpoint
from prism_runtime.refactor.masked import MaskedModel
from prism_runtime.refactor.method import Choice, Slots
from prism_runtime.refactor.text import TokenSequence
from tests.runtime.models import ARCHITECTURES, COUNTS, SUB_EXPERTS, masked_model, prompts, tiny_model

torch.set_num_threads(1)
EXPERTS, TOP_K, NEURONS, HIDDEN = 8, 2, 32, 48
BATCH = [TokenSequence("text", ids) for ids in prompts([19, 19])]


@dataclass(frozen=True)
class Prefix:
    """Keeps the first `count` neurons of every routed expert, at a stated extra cost."""

    count: int
    extra: float = 0.0
    added: Tensor | None = None
    name: str = "prefix"

    def choose(self, slots: Slots) -> Choice:
        keep = (torch.arange(slots.activations.shape[2]) < self.count).expand(slots.activations.shape)
        extra = torch.full((len(slots.x),), self.extra)
        added = None if self.added is None else self.added.expand(len(slots.x), -1)
        return Choice(keep, slots.router_weights, added, extra)


@torch.inference_mode()
def stock(model: torch.nn.Module) -> Tensor:
    return model(torch.tensor([sequence.ids for sequence in BATCH]), use_cache=False).logits.float().log_softmax(-1)


def neurons_of(architecture: str) -> int:
    _, experts = experts_modules(tiny_model(architecture))[0]
    return experts.down_proj.shape[1 if experts.is_transposed else 2]


def random_orders(architecture: str) -> list[Tensor]:
    neurons = neurons_of(architecture)
    torch.manual_seed(5)
    return [torch.stack([torch.randperm(neurons) for _ in range(EXPERTS)]).int() for _ in range(2)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_a_method_it_is_the_stock_model(architecture: str) -> None:
    masked = MaskedModel(tiny_model(architecture))
    expected = stock(tiny_model(architecture))
    torch.testing.assert_close(masked.log_probabilities(BATCH, None), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_with_everything_kept_it_is_the_stock_model_in_any_order_of_neurons(architecture: str) -> None:
    masked = MaskedModel(tiny_model(architecture))
    masked.permute(random_orders(architecture))
    masked.reset()
    found = masked.log_probabilities(BATCH, Prefix(neurons_of(architecture)))
    torch.testing.assert_close(found, stock(tiny_model(architecture)), rtol=0, atol=1e-5)
    assert masked.realised == 1
    torch.testing.assert_close(
        masked.log_probabilities(BATCH, None), stock(tiny_model(architecture)), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("count", COUNTS[:-1])
def test_dropped_neurons_are_gone_and_shared_experts_and_biases_stay(architecture: str, count: int) -> None:
    masked, neurons = MaskedModel(tiny_model(architecture)), neurons_of(architecture)
    found = masked.log_probabilities(BATCH, Prefix(neurons * count // SUB_EXPERTS))
    expected = stock(masked_model(architecture, count))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert (found - stock(tiny_model(architecture))).abs().max() > 0.01


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_neurons_are_dropped_in_the_order_of_the_permutation(architecture: str) -> None:
    neurons, orders = neurons_of(architecture), random_orders(architecture)
    masked = MaskedModel(tiny_model(architecture))
    masked.permute(orders)
    found = masked.log_probabilities(BATCH, Prefix(neurons // 2))
    without = tiny_model(architecture)
    for (_, experts), order in zip(experts_modules(without), orders, strict=True):
        down = experts.down_proj.data if experts.is_transposed else experts.down_proj.data.transpose(1, 2)
        down[torch.arange(EXPERTS)[:, None], order[:, neurons // 2 :].long()] = 0
    torch.testing.assert_close(found, stock(without), rtol=0, atol=2e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_realised_budget_counts_kept_neurons_and_extra_cost(architecture: str) -> None:
    masked, neurons = MaskedModel(tiny_model(architecture)), neurons_of(architecture)
    masked.reset()
    masked.log_probabilities(BATCH, Prefix(neurons // 4, extra=neurons / 8))
    assert masked.realised == pytest.approx(1 / 4 + 1 / 8 / TOP_K)
    assert list(masked.realised_by_layer) == pytest.approx([1 / 4 + 1 / 8 / TOP_K] * 2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_a_method_adds_joins_the_layers_output(architecture: str) -> None:
    masked, neurons = MaskedModel(tiny_model(architecture)), neurons_of(architecture)
    added = torch.linspace(-1, 1, HIDDEN)
    found = masked.log_probabilities(BATCH, Prefix(neurons, added=added))
    model = tiny_model(architecture)
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _module, _inputs, output: output + added)
    torch.testing.assert_close(found, stock(model), rtol=0, atol=2e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_permuted_checkpoint_is_loaded_by_the_stock_library_with_the_same_output(
    architecture: str, tmp_path: Path
) -> None:
    source, target = tmp_path / "source", tmp_path / "permuted"
    target.mkdir()
    tiny_model(architecture).save_pretrained(source)
    write_checkpoint(source, target, dict(enumerate(random_orders(architecture))))
    permuted = AutoModelForCausalLM.from_pretrained(target).eval()
    torch.testing.assert_close(stock(permuted), stock(tiny_model(architecture)), rtol=0, atol=1e-5)
    assert any(
        not torch.equal(ours, theirs)
        for (_, a), (_, b) in zip(experts_modules(permuted), experts_modules(tiny_model(architecture)), strict=True)
        for ours, theirs in [(a.down_proj, b.down_proj)]
    )
