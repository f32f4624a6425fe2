"""Bounds of the replica count by time of day.

Wall-clock time enters as an argument, like every time here. A lower bound is honoured as early as a pod takes to be
ready, so that the replicas serve when the schedule begins; an upper bound only from its start.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, tzinfo
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from prism_api.scaling import Schedule
from prism_operator.plan.types import ServicePolicy

DAY_S = 86_400
_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")


@dataclass(frozen=True, slots=True)
class Bounds:
    """The policy with the bounds of this moment, and the schedules that set them; None for the spec's own."""

    policy: ServicePolicy
    least_by: str | None = None
    most_by: str | None = None


def zone(name: str) -> tzinfo | None:
    """A time zone, None if this machine's database has none of that name. UTC needs no database."""
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError):
        return None


def bounds_at(policy: ServicePolicy, unix_s: float | None, ready_in_s: float) -> Bounds:
    """The bounds in force. Unknown time leaves those of the spec, which hold at every hour."""
    if unix_s is None or not policy.schedules:
        return Bounds(policy)
    now, soon = _active(policy.schedules, unix_s), _active(policy.schedules, unix_s + ready_in_s)
    least, most = policy.min_replicas, policy.max_replicas
    least_by = most_by = None
    if now is not None and now.min_replicas is not None:
        least, least_by = now.min_replicas, now.name
    if soon is not None and soon.min_replicas is not None and soon.min_replicas > least:
        least, least_by = soon.min_replicas, soon.name
    if now is not None and now.max_replicas is not None:
        most, most_by = now.max_replicas, now.name
    if most is not None and least > most:
        # Met early, a lower bound does not break an upper one that has not ended.
        least = most
    return Bounds(replace(policy, min_replicas=least, max_replicas=most), least_by, most_by)


def _active(schedules: Sequence[Schedule], unix_s: float) -> Schedule | None:
    for schedule in schedules:
        where = zone(schedule.time_zone)
        assert where is not None, "a schedule in an unknown zone is refused when the spec is resolved"
        local = datetime.fromtimestamp(unix_s, where)
        if schedule.days and _DAYS[local.weekday()] not in schedule.days:
            continue
        if schedule.start <= f"{local.hour:02}:{local.minute:02}" < schedule.end:
            return schedule
    return None
