"""Why a plan is what it is, in words that metrics, events and status share."""

from enum import StrEnum


class Status(StrEnum):
    """Progress: a knob moves. Hold: it stays and that is right. Blocked: it would move but may not; never "done"."""

    PROGRESS = "Progress"
    HOLD = "Hold"
    BLOCKED = "Blocked"


class Reason(StrEnum):
    """Why a plan is what it is. Closed: metrics, events and status use these words."""

    ADOPTED = "Adopted"
    STEADY = "Steady"
    DEMAND = "Demand"
    BURST_BRIDGE = "BurstBridge"
    BROWNOUT = "Brownout"
    RESTORE = "Restore"
    DWELL = "Dwell"
    AT_FLOOR = "AtFloor"
    AT_FULL = "AtFull"
    PINNED = "Pinned"
    QUALITY_BUDGET_SPENT = "QualityBudgetSpent"
    COST_CAP = "CostCap"
    FLEET_QUOTA = "FleetQuota"
    MAX_REPLICAS = "MaxReplicas"
    IN_FLIGHT = "InFlight"
    STABILIZING = "Stabilizing"
    STEP_CAP = "StepCap"
    SCHEDULE = "Schedule"
    REHEARSAL = "Rehearsal"
    REHEARSAL_FAILED = "RehearsalFailed"
    IDLE = "Idle"
    WOKEN = "Woken"
    SIGNALS_STALE = "SignalsStale"
    NO_PROFILE = "NoProfile"
    ROLLOUT = "Rollout"
    POD_LOST = "PodLost"
    PAUSED = "Paused"
    ADVISORY = "Advisory"
    EXTERNAL = "External"
