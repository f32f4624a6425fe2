"""Met, missed, shed, cancelled: each request once, by the definition that operator and simulator share."""

import pytest

from prism_runtime.engine.governor import ClassTable, ServiceClass
from prism_runtime.server.accounting import Accounting, Outcome, Passage
from tests.unit.test_governor import make_ladder

GOLD = ServiceClass("gold", slot=0, ttft_s=1.0, tpot_s=0.1)


def accounting() -> Accounting:
    return Accounting(make_ladder())


def answer(accounts: Accounting, times_s: list[float], service_class: ServiceClass = GOLD) -> Passage:
    passage = accounts.arrived(service_class, 10, 0.0)
    for now_s in times_s:
        accounts.token(passage, 4, now_s)
    return passage


@pytest.mark.parametrize(
    ("times_s", "outcome"),
    [
        ([1.0], Outcome.MET),
        ([1.01], Outcome.MISSED),
        ([0.5, 0.6, 0.7], Outcome.MET),
        ([0.5, 0.5, 0.7], Outcome.MET),  # the mean counts, not the slowest token
        ([0.5, 0.65, 0.75], Outcome.MISSED),
        ([0.5, 9.0], Outcome.MISSED),
    ],
)
def test_answer_is_met_if_first_token_and_mean_time_per_token_are_in_time(
    times_s: list[float], outcome: Outcome
) -> None:
    accounts = accounting()
    assert accounts.finished(answer(accounts, times_s), times_s[-1]) is outcome


def test_answer_of_one_token_has_no_time_per_token_to_miss() -> None:
    accounts = accounting()
    assert accounts.finished(answer(accounts, [0.5]), 99.0) is Outcome.MET
    assert sum(accounts.totals["gold"].tpot) == 0


def test_class_without_objectives_meets_every_whole_answer() -> None:
    accounts = accounting()
    free = ServiceClass("free", slot=1)
    assert accounts.finished(answer(accounts, [50.0, 100.0], free), 100.0) is Outcome.MET


def test_failed_request_is_missed() -> None:
    accounts = accounting()
    accounts.failed(answer(accounts, [0.1]))
    assert accounts.totals["gold"].missed == 1


@pytest.mark.parametrize(
    ("times_s", "gone_s", "outcome"),
    [
        ([], 0.9, Outcome.CANCELLED),
        ([], 1.1, Outcome.MISSED),
        ([0.5, 0.55], 5.0, Outcome.CANCELLED),
        ([0.5, 0.9], 1.0, Outcome.MISSED),
        ([1.5], 1.6, Outcome.MISSED),
    ],
)
def test_cancelled_request_counts_as_missed_only_if_an_objective_was_broken_before(
    times_s: list[float], gone_s: float, outcome: Outcome
) -> None:
    accounts = accounting()
    assert accounts.cancelled(answer(accounts, times_s), gone_s) is outcome


def test_objectives_are_those_of_the_arrival() -> None:
    accounts = accounting()
    passage = answer(accounts, [0.5])
    accounts.follow(ClassTable({"gold": ServiceClass("gold", slot=0, ttft_s=0.1)}, "gold", {}))
    assert accounts.finished(passage, 0.5) is Outcome.MET


def test_accounts_outlive_a_change_of_classes_and_end_with_their_row() -> None:
    accounts = accounting()
    accounts.finished(answer(accounts, [0.5]), 0.5)
    silver = {"silver": ServiceClass("silver", slot=1)}
    accounts.follow(ClassTable(silver, "silver", {"gold": 0}))
    assert [c.name for c in accounts.snapshot()] == ["gold", "silver"]
    assert accounts.totals["gold"].met == 1
    accounts.follow(ClassTable(silver, "silver", {}))
    assert [c.name for c in accounts.snapshot()] == ["silver"]


def test_request_of_a_class_that_lost_its_row_still_ends_without_error() -> None:
    accounts = accounting()
    passage = answer(accounts, [0.5])
    accounts.follow(ClassTable({"silver": ServiceClass("silver", slot=0)}, "silver", {}))
    accounts.token(passage, 0, 0.6)
    assert accounts.finished(passage, 0.6) is Outcome.MET


def test_recent_share_weighs_tokens_of_the_last_minute_and_falls_back_without_any() -> None:
    accounts = accounting()
    weights = dict(enumerate((0.5, 0.625, 0.75, 0.875, 1.0)))
    assert accounts.recent_share("gold", 0.0, weights, otherwise=0.75) == 0.75
    passage = accounts.arrived(GOLD, 1, 0.0)
    accounts.token(passage, 4, 1.0)
    for _ in range(3):
        accounts.token(passage, 0, 30.0)
    assert accounts.recent_share("gold", 30.0, weights, otherwise=9.0) == pytest.approx((1.0 + 3 * 0.5) / 4)
    assert accounts.recent_share("gold", 70.0, weights, otherwise=9.0) == 0.5
    assert accounts.recent_share("gold", 120.0, weights, otherwise=9.0) == 9.0
