"""Cases that need Triton's interpreter, which must be chosen before Triton is imported: tests/runtime/test_triton.py
runs this file in a process of its own."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_runtime.kernels.contract import CompensationWeights, ExpertWeights, GatedLayer, GateWeights
from prism_runtime.kernels.plan import PADDING, PREFIX, THRESHOLD, PlanTables, PlanTensor
from prism_runtime.kernels.reference import sub_expert_moe as reference
from prism_runtime.kernels.triton_moe import DECODE, run_kept
from prism_runtime.kernels.triton_moe import sub_expert_moe as triton_moe
from tests.runtime.kernel_layers import at_threshold_and_full, by_definition, close, layers, silu_and_multiply

torch.set_num_threads(1)


@settings(max_examples=30, deadline=None)
@given(layers(), st.booleans())
def test_any_subset_of_sub_experts_gives_the_sum_of_their_outputs(layer, by_slot):
    found = run_kept(*layer, replace(DECODE, by_slot=by_slot))
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
    expected = at_threshold_and_full(layer, seed, reference)
    assert close(at_threshold_and_full(layer, seed, triton_moe), expected.float())


def three_experts(width, generator):
    """In two sub-experts each."""
    w1, w2 = (torch.randn(3, 2, rows, width, generator=generator) for rows in (32, 16))
    return ExpertWeights(w1, w2, None, None, silu_and_multiply)


def test_by_slot_the_result_is_the_same_bit_for_bit_in_any_company():
    generator = torch.Generator().manual_seed(0)
    weights = three_experts(32, generator)
    hidden, router = torch.randn(6, 32, generator=generator), torch.rand(6, 2, generator=generator)
    ids = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2], [1, 0], [2, 1]])
    keep = torch.rand(6, 2, 2, generator=generator) < 0.6
    together = run_kept(hidden, ids, router, keep, weights, DECODE)
    alone = run_kept(hidden[3:4], ids[3:4], router[3:4], keep[3:4], weights, DECODE)
    assert torch.equal(together[3], alone[0])


def test_a_table_with_fewer_blocks_than_slots_holds_the_same_work():
    """40 slots of 3 experts: the program that places them then computes where a block's entry lies."""
    generator = torch.Generator().manual_seed(1)
    weights = three_experts(16, generator)
    hidden, router = torch.randn(20, 16, generator=generator), torch.rand(20, 2, generator=generator)
    ids = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(20)])
    keep = torch.rand(20, 2, 2, generator=generator) < 0.6
    found = run_kept(hidden, ids, router, keep, weights, DECODE)
    assert close(found, by_definition(hidden, ids, router, keep, weights))


@settings(max_examples=10, deadline=None)
@given(layers(dtypes=(torch.float32,)), st.data())
def test_rows_at_several_points_of_a_mixed_ladder_cost_and_give_what_the_reference_says(layer, data):
    """Two threshold points, one with compensation of a smaller rank, and a prefix; token factors; padding."""
    hidden, ids, router, keep, weights = layer
    (tokens, top_k, sub_experts), (experts, width) = keep.shape, (len(weights.w1), hidden.shape[1])
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))

    def random(*shape, scale=0.2):
        return torch.randn(*shape, generator=generator) * scale

    wide = torch.full((experts, sub_experts), 0.5)
    kappa = data.draw(st.sampled_from([None, 1.0]))
    gate = GateWeights(
        random(experts, sub_experts, width), random(experts, sub_experts), random(experts, sub_experts), wide,
        random(width + 3), kappa,
    )  # fmt: skip
    ranks = {0: 3, 1: 1}
    gated = GatedLayer(
        gate,
        {
            point: CompensationWeights(random(width + 1, r), random(r, width), random(experts, sub_experts, r))
            for point, r in ranks.items()
        },
    )
    cap = data.draw(st.sampled_from([0, 2]))
    tables = PlanTables(
        mode=torch.tensor([THRESHOLD, THRESHOLD, PREFIX], dtype=torch.int32),
        count=torch.randint(1, sub_experts + 1, (3, 2, top_k), generator=generator, dtype=torch.int32),
        tau=torch.tensor([[9.0, -1.0], [9.0, -2.0], [0.0, 0.0]]),
        share=torch.ones(3, 2),
        cap=torch.tensor([cap, 0, 0], dtype=torch.int32),
        sub_experts=sub_experts,
    )
    row_class = data.draw(st.lists(st.sampled_from([PADDING, 0, 1, 2]), min_size=tokens, max_size=tokens))
    rms = torch.rand(tokens, generator=generator) + 0.5
    outputs, charged = [], []
    for kernel in (reference, triton_moe):
        plan = PlanTensor(tables, classes=3)
        plan.write([0, 1, 2])
        plan.shift.copy_(torch.tensor([0.1, -0.1, 0.0]))
        plan.attach_rows(row_class)
        outputs.append(kernel(hidden, ids, router, 1, plan, weights, gated, rms))
        charged.append(torch.stack([plan.ran, plan.routed, plan.extra, *plan.spent.flatten()]).double())
    assert close(outputs[1], outputs[0].float())
    assert charged[1].tolist() == pytest.approx(charged[0].tolist(), rel=1e-5)
