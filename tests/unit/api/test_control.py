"""Control messages: fences, histograms, cells, and directives that are refused before they are sent."""

import math
from typing import Any

import pytest
from pydantic import ValidationError

from prism_api.control import (
    HISTOGRAM_BOUNDS_MS,
    ClassCounters,
    Directive,
    Fence,
    GovernorSettings,
    Report,
    histogram_bucket,
    histogram_quantile,
    in_out_cell,
    server_name,
)


def directive(**changes: Any) -> dict[str, Any]:
    return {
        "service": {"namespace": "team-a", "name": "chat", "uid": "u-1"},
        "holder": "prism-operator-0",
        "epoch": 3,
        "sequence": 412,
        "defaultClass": "gold",
        "classes": [{"name": "gold", "ttftMs": 800, "point": "full", "floor": "b750", "ceiling": "full"}],
        "envelope": {"ttlMs": 30000, "safePoint": "full"},
        "reason": "Steady",
        **changes,
    }


def test_fences_compare_by_epoch_first() -> None:
    assert Fence(epoch=1, sequence=9) < Fence(epoch=2, sequence=1)
    assert Fence(epoch=2, sequence=1) < Fence(epoch=2, sequence=2)
    assert not Fence(epoch=2, sequence=2) < Fence(epoch=2, sequence=2)


def test_a_directive_survives_the_wire() -> None:
    sent = Directive.model_validate(directive())
    assert Directive.model_validate_json(sent.model_dump_json(by_alias=True)) == sent
    assert sent.to_wire()["classes"][0]["ttftMs"] == 800
    assert "tpotMs" not in sent.to_wire()["classes"][0]
    assert sent.fence == Fence(epoch=3, sequence=412)


GOLD = directive()["classes"][0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"defaultClass": "silver"}, r"defaultClass must be one of classes \['gold'\]; found 'silver'"),
        ({"classes": [GOLD, GOLD]}, "classes must have distinct names"),
        ({"classes": []}, "at least 1 item"),
        ({"classes": [{**GOLD, "name": f"c{i}"} for i in range(9)], "defaultClass": "c0"}, "at most 8 items"),
        ({"version": "control.v2"}, "control.v1"),
        ({"epoch": -1}, "greater than or equal to 0"),
        ({"envelope": {"ttlMs": 0, "safePoint": "full"}}, "greater than or equal to 1"),
        ({"governor": {"high": 400, "low": 400}}, "governor.low must be less than governor.high; found 400 and 400"),
        ({"modelDigest": "sha256:12"}, "should match pattern"),
        ({"classes": [{**GOLD, "admission": "Drop"}]}, "'Accept' or 'Shed'"),
    ],
)
def test_a_directive_that_contradicts_itself_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Directive.model_validate(directive(**changes))


def test_the_governors_built_in_thresholds_are_in_order() -> None:
    settings = GovernorSettings()
    assert settings.low < settings.high < 1000


def test_histograms_have_48_rising_bounds_and_the_last_is_infinite() -> None:
    assert len(HISTOGRAM_BOUNDS_MS) == 48
    assert list(HISTOGRAM_BOUNDS_MS) == sorted(HISTOGRAM_BOUNDS_MS)
    assert HISTOGRAM_BOUNDS_MS[0] == 1
    assert math.isinf(HISTOGRAM_BOUNDS_MS[-1])


@pytest.mark.parametrize(("milliseconds", "bucket"), [(0.0, 0), (1.0, 0), (1.0001, 1), (1.3, 1), (1e9, 47)])
def test_a_latency_is_counted_in_the_first_bucket_whose_bound_it_does_not_exceed(
    milliseconds: float, bucket: int
) -> None:
    assert histogram_bucket(milliseconds) == bucket


def counts(*latencies_ms: float) -> list[int]:
    histogram = [0] * 48
    for latency in latencies_ms:
        histogram[histogram_bucket(latency)] += 1
    return histogram


def test_a_quantile_without_samples_is_unknown() -> None:
    assert histogram_quantile([0] * 48, 0.95) is None


@pytest.mark.parametrize("quantile", [0.01, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("latency", [0.4, 7.0, 250.0, 3000.0])
def test_a_quantile_of_equal_latencies_lies_within_their_bucket(latency: float, quantile: float) -> None:
    estimate = histogram_quantile(counts(*[latency] * 10), quantile)
    bucket = histogram_bucket(latency)
    low = HISTOGRAM_BOUNDS_MS[bucket - 1] if bucket else 0.0
    assert estimate is not None
    assert low <= estimate <= HISTOGRAM_BOUNDS_MS[bucket]


def test_quantiles_never_fall_as_the_share_rises() -> None:
    histogram = counts(*range(1, 200, 7), 2000, 5000)
    estimates = [histogram_quantile(histogram, share / 20) for share in range(21)]
    assert estimates == sorted(estimates, key=lambda value: value or 0.0)


def test_a_quantile_beyond_the_last_finite_bound_is_that_bound() -> None:
    assert histogram_quantile(counts(1e9), 0.5) == HISTOGRAM_BOUNDS_MS[-2]


@pytest.mark.parametrize(
    ("prompt", "output", "cell"),
    [(1, 1, 0), (256, 32, 0), (257, 32, 4), (256, 33, 1), (1024, 128, 5), (4097, 513, 15), (4096, 512, 10)],
)
def test_a_request_falls_into_one_of_16_cells(prompt: int, output: int, cell: int) -> None:
    assert in_out_cell(prompt, output) == cell


def test_counters_start_at_zero_and_reject_a_histogram_of_another_version() -> None:
    fresh = ClassCounters(name="gold")
    assert sum(fresh.ttft) == sum(fresh.in_out) == fresh.met == 0
    with pytest.raises(ValidationError, match="48 items"):
        ClassCounters.model_validate({"name": "gold", "ttft": [0] * 47})


def test_a_report_survives_the_wire_with_the_word_class_in_it() -> None:
    report = {
        "pod": {"name": "chat-0", "uid": "p-1"},
        "startId": "s",
        "runtime": {"imageDigest": "sha256:0", "accelerator": "demo-gpu"},
        "model": {"digest": "sha256:" + "0" * 64},
        "held": {"epoch": 3, "sequence": 1, "state": "Managed"},
        "effective": [{"class": "gold", "point": "full", "planVersion": 7}],
        "load": {"running": 1, "waiting": 0, "kvBlocks": 8, "kvBlocksUsed": 1, "preemptions": 0},
        "classes": [{"name": "gold", "met": 3}],
        "steps": {"count": 1, "busyMs": 1},
        "ready": True,
        "draining": False,
    }
    parsed = Report.model_validate(report)
    assert parsed.to_wire()["effective"] == report["effective"]
    assert Report.model_validate(parsed.to_wire()) == parsed


def test_the_server_name_separates_equal_services_of_two_namespaces() -> None:
    assert server_name("team-a", "chat") == "chat.team-a.moeprism.internal"
    assert server_name("team-b", "chat") != server_name("team-a", "chat")
