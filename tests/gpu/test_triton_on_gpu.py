"""The Triton programs on a real GPU; skipped where there is none."""

import pytest
import torch

from prism_runtime.kernels.contract import CompensationWeights, ExpertWeights, GatedLayer, GateWeights
from prism_runtime.kernels.plan import PADDING, PREFIX, THRESHOLD, PlanTables, PlanTensor
from prism_runtime.kernels.reference import sub_expert_moe as reference
from prism_runtime.kernels.triton_moe import DECODE, PREFILL, PREFILL_ATOMIC, Tiling, run_kept, sub_expert_moe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

EXPERTS, TOP_K, SUB_EXPERTS, NEURONS, HIDDEN = 64, 8, 4, 256, 2048
"""OLMoE's layer."""
HALF, LOW_PREFIX, FULL = 0, 1, 2
"""Ladder indices: a threshold point, one sub-expert an expert, all."""


def silu_and_multiply(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(gate) * up


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") * shape[-1] ** -0.5).to(dtype)


def layer() -> ExpertWeights:
    torch.manual_seed(0)
    return ExpertWeights(
        random(EXPERTS, SUB_EXPERTS, 2 * NEURONS, HIDDEN),
        random(EXPERTS, SUB_EXPERTS, NEURONS, HIDDEN),
        None,
        None,
        silu_and_multiply,
    )


def gated() -> GatedLayer:
    single = torch.float32
    gate = GateWeights(
        random(EXPERTS, SUB_EXPERTS, HIDDEN, dtype=single),
        torch.zeros(EXPERTS, SUB_EXPERTS, device="cuda"),
        torch.zeros(EXPERTS, SUB_EXPERTS, device="cuda"),
        torch.ones(EXPERTS, SUB_EXPERTS, device="cuda"),
        random(HIDDEN + 3, dtype=single),
        1.7,
    )
    rank = 4
    compensation = CompensationWeights(
        random(HIDDEN + 1, rank, dtype=single) * 0.1,
        random(rank, HIDDEN, dtype=single),
        random(EXPERTS, SUB_EXPERTS, rank, dtype=single),
    )
    return GatedLayer(gate, {HALF: compensation})


def live_plan(tau: float = -2.2) -> PlanTensor:
    tables = PlanTables(
        mode=torch.tensor([THRESHOLD, PREFIX, PREFIX], dtype=torch.int32),
        count=torch.tensor([0, 1, SUB_EXPERTS], dtype=torch.int32)[:, None, None],
        tau=torch.full((3, 1), tau),
        share=torch.ones(3, 1),
        cap=torch.zeros(3, dtype=torch.int32),
        sub_experts=SUB_EXPERTS,
    )
    return PlanTensor(tables, classes=2, device="cuda")


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


@pytest.mark.parametrize("how", [DECODE, PREFILL, PREFILL_ATOMIC])
@pytest.mark.parametrize("tokens", [1, 32, 1024])
def test_any_subset_gives_the_sum_of_its_outputs(tokens: int, how: Tiling) -> None:
    weights, (hidden, ids, router) = layer(), batch(tokens)
    keep = torch.rand(tokens, TOP_K, SUB_EXPERTS, device="cuda") < 0.5
    found = run_kept(hidden, ids, router, keep, weights, how).float()
    expected = by_definition(hidden, ids, router, keep, weights)
    assert (found - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("tokens", [1, 9, 300])
def test_rows_of_several_classes_get_what_the_reference_gives_them(tokens: int) -> None:
    """A few cells lie at the threshold itself, where the order of a sum decides: the counters tell how many."""
    weights, gate, inputs = layer(), gated(), batch(tokens)
    rms = torch.rand(tokens, device="cuda") + 0.5
    outputs, budgets = [], []
    for kernel in (reference, sub_expert_moe):
        plan = live_plan()
        plan.write([HALF, LOW_PREFIX])
        plan.attach_rows([(0, 1, PADDING)[row % 3] for row in range(tokens)])
        outputs.append(kernel(*inputs, 0, plan, weights, gate, rms).float())
        budgets.append(plan.realised_budget)
    assert (outputs[1] - outputs[0]).norm() <= 0.02 * outputs[0].norm()
    assert 0.02 < budgets[0] < 0.9
    assert budgets[1] == pytest.approx(budgets[0], rel=2e-3)


def test_a_captured_graph_follows_the_live_plan_from_point_to_point() -> None:
    """One capture; between replays a class moves from a threshold to prefixes and back."""
    weights, gate, inputs = layer(), gated(), batch(8)
    rms, plan = torch.ones(8, device="cuda"), live_plan()
    plan.write([HALF, FULL])
    plan.attach_rows([0, 1] * 4)

    def forward() -> torch.Tensor:
        return sub_expert_moe(*inputs, 0, plan, weights, gate, rms)

    warm = torch.cuda.Stream()
    with torch.cuda.stream(warm):
        forward()  # compiles, which a capture may not
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward()
    seen = []
    for points in ([HALF, FULL], [FULL, FULL], [LOW_PREFIX, HALF], [HALF, LOW_PREFIX]):
        plan.write(points)
        graph.replay()
        seen.append(captured.clone())
        assert torch.equal(captured, forward())
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[3])
    assert torch.equal(seen[0][0], seen[3][0])
