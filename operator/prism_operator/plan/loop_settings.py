"""Settings of the two loops that no service sets."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """Periods, windows and thresholds of the two loops. Defaults suit pods that start in a minute or two."""

    fast_period_s: float = 1.0
    slow_period_s: float = 30.0
    short_window_s: float = 6.0
    """Latencies of the fast loop; Knative's panic window."""
    long_window_s: float = 60.0
    """Rates of the slow loop, and as far back as a burst can press; Knative's stable window."""
    enough_arrivals: int = 20
    """Below this count a window is widened to the next one: the relative error of n arrivals is 1/sqrt(n)."""
    high: float = 0.60
    """Saturation above which the budget sinks; a healthy 90 % quantile lies at 0.2 to 0.45 of the objective."""
    low: float = 0.40
    governor_high: float = 0.90
    """The same for pods' governors. They feel the mean of some twenty steps, not a quantile over seconds: a step that
    reads somebody's prompt takes more than an objective in a healthy pod, so only what is nearly a miss is news."""
    clamp: float = 2.0
    """Latency beyond twice the objective says no more than twice does, and would poison averages."""
    restore_margin: float = 0.05
    """A step up must be predicted to stay this far below `high`."""
    rate_margin: float = 0.05
    """Share of offered load that ready capacity must have to spare in the fast loop."""
    restore_rate_margin: float = 0.15
    """The same for a step up: so much more that a load which varies by 10 % does not flap between two points."""
    calibration_s: float = 120.0
    """Time constant of the correction of a profile that does not agree with what is observed."""
    missed_polls: int = 3
    pod_ready_s: float = 120.0
    """Assumed creation-to-Ready time until one was measured."""
    stuck_factor: float = 2.0
    """A pod that starts for longer than this many pod-ready times gets no credit and is reported."""
    down_period_s: float = 120.0
    """Least time between two scale-downs, of one pod each."""
    rehearsal_s: float = 0.0
    """How long a pod is out of traffic before it is removed; 0: scale-downs are not rehearsed."""
    target_saturation: float = 0.55
    """What the slow loop aims at while there is no profile (the law of llm-d's KEDA guide)."""
