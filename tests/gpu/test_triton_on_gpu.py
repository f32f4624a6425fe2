"""The Triton programs on a real GPU; skipped where there is none."""

import pytest
import torch

from prism_runtime.kernels.contract import ExpertWeights
from prism_runtime.kernels.triton_moe import DECODE_ROWS, PREFILL_ROWS, Tiling, run_kept

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

EXPERTS, TOP_K, SUB_EXPERTS, NEURONS, HIDDEN = 64, 8, 4, 256, 2048
"""OLMoE's layer."""


def silu_and_multiply(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(gate) * up


def layer() -> ExpertWeights:
    torch.manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * shape[-1] ** -0.5

    return ExpertWeights(
        random(EXPERTS, SUB_EXPERTS, 2 * NEURONS, HIDDEN),
        random(EXPERTS, SUB_EXPERTS, NEURONS, HIDDEN),
        None,
        None,
        silu_and_multiply,
    )


def batch(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
    router = torch.rand(tokens, EXPERTS, device="cuda").softmax(-1)
    weights, ids = router.topk(TOP_K)
    return hidden, ids, weights


def by_definition(hidden, ids, router, keep, weights):
    """Dense and masked, in float32."""
    out = torch.zeros(hidden.shape, device="cuda")
    for expert in range(EXPERTS):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        if len(token):
            gate, up = (
                (hidden[token].float() @ weights.w1[expert].float().flatten(0, 1).t())
                .view(len(token), SUB_EXPERTS, 2, NEURONS)
                .unbind(2)
            )
            activated = silu_and_multiply(gate, up).bfloat16().float() * keep[token, slot][..., None]
            result = activated.flatten(1) @ weights.w2[expert].float().flatten(0, 1)
            out.index_add_(0, token, result * router[token, slot, None])
    return out


@pytest.mark.parametrize("how", [Tiling(DECODE_ROWS, True), Tiling(PREFILL_ROWS, True), Tiling(PREFILL_ROWS, False)])
@pytest.mark.parametrize("tokens", [1, 32, 1024])
def test_any_subset_gives_the_sum_of_its_outputs(tokens: int, how: Tiling) -> None:
    weights, (hidden, ids, router) = layer(), batch(tokens)
    keep = torch.rand(tokens, TOP_K, SUB_EXPERTS, device="cuda") < 0.5
    found = run_kept(hidden, ids, router, keep, weights, how).float()
    expected = by_definition(hidden, ids, router, keep, weights)
    assert (found - expected).norm() <= 0.02 * expected.norm()


def test_a_captured_graph_follows_budgets_that_change_between_replays() -> None:
    weights, (hidden, ids, router) = layer(), batch(8)
    count = torch.full((8, 1, 1), SUB_EXPERTS, device="cuda")
    within, how = torch.arange(SUB_EXPERTS, device="cuda"), Tiling(DECODE_ROWS, True)

    def forward() -> torch.Tensor:
        return run_kept(hidden, ids, router, (within < count).expand(8, TOP_K, SUB_EXPERTS), weights, how)

    warm = torch.cuda.Stream()
    with torch.cuda.stream(warm):
        forward()  # compiles, which a capture may not
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward()
    for budget in (SUB_EXPERTS, 1, 3):
        count.fill_(budget)
        graph.replay()
        assert torch.equal(captured, forward())
