"""Bounds by time of day: the first schedule that applies, lower bounds early, upper bounds on time."""

from datetime import UTC, datetime
from typing import Any

import pytest

from prism_operator.plan import policy as plan_policy
from prism_operator.plan import schedule
from prism_operator.plan.types import Unusable
from tests.unit.plan.factories import model_spec, service_policy, service_spec

OFFICE = {
    "name": "office",
    "days": ["Mon", "Tue"],
    "start": "08:00",
    "end": "19:00",
    "minReplicas": 3,
    "maxReplicas": 8,
}
NIGHT = {"name": "night", "start": "00:00", "end": "06:00", "maxReplicas": 1}
READY_S = 120.0


def _at(text: str) -> float:
    """Seconds of a UTC time on Monday, 2 March 2026, or the day that is named."""
    moment = text if "-" in text else f"2026-03-02T{text}"
    return datetime.fromisoformat(moment).replace(tzinfo=UTC).timestamp()


def _bounds(at: str | None, *schedules: dict[str, Any]) -> tuple[int, int | None]:
    scaling = {"minReplicas": 1, "maxReplicas": 4, "schedules": list(schedules)}
    unix_s = None if at is None else _at(at)
    resolved = schedule.bounds_at(service_policy(scaling=scaling), unix_s, READY_S).policy
    return resolved.min_replicas, resolved.max_replicas


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        ("07:57:59", (1, 4)),
        ("07:58:00", (3, 4)),
        ("08:00:00", (3, 8)),
        ("18:59:59", (3, 8)),
        ("19:00:00", (1, 4)),
        ("2026-03-04T12:00:00", (1, 4)),
    ],
)
def test_lower_bound_comes_one_pod_start_early_and_both_end_on_time(at: str, expected: tuple[int, int]) -> None:
    assert _bounds(at, OFFICE) == expected


def test_unknown_time_leaves_the_bounds_of_the_spec() -> None:
    assert _bounds(None, OFFICE) == (1, 4)


def test_first_of_several_schedules_that_apply_counts() -> None:
    all_day = {"name": "all-day", "start": "00:00", "end": "23:59", "minReplicas": 2}
    assert _bounds("12:00:00", OFFICE, all_day) == (3, 8)
    assert _bounds("12:00:00", all_day, OFFICE) == (2, 4)


def test_lower_bound_that_is_met_early_breaks_no_upper_bound() -> None:
    early = {"name": "early", "start": "06:00", "end": "08:00", "minReplicas": 3}
    assert _bounds("05:59:00", NIGHT, early) == (1, 1)


def test_local_time_of_the_zone_counts() -> None:
    berlin = {**OFFICE, "timeZone": "Europe/Berlin"}
    assert _bounds("07:00:00", berlin) == (3, 8)
    assert _bounds("18:00:00", berlin) == (1, 4)


def test_unknown_zone_is_refused_with_the_field_and_what_would_work() -> None:
    spec = service_spec(scaling={"minReplicas": 1, "maxReplicas": 4, "schedules": [{**NIGHT, "timeZone": "Mars/Base"}]})
    refused = plan_policy.resolve(spec, model_spec())
    assert isinstance(refused, Unusable)
    assert (refused.condition, refused.reason) == ("Accepted", "UnknownTimeZone")
    assert "scaling.schedules[night].timeZone" in refused.message
    assert "Europe/Berlin" in refused.message
