"""Random sub-expert layers and what they compute by definition, for the tests of every kernel."""

import torch
from hypothesis import strategies as st

from prism_runtime.kernels.contract import CompensationWeights, ExpertWeights, GatedLayer, GateWeights
from prism_runtime.kernels.plan import PREFIX, THRESHOLD, PlanTables, PlanTensor


def silu_and_multiply(gate, up):
    return torch.nn.functional.silu(gate) * up


def clamped(gate, up):
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(gate * 1.702)


DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@st.composite
def layers(draw, dtypes=DTYPES, widths=(16, 40)):
    experts, sub_experts = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 4]))
    tokens, top_k = draw(st.integers(1, 6)), draw(st.integers(1, experts))
    neurons, hidden = draw(st.sampled_from([8, 16, 24])), draw(st.sampled_from(widths))
    dtype = draw(st.sampled_from(dtypes))
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


def at_threshold_and_full(layer, seed, kernel):
    """What a kernel gives for rows that stand at a threshold point with gate and compensation, and at full, in turn."""
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
    plan = PlanTensor(tables, classes=2)
    plan.write([0, 1])
    plan.attach_rows([row % 2 for row in range(tokens)])
    rms = torch.rand(tokens, generator=generator) + 0.5
    return kernel(hidden, ids, router, 0, plan, weights, GatedLayer(gate, {0: compensation}), rms)
