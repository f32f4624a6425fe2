"""The reference kernel against a loop over tokens, experts and neurons."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from prism_runtime.kernels import reference
from prism_runtime.kernels.contract import ExpertWeights, load_kernel
from prism_runtime.kernels.plan import PADDING, PlanTables, PlanTensor
from prism_runtime.kernels.reference import sub_expert_moe

EXPERTS, TOP_K, SUB_EXPERTS, NEURONS, HIDDEN = 6, 3, 4, 8, 24
COUNTS = (1, 3, 4)


@pytest.fixture(autouse=True, params=[(0, 40), (reference.FEW_SLOTS, reference.TOGETHER_VALUES)])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test twice: as for many rows, sorted as tensors and expert by expert, and as for few."""
    few, together = request.param
    monkeypatch.setattr(reference, "FEW_SLOTS", few)
    monkeypatch.setattr(reference, "TOGETHER_VALUES", together)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def weights(*, bias: bool = False) -> ExpertWeights:
    torch.manual_seed(0)
    w1 = torch.randn(EXPERTS, SUB_EXPERTS, 2 * NEURONS, HIDDEN) / 5
    w2 = torch.randn(EXPERTS, SUB_EXPERTS, NEURONS, HIDDEN) / 5
    b1 = torch.randn(EXPERTS, SUB_EXPERTS, 2 * NEURONS) if bias else None
    b2 = torch.randn(EXPERTS, HIDDEN) if bias else None
    return ExpertWeights(w1, w2, b1, b2, swiglu)


def routing(rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, HIDDEN, generator=generator)
    expert_ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(rows)])
    return hidden, expert_ids, torch.rand(rows, TOP_K, generator=generator)


def plan(class_point: tuple[int, ...], row_class: list[int]) -> PlanTensor:
    tensor = PlanTensor(PlanTables.uniform(COUNTS, 1, SUB_EXPERTS), classes=len(class_point))
    tensor.write(class_point)
    tensor.attach_rows(row_class)
    return tensor


def uniform_plan(count: int, rows: int) -> PlanTensor:
    tensor = PlanTensor(PlanTables.uniform([count], 1, SUB_EXPERTS), classes=1)
    tensor.attach_rows([0] * rows)
    return tensor


def one_by_one(hidden: Tensor, expert_ids: Tensor, router: Tensor, counts: list[int], w: ExpertWeights) -> Tensor:
    out = torch.zeros_like(hidden)
    for row, count in enumerate(counts):
        for rank in range(TOP_K if count else 0):
            expert = int(expert_ids[row, rank])
            if expert >= EXPERTS:
                continue
            total = torch.zeros(HIDDEN) if w.b2 is None else w.b2[expert].clone()
            for sub in range(count):
                projected = w.w1[expert, sub] @ hidden[row] + (0 if w.b1 is None else w.b1[expert, sub])
                total += swiglu(projected[:NEURONS], projected[NEURONS:]) @ w.w2[expert, sub]
            out[row] += router[row, rank] * total
    return out


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("point", range(len(COUNTS)))
def test_one_point_for_all_rows_equals_the_loop(point: int, bias: bool) -> None:
    w, (hidden, ids, router) = weights(bias=bias), routing(17)
    out = sub_expert_moe(hidden, ids, router, 0, plan((point,), [0] * 17), w)
    torch.testing.assert_close(out, one_by_one(hidden, ids, router, [COUNTS[point]] * 17, w))


@pytest.mark.parametrize("bias", [False, True])
def test_mixed_points_and_padding_in_one_batch_equal_the_loop(bias: bool) -> None:
    w, (hidden, ids, router) = weights(bias=bias), routing(19)
    row_class = [(0, 1, 2, PADDING)[row % 4] for row in range(19)]
    out = sub_expert_moe(hidden, ids, router, 0, plan((0, 1, 2), row_class), w)
    counts = [0 if c == PADDING else COUNTS[c] for c in row_class]
    torch.testing.assert_close(out, one_by_one(hidden, ids, router, counts, w))
    assert not out[3].any()


def test_counts_by_rank_follow_the_router_weights_and_not_the_order_of_the_slots() -> None:
    w, (hidden, ids, router) = weights(), routing(13)
    tensor = PlanTensor(PlanTables.prefix(torch.tensor([[[4, 1, 0]]], dtype=torch.int32), SUB_EXPERTS), classes=1)
    tensor.attach_rows([0] * 13)
    out = sub_expert_moe(hidden, ids, router, 0, tensor, w)
    expected = torch.zeros_like(out)
    for rank, count in enumerate((4, 1)):
        slot = router.argsort(1, descending=True)[:, rank : rank + 1]
        one = ids.gather(1, slot), router.gather(1, slot)
        expected += sub_expert_moe(hidden, *one, 0, uniform_plan(count, 13), w)
    torch.testing.assert_close(out, expected)
    assert tensor.realised_budget == pytest.approx(5 / 12)


def test_experts_of_another_rank_give_nothing() -> None:
    w, (hidden, ids, router) = weights(), routing(9)
    ids[::2, 1] = EXPERTS
    out = sub_expert_moe(hidden, ids, router, 0, plan((1,), [0] * 9), w)
    torch.testing.assert_close(out, one_by_one(hidden, ids, router, [COUNTS[1]] * 9, w))


def test_row_does_not_depend_on_the_points_of_its_batch_mates() -> None:
    w, (hidden, ids, router) = weights(), routing(8)
    alone = sub_expert_moe(hidden, ids, router, 0, plan((1,), [0] * 8), w)
    mixed = sub_expert_moe(hidden, ids, router, 0, plan((1, 2), [0, 1] * 4), w)
    torch.testing.assert_close(mixed[::2], alone[::2])


def test_counters_count_sub_experts_that_ran_and_were_routed_without_padding() -> None:
    w, (hidden, ids, router) = weights(), routing(5)
    tensor = plan((0, 1), [0, 1, 1, PADDING, 0])
    sub_expert_moe(hidden, ids, router, 0, tensor, w)
    assert int(tensor.ran) == TOP_K * (1 + 3 + 3 + 1)
    assert int(tensor.routed) == TOP_K * 4 * SUB_EXPERTS
    assert tensor.realised_budget == 0.5


def test_rows_that_the_plan_does_not_know_are_refused() -> None:
    w, (hidden, ids, router) = weights(), routing(5)
    with pytest.raises(ValueError, match="the plan has 4 rows attached, the forward has 5"):
        sub_expert_moe(hidden, ids, router, 0, plan((0,), [0] * 4), w)


def test_unknown_kernel_is_refused_with_the_known_ones() -> None:
    assert load_kernel("reference") is sub_expert_moe
    with pytest.raises(ValueError, match="unknown kernel 'other'; known: reference"):
        load_kernel("other")
