"""NVIDIA Dynamo's planner in aggregated mode: a reactive loop over whole replicas, above a throughput floor.

Source: ai-dynamo/dynamo, docs/design-docs/planner-design.md. Load loop, every 5 s: latency of each engine is estimated
from its prefill and KV load; one replica more when every engine's TTFT, or every engine's time per token, is above its
objective, one fewer when all of both are below 0.8 of it, nothing while a change is in flight. Throughput loop, every
180 s: the rate expected (here the last window's, Dynamo's `constant` predictor) over the profiled capacity of a replica
is a lower bound. The estimate here is the engine's own: prompts ahead at the profile's prefill cost, and the measured
time per token; Dynamo fits a regression to the same two inputs.
"""

import math

from prism_operator.simulate.control import Orders, PodSignals, Signals


class Dynamo:
    """`capacity_per_s`: requests a second that one replica holds; `prefill_token_s`: prefill cost of a token."""

    period_s = 5.0
    wants_reports = wants_predictions = False
    name = "dynamo"
    throughput_s, low = 180.0, 0.8

    def __init__(
        self,
        ttft_s: float | None,
        tpot_s: float | None,
        capacity_per_s: float,
        prefill_token_s: float,
        least: int,
        most: int,
    ) -> None:
        self.ttft_s, self.tpot_s = ttft_s or math.inf, tpot_s or math.inf
        self.capacity_per_s, self.prefill_token_s = capacity_per_s, prefill_token_s
        self.least, self.most = least, most
        self._floor: int | None = None
        """Of the throughput loop; what it finds until it has seen a whole window."""
        self._offered, self._since_s = 0, 0.0

    def decide(self, signals: Signals) -> Orders:
        self._offered += signals.offered
        if self._floor is None:
            self._floor = signals.provisioned
        if signals.now_s - self._since_s >= self.throughput_s:
            rate = self._offered / (signals.now_s - self._since_s)
            self._floor = math.ceil(rate / self.capacity_per_s)
            self._offered, self._since_s = 0, signals.now_s
        current = signals.provisioned
        wanted = current
        if signals.pods and len(signals.pods) == current:
            ttft = [self._ttft(pod) for pod in signals.pods]
            tpot = [pod.token_s or 0.0 for pod in signals.pods]
            if min(ttft) > self.ttft_s or min(tpot) > self.tpot_s:
                wanted = current + 1
            elif max(ttft) < self.low * self.ttft_s and max(tpot) < self.low * self.tpot_s:
                wanted = current - 1
        return Orders(replicas=min(max(wanted, self._floor, self.least), self.most))

    def _ttft(self, pod: PodSignals) -> float:
        prefill_s = pod.waiting_prompt_tokens * self.prefill_token_s
        # A queue that waits for KV cache rather than for prefill shows in the age of its head alone.
        return max(prefill_s, pod.oldest_wait_s) + (pod.token_s or 0.0)
