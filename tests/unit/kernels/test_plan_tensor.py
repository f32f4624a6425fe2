"""The plan's tables say what they accept; a swap is a few integers."""

from dataclasses import replace

import pytest
import torch

from prism_runtime.kernels.plan import BATCH, PREFIX, THRESHOLD, PlanTables, PlanTensor


def tables(mode: int = PREFIX, count: int = 4) -> PlanTables:
    prefix = PlanTables.prefix(torch.tensor([[[1], [2]], [[4], [4]]], dtype=torch.int32), 4)
    return replace(
        prefix,
        mode=torch.tensor([PREFIX, mode], dtype=torch.int32),
        count=torch.tensor([[[1], [2]], [[count], [4]]], dtype=torch.int32),
    )


def test_unknown_selection_mode_is_refused_by_number() -> None:
    with pytest.raises(ValueError, match=r"modes \[7\] are not known to this version; known: 0 \(prefix\), 1 \(thresh"):
        tables(mode=7)


@pytest.mark.parametrize(
    ("mode", "change", "message"),
    [
        (THRESHOLD, {"tau": torch.full((2, 2), -torch.inf)}, "thresholds must be finite"),
        (
            BATCH,
            {"share": torch.zeros(2, 2)},
            r"shares of batch points must be above 0 and at most 1; found \[\[0.0, 0",
        ),
        (THRESHOLD, {"cap": torch.tensor([0, -1], dtype=torch.int32)}, r"caps must be 1 or more, .* found \[0, -1\]"),
        (THRESHOLD, {"tau": torch.zeros(2, 3)}, r"plan tables disagree: count \(2, 2, 1\), mode \(2,\), tau \(2, 3\)"),
    ],
)
def test_table_of_a_gated_point_out_of_range_is_refused(mode: int, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(tables(mode=mode), **change)


def test_tables_of_another_mode_are_not_read() -> None:
    unread = {"tau": torch.tensor([[torch.nan] * 2, [0.0] * 2]), "share": torch.zeros(2, 2)}
    assert replace(tables(mode=THRESHOLD, count=0), **unread).gated
    assert not tables().gated


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


def test_rows_of_gated_points_run_no_prefix_and_are_listed_by_point() -> None:
    plan = PlanTensor(tables(mode=THRESHOLD), classes=3)
    plan.write([0, 1, 1])
    plan.attach_rows([1, 0, -1, 2, 1])
    assert plan.row_counts(0).tolist() == [[0], [1], [0], [0], [0]]
    assert plan.levels(0) == [1]
    assert {point: rows.tolist() for point, rows in plan.gated_rows.items()} == {1: [0, 3, 4]}
    assert [plan.gated_tokens(point) for point in (0, 1)] == [0, 3]
    plan.attach_rows([0, 0])
    assert not plan.gated_rows


def test_what_kernels_read_keeps_its_place_from_forward_to_forward_and_over_a_swap() -> None:
    plan = PlanTensor(tables(), classes=2, rows=4)
    plan.attach_rows([1, 0, -1])
    places = [plan.row_class.data_ptr(), *(plan.row_counts(layer).data_ptr() for layer in (0, 1))]
    plan.write([1, 0])
    plan.attach_rows([0, 1, -1, 1])
    assert [plan.row_class.data_ptr(), *(plan.row_counts(layer).data_ptr() for layer in (0, 1))] == places
    assert plan.row_class.tolist() == [0, 1, -1, 1]
    assert [plan.row_counts(layer).tolist() for layer in (0, 1)] == [[[4], [1], [0], [1]], [[4], [2], [0], [2]]]


def test_a_forward_of_more_rows_than_reserved_gets_larger_buffers_that_stay() -> None:
    plan = PlanTensor(tables(), classes=1, rows=2)
    plan.attach_rows([0] * 3)
    place = plan.row_counts(1).data_ptr()
    plan.attach_rows([0] * 4)
    assert plan.row_counts(1).data_ptr() == place
    assert plan.row_counts(1).tolist() == [[4]] * 4
