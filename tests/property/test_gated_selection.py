"""The reference kernel at mixed points against a loop over tokens, experts and sub-experts that masks every neuron."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from prism_runtime.kernels import reference
from prism_runtime.kernels.contract import CompensationWeights, ExpertWeights, GatedLayer, GateWeights
from prism_runtime.kernels.plan import BATCH, PADDING, PREFIX, THRESHOLD, PlanTables, PlanTensor
from prism_runtime.kernels.selection import floor_cells, keep_above, keep_highest

torch.set_num_threads(1)

LOW, HIGH, SHARED, PREFIX_POINT, FULL = range(5)
"""The ladder of these tests: two thresholds, the lower budget first, a batch point, a prefix, all."""


@dataclass(frozen=True)
class Case:
    weights: ExpertWeights
    gated: GatedLayer
    tables: PlanTables
    hidden: Tensor
    ids: Tensor
    router: Tensor
    rms: Tensor


def make_case(
    seed: int, rows: int, experts: int, top_k: int, sub_experts: int, neurons: int, bias: bool, kappa: float | None
) -> Case:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    width, rank = 12, 3
    cells = (experts, sub_experts)
    weights = ExpertWeights(
        normal(*cells, 2 * neurons, width) / 3,
        normal(*cells, neurons, width) / 3,
        normal(*cells, 2 * neurons) if bias else None,
        normal(experts, width) if bias else None,
        lambda gate, up: F.silu(gate) * up,
    )
    token = normal(width + 3) / 4 if seed % 2 else None
    gate = GateWeights(
        normal(*cells, width) / 4, normal(*cells), normal(*cells), normal(*cells).abs() / 2, token, kappa
    )
    compensation = CompensationWeights(normal(width + 1, rank), normal(rank, width), normal(*cells, rank))
    count = torch.full((5, 1, top_k), sub_experts, dtype=torch.int32)
    count[PREFIX_POINT, :, 1:] = 0
    count[PREFIX_POINT, :, 0] = 1
    tables = replace(
        PlanTables.prefix(count, sub_experts),
        mode=torch.tensor([THRESHOLD, THRESHOLD, BATCH, PREFIX, PREFIX], dtype=torch.int32),
        tau=torch.tensor([[0.3], [-0.6], [0.0], [0.0], [0.0]]),
        share=torch.full((5, 1), 0.4),
    )
    ids = torch.stack([torch.randperm(experts, generator=draw)[:top_k] for _ in range(rows)])
    router = torch.rand(rows, top_k, generator=draw) + 0.01
    rms = torch.rand(rows, generator=draw) + 0.3
    gated = GatedLayer(gate, {LOW: compensation, SHARED: compensation})
    return Case(weights, gated, tables, normal(rows, width), ids, router, rms)


cases = st.builds(
    make_case,
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 9),
    experts=st.integers(3, 6),
    top_k=st.integers(1, 3),
    sub_experts=st.integers(1, 6),
    neurons=st.integers(1, 4),
    bias=st.booleans(),
    kappa=st.sampled_from([None, 0.5, 1.7]),
)


def run(case: Case, row_point: list[int]) -> tuple[Tensor, PlanTensor]:
    plan = PlanTensor(case.tables, classes=5)
    plan.write(range(5))
    plan.attach_rows(row_point)
    out = reference.sub_expert_moe(case.hidden, case.ids, case.router, 0, plan, case.weights, case.gated, case.rms)
    return out, plan


def score(case: Case, row: int, slot: int, sub: int, tau: float | None) -> tuple[float, bool]:
    """(score, whether the gate's product was needed) of one cell, as the recipe defines it."""
    gate, x, rms = case.gated.gate, case.hidden[row], float(case.rms[row])
    factor = -math.log(rms)
    if gate.token is not None:
        features = torch.cat((x, torch.tensor([rms, math.log(rms), 1.0])))
        factor += min(max(0.25 * float(features @ gate.token), -8.0), 8.0)
    scale = math.log(float(case.router[row, slot])) + factor
    expert = int(case.ids[row, slot])
    mean, deviation = float(gate.mean[expert, sub]), float(gate.deviation[expert, sub])
    if tau is not None and gate.kappa is not None and abs(tau - scale - mean) >= gate.kappa * deviation:
        return scale + mean, False
    return scale + float(gate.weight[expert, sub] @ x + gate.bias[expert, sub]), True


def dense(case: Case, row_point: list[int]) -> tuple[Tensor, float, int]:
    """(output, what was spent in neurons, sub-experts routed): every neuron of every routed expert is computed."""
    (rows, top_k), (_, sub_experts, neurons, width) = case.ids.shape, case.weights.w2.shape
    cells = [(slot, sub) for slot in range(top_k) for sub in range(sub_experts)]
    kept: dict[int, set[tuple[int, int]]] = {}
    spent, shared = 0.0, []
    for row, point in enumerate(row_point):
        top = int(case.router[row].argmax())
        if point in (LOW, HIGH):
            tau = float(case.tables.tau[point, 0])
            scores = {cell: score(case, row, *cell, tau) for cell in cells}
            kept[row] = {cell for cell in cells if scores[cell][0] >= tau or cell == (top, 0)}
        elif point == SHARED:
            scores = {cell: score(case, row, *cell, None) for cell in cells}
            shared += [((cell != (top, 0), -scores[cell][0]), row, cell) for cell in cells]
        elif point != PADDING:
            kept[row] = {(slot, sub) for slot, sub in cells if point == FULL or (slot, sub) == (top, 0)}
            continue
        else:
            continue
        spent += sum(needed for _, needed in scores.values()) / 3 + (case.gated.gate.token is not None) / 3
    at_shared = [row for row, point in enumerate(row_point) if point == SHARED]
    number = max(round(0.4 * len(shared)), len(at_shared))
    kept |= {row: set() for row in at_shared}
    for _, row, cell in sorted(shared)[:number]:
        kept[row].add(cell)

    out = torch.zeros(rows, width)
    for row, point in enumerate(row_point):
        if point == PADDING:
            continue
        inner = torch.zeros(3)
        for slot, sub in cells:
            g, expert = case.router[row, slot], int(case.ids[row, slot])
            if (slot, sub) not in kept[row]:
                inner += g * case.gated.compensation[LOW].c[expert, sub]
                continue
            projected = case.weights.w1[expert, sub] @ case.hidden[row]
            if case.weights.b1 is not None:
                projected = projected + case.weights.b1[expert, sub]
            activated = case.weights.activation(projected[:neurons], projected[neurons:])
            out[row] += g * activated @ case.weights.w2[expert, sub]
        running = {slot for slot, _ in kept[row]}
        for slot in range(top_k) if point in (LOW, HIGH, SHARED) else running:
            if case.weights.b2 is not None:
                out[row] += case.router[row, slot] * case.weights.b2[int(case.ids[row, slot])]
        spent += len(kept[row]) * neurons
        if point in case.gated.compensation:
            compensation = case.gated.compensation[point]
            out[row] += (torch.cat((case.hidden[row], torch.ones(1))) @ compensation.a + inner) @ compensation.u
            spent += 2 * 3 / 3 + 3 * (len(cells) - len(kept[row])) / (3 * width)
    return out, spent, sum(point != PADDING for point in row_point) * len(cells)


@settings(max_examples=60, deadline=None)
@given(cases, st.data())
def test_mixed_points_equal_the_dense_masked_loop_and_every_cost_is_counted(case: Case, data: st.DataObject) -> None:
    row_point = data.draw(st.lists(st.integers(PADDING, FULL), min_size=len(case.ids), max_size=len(case.ids)))
    out, plan = run(case, row_point)
    expected, spent, routed = dense(case, row_point)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert int(plan.routed) == routed
    assert plan.realised_budget == pytest.approx(spent / case.weights.w2.shape[2] / routed if routed else 1.0)


@settings(max_examples=30, deadline=None)
@given(cases)
def test_blocks_and_the_masked_whole_expert_give_the_same_result(case: Case) -> None:
    row_point = [(LOW, HIGH, SHARED)[row % 3] for row in range(len(case.ids))]
    masked, _ = run(case, row_point)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "LAUNCH_MULTIPLY_ADDS", -1)
        blocks, _ = run(case, row_point)
    torch.testing.assert_close(blocks, masked, rtol=1e-4, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(cases)
def test_full_at_a_threshold_point_equals_full_as_a_prefix(case: Case) -> None:
    everything = replace(case, tables=replace(case.tables, tau=torch.full_like(case.tables.tau, -1e9)))
    everything = replace(everything, gated=GatedLayer(case.gated.gate, {}))
    out, _ = run(everything, [HIGH] * len(case.ids))
    expected, _ = run(case, [FULL] * len(case.ids))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(cases)
def test_row_at_a_threshold_point_does_not_depend_on_the_other_rows(case: Case) -> None:
    together, _ = run(case, [(LOW, SHARED, FULL)[row % 3] for row in range(len(case.ids))])
    first = replace(case, hidden=case.hidden[:1], ids=case.ids[:1], router=case.router[:1], rms=case.rms[:1])
    alone, _ = run(first, [LOW])
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-4)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(-2, 2), st.floats(0, 2), st.integers(0, 6), st.integers(0, 6))
def test_more_budget_runs_a_superset_of_the_same_scores(
    seed: int, tau: float, step: float, cap: int, more_cap: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    scores, router = torch.randn(5, 2, 3, generator=draw), torch.rand(5, 2, generator=draw)
    valid = torch.rand(5, 2, generator=draw) > 0.2
    floor = floor_cells(router, valid, 3)
    assert (floor.flatten(1).sum(1) == valid.any(1)).all()
    less = keep_above(scores, floor, valid, torch.tensor(tau), cap)
    larger_cap = 0 if cap == 0 else cap + more_cap
    more = keep_above(scores, floor, valid, torch.tensor(tau - step), larger_cap)
    assert (less <= more).all()
    assert (floor <= less).all()
    assert not (more & ~valid[..., None]).any()
    if cap:
        assert int(less.flatten(1).sum(1).max()) <= cap
    counts = []
    for share in (0.2, 0.5, 1.0):
        kept = keep_highest(scores, floor, valid, share)
        counts.append(int(kept.sum()))
        assert counts[-1] == max(round(share * int(valid.sum()) * 3), int(floor.sum()))
        assert (floor <= kept).all()
        assert not (kept & ~valid[..., None]).any()
    assert counts == sorted(counts)
