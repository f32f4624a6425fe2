"""The guard: absolute limits, re-checked on what goes out, independent of the planner that decided it.

It reads the spec and the model themselves, never the resolved policy, so that a planner's mistake about a floor or a
cap costs time and not a promise. What it finds is withheld, counted and reported; it never repairs.
"""

from decimal import Decimal

from prism_api.control import Directive, Fence
from prism_api.model import PrismModelSpec
from prism_api.points import Ladder
from prism_api.scaling import ScalingControl, Switch
from prism_api.service import BudgetControl, Mode, OnCap, PrismServiceSpec, ServiceClass


def directive_violation(
    directive: Directive, spec: PrismServiceSpec, model: PrismModelSpec, epoch: int, last: Fence | None
) -> str | None:
    """Why this directive must not be sent; None if it may.

    `epoch` is the one this process fences with, `last` the fence of the service's last directive.
    """
    if directive.epoch != epoch:
        return f"its epoch is {directive.epoch}, this process holds {epoch}"
    if last is not None and directive.fence < last:
        return f"its fence ({directive.epoch}, {directive.sequence}) is below the last, ({last.epoch}, {last.sequence})"
    if directive.model_digest not in (None, model.digest):
        return f"it is for artifact {directive.model_digest}, the model is {model.digest}"
    ladder = model.ladder
    asked, told = {c.name for c in spec.classes}, {c.name for c in directive.classes}
    if asked != told:
        return f"it speaks of classes {sorted(told)}, the spec of {sorted(asked)}"
    if directive.envelope.safe_point not in ladder:
        return f"safe point '{directive.envelope.safe_point}' is unknown"
    by_name = {c.name: c for c in spec.classes}
    for target in directive.classes:
        for point in (target.floor, target.point, target.ceiling):
            if point not in ladder:
                return f"class '{target.name}': point '{point}' is unknown"
        floor, at, ceiling = (ladder.index(p) for p in (target.floor, target.point, target.ceiling))
        if not floor <= at <= ceiling:
            return f"class '{target.name}': '{target.point}' is outside ['{target.floor}', '{target.ceiling}']"
        lowest = _lowest(by_name[target.name], spec, ladder)
        if floor < lowest:
            return (
                f"class '{target.name}': floor '{target.floor}' is below '{ladder.points[lowest].name}', "
                f"the lowest point that keeps minRelativeQuality {by_name[target.name].quality.min_relative_quality}"
            )
        unbounded = spec.budget.control is BudgetControl.OFF or spec.mode is Mode.ADVISORY
        if not unbounded and ceiling > ladder.index(spec.budget.max):
            return f"class '{target.name}': ceiling '{target.ceiling}' is above `budget.max` '{spec.budget.max}'"
    return None


def replicas_violation(replicas: int, spec: PrismServiceSpec) -> str | None:
    """Why this count must not be ordered; None if it may.

    Knows no time of day: of a managed service's schedules the widest bounds count.
    """
    scaling = spec.scaling
    may_sleep = scaling.idle.scale_to_zero is Switch.ENABLED
    if replicas < (0 if may_sleep else 1):
        return f"{replicas} replicas serve nobody"
    if scaling.control is not ScalingControl.MANAGED:
        wanted = spec.replicas
        return None if replicas == wanted else f"{replicas} replicas, but the owner of /scale asks for {wanted}"
    least = min([scaling.min_replicas, *(s.min_replicas for s in scaling.schedules if s.min_replicas is not None)])
    if replicas < least:
        return f"{replicas} replicas are below `scaling.minReplicas` {least}"
    bounds = [s.max_replicas for s in scaling.schedules if s.max_replicas is not None]
    most = None if scaling.max_replicas is None else max([scaling.max_replicas, *bounds])
    if most is not None and replicas > most:
        return f"{replicas} replicas are above `scaling.maxReplicas` {most}"
    price, cap = spec.pool.price_per_hour, spec.cost.max_per_hour
    if spec.cost.on_cap is OnCap.ALERT:
        return None
    if cap is not None and price is not None and Decimal(replicas) * price > cap:
        return f"{replicas} replicas cost {Decimal(replicas) * price} an hour, above `cost.maxPerHour` {cap}"
    return None


def _lowest(service_class: ServiceClass, spec: PrismServiceSpec, ladder: Ladder) -> int:
    """Index of the lowest point that the class's quality floor and `budget.min` allow."""
    kept = ladder.index(ladder.floor_for(service_class.quality.min_relative_quality).name)
    return max(kept, ladder.index(spec.budget.min)) if spec.budget.min else kept
