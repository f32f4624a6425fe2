"""Saliency is what a neuron adds to its layer's output, in every architecture's layout."""

from typing import Any

import pytest
import torch
from torch import Tensor

from prism_runtime.engine.experts_hook import experts_modules
from prism_runtime.refactor.calibrate import calibrate
from prism_runtime.refactor.text import TokenSequence
from prism_runtime.refactor.trace import trace_experts
from tests.runtime.models import ARCHITECTURES, prompts, tiny_model

SEQUENCES = [TokenSequence("any", ids) for ids in prompts([32] * 10)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_energy_of_a_neuron_is_the_mean_square_of_what_its_removal_changes(architecture: str) -> None:
    model = tiny_model(architecture)
    saliency = calibrate(model, SEQUENCES)
    inputs: list[tuple[int, Tensor, Tensor, Tensor]] = []
    trace_experts(model, SEQUENCES, lambda *visited: inputs.append(visited))
    assert [layer for layer, *_ in inputs] == [0, 1]
    for (layer, *arguments), (_, module) in zip(inputs, experts_modules(model), strict=True):
        expert_ids = arguments[1]
        experts: Any = module
        for expert, neuron in ((0, 3), (5, 17)):
            routed = int((expert_ids == expert).sum())
            assert routed > 0
            with torch.inference_mode():
                before = experts(*arguments)
                down = experts.down_proj.data[expert]
                weights = down[neuron] if experts.is_transposed else down[:, neuron]
                kept = weights.clone()
                weights.zero_()
                change = (before - experts(*arguments)).square().sum()
                weights.copy_(kept)
            assert saliency[layer].tokens[expert] == routed
            torch.testing.assert_close(saliency[layer].energy[expert, neuron], change / routed, rtol=1e-3, atol=1e-7)


def test_progress_tells_every_sequence_once() -> None:
    told: list[int] = []
    calibrate(tiny_model("olmoe"), SEQUENCES, told.append)
    assert sum(told) == len(SEQUENCES)


def test_tracing_leaves_no_hook_behind() -> None:
    model, visits = tiny_model("olmoe"), []
    trace_experts(model, SEQUENCES[:1], lambda layer, *_: visits.append(layer))
    model(torch.tensor([SEQUENCES[0].ids]))
    assert visits == [0, 1]
