"""SlackFit's idea, after SuperServe: the point that fits the slack of the most urgent request, decided very often.

Source: Khare et al., "SuperServe: Fine-Grained Inference Serving for Unpredictable Workloads", NSDI 2025 (arXiv
2312.16733), section on SlackFit: actuate, for the most urgent query, the (subnetwork, batch size) whose latency is
closest to and below its slack. An LLM engine batches continuously, so what is left to choose is the point. Urgency is
the head of the queue (TTFT) or the batch (time per token); each pod decides for itself every 250 ms, which stands for
"per batch". The paper's offline buckets of equal latency width, and its preference of larger batches inside one, have
no counterpart here: call the result "after SlackFit", not SlackFit.
"""

import math
from collections.abc import Mapping

from prism_operator.simulate.control import Orders, PodSignals, Signals


class SlackFit:
    """`speeds`: point -> step time relative to `full`. The number of replicas is fixed."""

    period_s = 0.25
    wants_reports = wants_predictions = False
    name = "slackfit"

    def __init__(
        self,
        replicas: int,
        ttft_s: float | None,
        tpot_s: float | None,
        prefill_token_s: float,
        speeds: Mapping[str, float],
    ) -> None:
        self.replicas, self.prefill_token_s = replicas, prefill_token_s
        self.ttft_s, self.tpot_s = ttft_s or math.inf, tpot_s or math.inf
        self.speeds = dict(sorted(speeds.items(), key=lambda item: -item[1]))
        """Slowest, and so the most accurate, first."""
        self._points: dict[str, str] = {}
        self._full_token_s: dict[str, float] = {}

    def decide(self, signals: Signals) -> Orders:
        self._points = {pod.name: self._fit(pod) for pod in signals.pods}
        return Orders(replicas=self.replicas, pod_points=self._points)

    def _fit(self, pod: PodSignals) -> str:
        current = self._points.get(pod.name, "full")
        if pod.token_s is not None:
            self._full_token_s[pod.name] = pod.token_s / self.speeds[current]
        token_s = self._full_token_s.get(pod.name, 0.0)
        slack_s = self.ttft_s - pod.oldest_wait_s if pod.waiting else math.inf
        prefill_s = pod.waiting_prompt_tokens * self.prefill_token_s + token_s
        for point, speed in self.speeds.items():
            if prefill_s * speed <= slack_s and token_s * speed <= self.tpot_s:
                return point
        return next(reversed(self.speeds))
