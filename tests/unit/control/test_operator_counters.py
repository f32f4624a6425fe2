import pytest

from prism_api.control import ClassCounters
from prism_operator.control.counters import CountersWentBack, baseline_of, differences
from tests.unit.control.pod_server import report


def counters(arrived=0, met=0, tokens=None, ttft_bucket=None, name="gold"):
    ttft = [0] * 48
    if ttft_bucket is not None:
        ttft[ttft_bucket] = met
    return ClassCounters(name=name, arrived=arrived, met=met, tokens_by_point=tokens or {}, ttft=ttft)


def test_a_lost_poll_loses_nothing():
    before = baseline_of(report(classes=[counters(10, 9, {"full": 100}, 3)]))
    grown = differences(before, report(classes=[counters(25, 20, {"full": 150, "b500": 40}, 3)]))["gold"]
    assert (grown.arrived, grown.met) == (15, 11)
    assert grown.tokens_by_point == {"full": 50, "b500": 40}
    assert grown.ttft[3] == 11


def test_a_restarted_process_counts_from_zero():
    before = baseline_of(report(classes=[counters(1000, 900)]))
    grown = differences(before, report(start_id="start-2", classes=[counters(7, 6)]))["gold"]
    assert (grown.arrived, grown.met) == (7, 6)


def test_a_class_that_appears_counts_from_zero():
    before = baseline_of(report(classes=[counters(10)]))
    grown = differences(before, report(classes=[counters(10), counters(4, name="bulk")]))
    assert (grown["gold"].arrived, grown["bulk"].arrived) == (0, 4)


def test_a_counter_that_falls_without_a_restart_is_a_lie_with_its_name():
    before = baseline_of(report(classes=[counters(10, 9, {"full": 100})]))
    with pytest.raises(CountersWentBack, match="'met' of class 'gold' fell from 9 to 8"):
        differences(before, report(classes=[counters(11, 8, {"full": 100})]))
    with pytest.raises(CountersWentBack, match=r"tokensByPoint\.full"):
        differences(before, report(classes=[counters(11, 9)]))
