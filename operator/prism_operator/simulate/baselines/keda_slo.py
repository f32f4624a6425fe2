"""KEDA driving an HPA by the latency law of llm-d's guide to SLO-aware autoscaling.

Source: llm-d/llm-d, guides/workload-autoscaling/README.slo-aware.md and slo-aware/benchmark-templates. Saturation is
the worse of P90 TTFT and P90 TPOT over its objective (1-minute rates, rules every 15 s), clamped at 2 and averaged over
45 s. With n provisioned and r ready replicas, c = r/n while some start:

    s > 0.55    n + ceil(n * (s * c / 0.55 - 1))
    s < 0.40    n - floor(n * (1 - s / 0.40))        uncredited, so that a credit cannot shed replicas
    else        n

then the HPA: up max(100 %, 4 pods) per 60 s with the minimum over 30 s, down one pod per 120 s with the maximum over
180 s. The guide feeds the law latency that its router predicts, or measured latency where there is no predictor
(`predicted=False`). The predictor is a regression of the 90 % quantile (latency predictor, LATENCY_QUANTILE_ALPHA),
here of the TTFT of each arrival; TPOT is the mean since the last evaluation in both cases.
Both pass through the router's histogram buckets (llm-d-router, pkg/epp/metrics), which are coarse where the law looks:
a pool whose TPOT lies anywhere between 40 and 60 ms reads as 58 ms.
"""

import math

from prism_operator.simulate.baselines.history import Window, histogram_quantile
from prism_operator.simulate.baselines.hpa import Behavior, RateLimit
from prism_operator.simulate.control import Orders, Signals

TTFT_BUCKETS_S = (
    0.005,
    0.025,
    0.05,
    0.1,
    0.2,
    0.4,
    0.6,
    0.8,
    1,
    1.25,
    1.5,
    2,
    3,
    4,
    5,
    6,
    8,
    10,
    15,
    20,
    30,
    45,
    60,
    120,
)
TPOT_BUCKETS_S = (
    *(0.0005, 0.00205, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1),
    *(0.125, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 2),
)
BEHAVIOR = Behavior(
    up_window_s=30.0,
    up_percent=100.0,
    up_pods=4,
    up_period_s=60.0,
    down_window_s=180.0,
    down_percent=None,
    down_pods=1,
    down_period_s=120.0,
)


class KedaSlo:
    """`ttft_s`, `tpot_s`: the one pair of objectives that the law knows; None leaves one out."""

    period_s = 15.0
    name = "keda-slo"
    wants_reports = False

    def __init__(
        self,
        ttft_s: float | None,
        tpot_s: float | None,
        least: int,
        most: int,
        *,
        up: float = 0.55,
        down: float = 0.40,
        clamp: float = 2.0,
        smoothing_s: float = 45.0,
        rate_s: float = 60.0,
        predicted: bool = True,
    ) -> None:
        self.wants_predictions = predicted
        self.ttft_s, self.tpot_s, self.up, self.down, self.clamp = ttft_s, tpot_s, up, down, clamp
        self.least, self.most, self.rate_s = least, most, rate_s
        self._saturation = Window(smoothing_s)
        self._ttft: list[tuple[float, float]] = []
        self._steps: list[tuple[float, float, float]] = []
        self._limit = RateLimit(BEHAVIOR, least, most)

    def decide(self, signals: Signals) -> Orders:
        raw = self._measure(signals)
        self._saturation.add(signals.now_s, min(self.clamp, raw))
        n, r = signals.provisioned, len(signals.pods)
        wanted = min(max(self.law(self._saturation.mean(0.0), n, r), self.least), self.most)
        return Orders(replicas=self._limit.limit(signals.now_s, n, wanted))

    def law(self, s: float, provisioned: int, ready: int) -> int:
        """Desired replicas before the HPA."""
        credit = ready / provisioned if 0 < ready < provisioned else 1.0
        if s > self.up:
            return provisioned + math.ceil(provisioned * (s * credit / self.up - 1))
        if s < self.down:
            return provisioned - math.floor(provisioned * (1 - s / self.down))
        return provisioned

    def _measure(self, signals: Signals) -> float:
        """P90 over objective, the worse of both; 0 without traffic."""
        since_s = signals.now_s - self.rate_s
        newest = signals.predictions if self.wants_predictions else signals.first_tokens
        self._ttft = [one for one in self._ttft if one[0] > since_s] + list(newest)
        self._steps = [one for one in self._steps if one[0] > since_s]
        self._steps += [(signals.now_s, pod.token_s, pod.running) for pod in signals.pods if pod.token_s]
        ratios = []
        ttft_s = histogram_quantile(0.9, TTFT_BUCKETS_S, [(ttft, 1.0) for _, ttft in self._ttft])
        tpot_s = histogram_quantile(0.9, TPOT_BUCKETS_S, [(step, running) for _, step, running in self._steps])
        if self.ttft_s is not None and ttft_s is not None:
            ratios.append(ttft_s / self.ttft_s)
        if self.tpot_s is not None and tpot_s is not None:
            ratios.append(tpot_s / self.tpot_s)
        return max(ratios, default=0.0)
