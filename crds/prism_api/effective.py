"""Settings after defaults: a field that a policy may also set has no schema default; its built-in value is here."""

from dataclasses import dataclass, field
from decimal import Decimal

from prism_api.scaling import Direction, ForecastMethod, Reserve, SignalLoss, Switch
from prism_api.service import BudgetOnSignalLoss, PrismServiceSpec


@dataclass(frozen=True, slots=True)
class EffectiveSettings:
    envelope_ttl_s: int
    dwell_down_ms: int
    dwell_up_ms: int
    bridge_scale_up: bool
    max_step: int
    headroom: float
    headroom_learned: bool
    """The headroom is only the least: what load has exceeded expectations by is kept as well."""
    stabilization_up_s: int
    stabilization_down_s: int
    reserve: Reserve = Reserve.MIXED
    forecast: ForecastMethod = ForecastMethod.AUTO
    forecast_horizon_s: int = 0
    """0: the time until a new pod is ready, as measured."""
    pace_up: Direction = field(default_factory=Direction)
    pace_down: Direction = field(default_factory=Direction)
    budget_on_signal_loss: BudgetOnSignalLoss = BudgetOnSignalLoss.HOLD
    scaling_on_signal_loss: SignalLoss = field(default_factory=SignalLoss)


def effective(spec: PrismServiceSpec) -> EffectiveSettings:
    """Service over built-in value, field by field."""

    def chosen(value: int | None, built_in: int) -> int:
        return built_in if value is None else value

    budget, scaling = spec.budget, spec.scaling
    return EffectiveSettings(
        envelope_ttl_s=chosen(budget.envelope_ttl_seconds, 30),
        dwell_down_ms=chosen(budget.dwell.down_milliseconds, 200),
        dwell_up_ms=chosen(budget.dwell.up_milliseconds, 10_000),
        bridge_scale_up=(budget.bridge_scale_up or Switch.ENABLED) is Switch.ENABLED,
        max_step=chosen(scaling.max_step, 4),
        headroom=float(Decimal("0.10") if scaling.headroom is None else scaling.headroom),
        headroom_learned=scaling.headroom is None,
        stabilization_up_s=chosen(scaling.behavior.scale_up.stabilization_window_seconds, 30),
        stabilization_down_s=chosen(scaling.behavior.scale_down.stabilization_window_seconds, 300),
        reserve=scaling.reserve,
        forecast=scaling.forecast.method,
        forecast_horizon_s=scaling.forecast.horizon_seconds,
        pace_up=scaling.behavior.scale_up,
        pace_down=scaling.behavior.scale_down,
        budget_on_signal_loss=budget.on_signal_loss,
        scaling_on_signal_loss=scaling.on_signal_loss,
    )
