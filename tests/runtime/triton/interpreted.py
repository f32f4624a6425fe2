"""Cases that need Triton's interpreter, which must be chosen before Triton is imported: tests/runtime/test_triton.py
runs this file in a process of its own."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_runtime.kernels.contract import CompensationWeights, ExpertWeights, GatedLayer, GateWeights
from prism_runtime.kernels.plan import PADDING, PREFIX, THRESHOLD, PlanTables, PlanTensor
from prism_runtime.kernels.reference import sub_expert_moe as reference
from prism_runtime.kernels.triton_moe import Tiling, run_kept
from prism_runtime.kernels.triton_moe import sub_expert_moe as triton_moe

torch.set_num_threads(1)


def silu_and_multiply(gate, up):
    return torch.nn.functional.silu(gate) * up


def clamped(gate, up):
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(gate * 1.702)


@st.composite
def layers(draw):
    experts, sub_experts = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 4]))
    tokens, top_k = draw(st.integers(1, 6)), draw(st.integers(1, experts))
    neurons, hidden = draw(st.sampled_from([8, 16, 24])), draw(st.sampled_from([16, 40]))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    biases = draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def random(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    weights = ExpertWeights(
        w1=random(experts, sub_experts, 2 * neurons, hidden, scale=hidden**-0.5),
        w2=random(experts, sub_experts, neurons, hidden, scale=neurons**-0.5),
        b1=random(experts, sub_experts, 2 * neurons, scale=6.0) if biases else None,
        b2=random(experts, hidden) if biases else None,
        activation=draw(st.sampled_from([silu_and_multiply, clamped])),
    )
    ids = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)])
    if draw(st.booleans()):
        ids[draw(st.integers(0, tokens - 1)), 0] = experts + draw(st.integers(0, 2))  # another rank's expert
    router = torch.rand(tokens, top_k, generator=generator)
    share = draw(st.sampled_from([0.0, 0.3, 1.0]))
    keep = torch.rand(tokens, top_k, sub_experts, generator=generator) < share
    return random(tokens, hidden), ids, router, keep, weights


def by_definition(hidden, ids, router, keep, weights):
    """Token by token, sub-expert by sub-expert, in float32."""
    out = torch.zeros(hidden.shape)
    for t, k, n in keep.nonzero().tolist():
        expert = int(ids[t, k])
        if expert >= len(weights.w1):
            continue
        projected = weights.w1[expert, n].float() @ hidden[t].float()
        if weights.b1 is not None:
            projected += weights.b1[expert, n].float()
        activated = weights.activation(*projected.chunk(2)).to(hidden.dtype).float()
        out[t] += router[t, k] * (activated @ weights.w2[expert, n].float())
        if weights.b2 is not None and n == keep[t, k].nonzero()[0]:
            out[t] += router[t, k] * weights.b2[expert].float()
    return out


def close(left, right):
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[left.dtype]
    return torch.allclose(left.float(), right, rtol=tolerance, atol=tolerance * max(1.0, float(right.abs().max())))


@settings(max_examples=30, deadline=None)
@given(layers(), st.booleans())
def test_any_subset_of_sub_experts_gives_the_sum_of_their_outputs(layer, by_slot):
    found = run_kept(*layer, Tiling(16, by_slot))
    assert close(found, by_definition(*layer))


@settings(max_examples=15, deadline=None)
@given(layers(), st.data())
def test_rows_of_different_budgets_share_a_forward_as_in_the_reference(layer, data):
    hidden, ids, router, keep, weights = layer
    sub_experts, top_k = keep.shape[2], keep.shape[1]
    points, classes = 3, 2
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    count = torch.randint(0, sub_experts + 1, (points, 1, top_k), generator=generator, dtype=torch.int32)
    count[..., 0].clamp_(min=1)
    row_class = data.draw(st.lists(st.sampled_from([PADDING, 0, 1]), min_size=len(hidden), max_size=len(hidden)))
    outputs, counters = [], []
    for kernel in (reference, triton_moe):
        plan = PlanTensor(PlanTables.prefix(count, sub_experts), classes)
        plan.write(data.draw(st.just([0, points - 1])))
        plan.attach_rows(row_class)
        outputs.append(kernel(hidden, ids, router, 0, plan, weights))
        counters.append((int(plan.ran), int(plan.routed)))
    assert close(outputs[1], outputs[0].float())
    assert counters[0] == counters[1]


@settings(max_examples=10, deadline=None)
@given(layers(), st.integers(0, 2**20))
def test_rows_at_a_threshold_run_what_the_reference_runs(layer, seed):
    hidden, ids, router, keep, weights = layer
    (tokens, _, sub_experts), (experts, width) = keep.shape, (len(weights.w1), hidden.shape[1])
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    gate = GateWeights(
        random(experts, sub_experts, width) * 0.1,
        random(experts, sub_experts),
        random(experts, sub_experts),
        torch.full((experts, sub_experts), 0.5),
        None,
        1.7,
    )
    compensation = CompensationWeights(random(width + 1, 2), random(2, width), random(experts, sub_experts, 2))
    tables = PlanTables(
        mode=torch.tensor([THRESHOLD, PREFIX], dtype=torch.int32),
        count=torch.full((2, 1, 1), sub_experts, dtype=torch.int32),
        tau=torch.tensor([[-1.0], [0.0]]),
        share=torch.ones(2, 1),
        cap=torch.zeros(2, dtype=torch.int32),
        sub_experts=sub_experts,
    )
    rms, outputs = torch.rand(tokens, generator=generator) + 0.5, []
    for kernel in (reference, triton_moe):
        plan = PlanTensor(tables, classes=2)
        plan.write([0, 1])
        plan.attach_rows([row % 2 for row in range(tokens)])
        outputs.append(kernel(hidden, ids, router, 0, plan, weights, GatedLayer(gate, {0: compensation}), rms))
    assert close(outputs[1], outputs[0].float())


def test_by_slot_the_result_is_the_same_bit_for_bit_in_any_company():
    generator = torch.Generator().manual_seed(0)
    weights = ExpertWeights(
        torch.randn(3, 2, 32, 32, generator=generator),
        torch.randn(3, 2, 16, 32, generator=generator),
        None,
        None,
        silu_and_multiply,
    )
    hidden, router = torch.randn(6, 32, generator=generator), torch.rand(6, 2, generator=generator)
    ids = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2], [1, 0], [2, 1]])
    keep = torch.rand(6, 2, 2, generator=generator) < 0.6
    together = run_kept(hidden, ids, router, keep, weights, Tiling(16, by_slot=True))
    alone = run_kept(hidden[3:4], ids[3:4], router[3:4], keep[3:4], weights, Tiling(16, by_slot=True))
    assert torch.equal(together[3], alone[0])
