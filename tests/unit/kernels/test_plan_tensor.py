"""The plan's tables say what they accept; a swap is a few integers."""

import pytest
import torch

from prism_runtime.kernels.plan import PREFIX, PlanTables, PlanTensor


def tables(mode: int = PREFIX, count: int = 4) -> PlanTables:
    modes = torch.tensor([PREFIX, mode], dtype=torch.int32)
    return PlanTables(modes, torch.tensor([[[1], [2]], [[count], [4]]], dtype=torch.int32), torch.zeros(2, 2), 4)


def test_unknown_selection_mode_is_refused_by_number() -> None:
    with pytest.raises(ValueError, match=r"modes \[1\] are not known to this version; known: 0 \(prefix\)"):
        tables(mode=1)


@pytest.mark.parametrize("count", [0, 5])
def test_count_of_the_first_rank_outside_one_to_all_sub_experts_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="counts must be 0 to 4, those of the first rank 1 or more; found"):
        tables(count=count)


def test_swap_changes_the_same_tensor_that_kernels_hold() -> None:
    plan = PlanTensor(tables(), classes=2)
    held = plan.class_point
    assert held.tolist() == [1, 1]
    plan.write([0, 1])
    assert held.tolist() == [0, 1]
    assert held.data_ptr() == plan.class_point.data_ptr()


def test_counts_of_rows_follow_class_point_and_layer() -> None:
    plan = PlanTensor(tables(), classes=2)
    plan.write([0, 1])
    plan.attach_rows([1, 0, -1])
    assert [plan.row_counts(layer).tolist() for layer in (0, 1)] == [[[4], [1], [0]], [[4], [2], [0]]]
    assert [plan.levels(layer) for layer in (0, 1)] == [[1, 4], [2, 4]]
