"""Spec and model to one resolved policy, or the sentence that says why there is none."""

from prism_api import FULL
from prism_api.effective import effective
from prism_api.model import PrismModelSpec
from prism_api.points import Ladder
from prism_api.scaling import ScalingControl, Switch
from prism_api.service import BudgetControl, Mode, Overload, PrismServiceSpec, ServiceClass
from prism_operator.plan import schedule
from prism_operator.plan.types import ClassPolicy, LoopSettings, ServicePolicy, Unusable

_DEFAULT_LOOP = LoopSettings()


def resolve(
    spec: PrismServiceSpec, model: PrismModelSpec | None, loop: LoopSettings = _DEFAULT_LOOP
) -> ServicePolicy | Unusable:
    """Resolve floors, caps and settings. `model` is None if the PrismModel does not exist (yet).

    A class's floor is the higher of `budget.min` and the lowest point whose lower quality bound keeps the class's
    minRelativeQuality. It must not lie above `budget.max`, else the quality promised could never be kept.
    """
    if model is None:
        return Unusable(
            "ModelResolved",
            "NotFound",
            f"PrismModel '{spec.model_ref.name}' was not found in this namespace. "
            "Create it, or create a PrismService that refers to an existing one.",
        )
    try:
        ladder = model.ladder
    except ValueError as error:
        return Unusable("ModelResolved", "NotReady", f"PrismModel '{spec.model_ref.name}' cannot be used: {error}.")
    return (
        _unknown_point(spec, ladder)
        or _unreachable_floor(spec, ladder)
        or _missing_price(spec)
        or _unknown_zone(spec)
        or _policy(spec, model, ladder, loop)
    )


def _unknown_point(spec: PrismServiceSpec, ladder: Ladder) -> Unusable | None:
    budget = spec.budget
    asked = {
        "budget.min": budget.min,
        "budget.max": budget.max,
        "budget.safePoint": budget.safe_point,
        "budget.operatingPoint": budget.operating_point,
    }
    for field, name in asked.items():
        if name is not None and name not in ladder:
            return Unusable(
                "Accepted",
                "UnknownOperatingPoint",
                f"`{field}` names operating point '{name}', which PrismModel '{spec.model_ref.name}' does not have. "
                f"Choose one of: {', '.join(ladder.names)}.",
            )
    return None


def _floor(service_class: ServiceClass, spec: PrismServiceSpec, ladder: Ladder) -> str:
    kept = ladder.floor_for(service_class.quality.min_relative_quality).name
    if spec.budget.min is None:
        return kept
    return max(kept, spec.budget.min, key=ladder.index)


def _unreachable_floor(spec: PrismServiceSpec, ladder: Ladder) -> Unusable | None:
    top = spec.budget.max
    for service_class in spec.classes:
        floor = _floor(service_class, spec, ladder)
        if ladder.index(floor) > ladder.index(top):
            return Unusable(
                "Accepted",
                "FloorUnreachable",
                f"Class '{service_class.name}' needs operating point '{floor}' or higher "
                f"(minRelativeQuality {service_class.quality.min_relative_quality}, `budget.min` "
                f"{spec.budget.min or 'not set'}), but `budget.max` is '{top}' with a lower quality bound of "
                f"{ladder[top].relative_quality_low}. Raise `budget.max`, or lower the class's minRelativeQuality "
                "or `budget.min`.",
            )
    return None


def _missing_price(spec: PrismServiceSpec) -> Unusable | None:
    cap, pool = spec.cost.max_per_hour, spec.pool
    for field, asked in (("cost.maxPerHour", cap), ("cost.targetPerHour", spec.cost.target_per_hour)):
        if asked is not None and pool.price_per_hour is None:
            return Unusable(
                "Accepted",
                "PriceUnknown",
                f"`{field}` is {asked}, but pool '{pool.name}' has no price. "
                f"Set `pools[{pool.name}].pricePerHour`, or remove `{field}`.",
            )
    if cap is None:
        return None
    assert pool.price_per_hour is not None, "a cap without a price was refused above"
    if pool.price_per_hour * spec.scaling.min_replicas > cap:
        return Unusable(
            "Accepted",
            "FloorUnreachable",
            f"`scaling.minReplicas` {spec.scaling.min_replicas} at {pool.price_per_hour} an hour each costs more than "
            f"`cost.maxPerHour` {cap}. Raise the cap or lower `scaling.minReplicas`.",
        )
    return None


def _unknown_zone(spec: PrismServiceSpec) -> Unusable | None:
    for one in spec.scaling.schedules:
        if schedule.zone(one.time_zone) is None:
            return Unusable(
                "Accepted",
                "UnknownTimeZone",
                f"`scaling.schedules[{one.name}].timeZone` is '{one.time_zone}', which the operator's time zone "
                "database does not have. Use an IANA name such as 'Europe/Berlin', or 'UTC'.",
            )
    return None


def _policy(spec: PrismServiceSpec, model: PrismModelSpec, ladder: Ladder, loop: LoopSettings) -> ServicePolicy:
    budget, scaling = spec.budget, spec.scaling
    classes = tuple(
        ClassPolicy(
            name=service_class.name,
            priority=service_class.priority,
            ttft_s=_seconds(service_class.objectives.ttft_milliseconds),
            tpot_s=_seconds(service_class.objectives.tpot_milliseconds),
            attainment_target=float(service_class.attainment_target),
            window_s=service_class.window_seconds,
            sheds=service_class.overload is Overload.SHED,
            floor=_floor(service_class, spec, ladder),
            degraded_s_per_day=_limit(service_class.quality.max_degraded_seconds_per_day),
        )
        for service_class in spec.classes
    )
    owned = scaling.control is ScalingControl.MANAGED
    return ServicePolicy(
        classes=classes,
        default_class=spec.default_class_name,
        ladder=ladder,
        model_digest=model.digest,
        budget=budget.control,
        fixed_point=budget.operating_point if budget.control is BudgetControl.FIXED else None,
        max_point=FULL if budget.control is BudgetControl.OFF else budget.max,
        safe_point=budget.safe_point,
        paused=spec.mode is Mode.PAUSED,
        advisory=spec.mode is Mode.ADVISORY,
        scaling=scaling.control,
        min_replicas=scaling.min_replicas,
        max_replicas=scaling.max_replicas,
        spec_replicas=None if owned else spec.replicas,
        price_per_hour=spec.pool.price_per_hour,
        max_per_hour=spec.cost.max_per_hour,
        effective=effective(spec),
        loop=loop,
        brownout=budget.brownout,
        target_per_hour=spec.cost.target_per_hour,
        on_cap=spec.cost.on_cap,
        idle_after_s=scaling.idle.after_seconds if scaling.idle.scale_to_zero is Switch.ENABLED else None,
        schedules=tuple(scaling.schedules),
    )


def _limit(degraded_s_per_day: int) -> int | None:
    """A limit that can be reached; the whole day is none."""
    return degraded_s_per_day if degraded_s_per_day < schedule.DAY_S else None


def _seconds(milliseconds: int | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000
