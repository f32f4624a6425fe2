"""Metrics: vLLM's names, which endpoint pickers, KEDA and dashboards read, and `prism_runtime_*` of our own.

Counts have one source, the accounting that the operator's report uses too; this module reads it at each scrape. Only
latencies, which a scrape cannot reconstruct, are recorded as they happen.
"""

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from prism_api.control import EnvelopeState
from prism_api.manifest import Manifest
from prism_api.points import Ladder
from prism_runtime.engine.loop import EngineLoop, SwapDone
from prism_runtime.server.accounting import Accounting, Outcome, Passage

LATENCY_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKEN_BUCKETS_S = (0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.2, 0.4, 1.0, 2.5)
SWITCH_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)


class Latencies:
    """Histograms and event counters, filled as things happen."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        def vllm(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            family = Histogram(f"vllm:{name}", text, ["model_name"], buckets=buckets, registry=registry)
            return family.labels(model_name)

        self._first = vllm("time_to_first_token_seconds", "Time to first token.", LATENCY_BUCKETS_S)
        self._token = vllm("time_per_output_token_seconds", "Mean time per token after the first.", TOKEN_BUCKETS_S)
        self._whole = vllm("e2e_request_latency_seconds", "Arrival to last token.", LATENCY_BUCKETS_S)
        self._class_first = Histogram(
            "prism_runtime_ttft_seconds",
            "Time to first token.",
            ["class"],
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self._class_token = Histogram(
            "prism_runtime_tpot_seconds",
            "Time per output token.",
            ["class"],
            buckets=TOKEN_BUCKETS_S,
            registry=registry,
        )
        self._switch = Histogram(
            "prism_runtime_switch_duration_seconds",
            "Receipt of a directive (or the governor's decision) to the first step on it.",
            buckets=SWITCH_BUCKETS_S,
            registry=registry,
        )
        self._switches = Counter("prism_runtime_switches", "Plan swaps.", ["cause"], registry=registry)
        self._rejected = Counter(
            "prism_runtime_directive_rejected", "Directives refused by status.", ["code"], registry=registry
        )

    def observe_answer(self, passage: Passage, now_s: float) -> None:
        name = passage.service_class.name
        if passage.ttft_s is not None:
            self._first.observe(passage.ttft_s)
            self._class_first.labels(name).observe(passage.ttft_s)
        if passage.tpot_s is not None:
            self._token.observe(passage.tpot_s)
            self._class_token.labels(name).observe(passage.tpot_s)
        self._whole.observe(now_s - passage.arrived_s)

    def observe_swap(self, swap: SwapDone) -> None:
        self._switches.labels(swap.cause.value).inc()
        self._switch.observe(swap.seconds)

    def observe_refused(self, status: int) -> None:
        self._rejected.labels(str(status)).inc()


class LiveState(Collector):
    """Everything that is read at a scrape: load, counts, fence, certificates."""

    def __init__(
        self,
        *,
        model_name: str,
        manifest: Manifest,
        block_tokens: int,
        engine_loop: EngineLoop,
        accounting: Accounting,
        cert_not_after_s: Callable[[], dict[str, float]],
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._model_name = model_name
        self._block_tokens = block_tokens
        self._engine_loop = engine_loop
        self._accounting = accounting
        self._cert_not_after_s = cert_not_after_s
        self._clock = clock
        self._wall_clock = wall_clock
        ladder: Ladder = accounting.ladder
        measured = {point.name: point for point in manifest.operating_points}
        self._names = ladder.names
        self._budget = {
            i: (measured[p.name].realised_permille or p.budget_permille) / 1000 for i, p in enumerate(ladder.points)
        }
        self._quality = {i: float(p.relative_quality) for i, p in enumerate(ladder.points)}

    def collect(self) -> Iterator[Metric]:
        yield from self._vllm()
        yield from self._classes()
        yield from self._held_budgets()
        yield from self._fence()
        yield from self._work()

    def _vllm(self) -> Iterator[Metric]:
        load, labels, model = self._engine_loop.engine.load(), ["model_name"], [self._model_name]

        def gauge(name: str, text: str, value: float) -> Metric:
            family = GaugeMetricFamily(f"vllm:{name}", text, labels=labels)
            family.add_metric(model, value)
            return family

        def counter(name: str, text: str, value: float) -> Metric:
            family = CounterMetricFamily(f"vllm:{name}", text, labels=labels)
            family.add_metric(model, value)
            return family

        used = load.kv_blocks_used / load.kv_blocks if load.kv_blocks else 0.0
        totals = self._accounting.totals.values()
        yield gauge("num_requests_waiting", "Requests without a token yet.", load.waiting)
        yield gauge("num_requests_running", "Requests that decode.", load.running)
        yield gauge("kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.", used)
        yield gauge("gpu_cache_usage_perc", "Older name of vllm:kv_cache_usage_perc.", used)
        yield counter("num_preemptions", "Requests stopped for want of memory, to go on later.", load.preemptions)
        yield counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", load.prompt_tokens)
        yield counter("prefix_cache_hits", "Prompt tokens found there and not computed.", load.prompt_tokens_known)
        yield counter("prompt_tokens", "Prompt tokens taken in.", sum(t.prompt_tokens for t in totals))
        yield counter("generation_tokens", "Tokens generated.", sum(t.output_tokens for t in totals))
        cache = GaugeMetricFamily(
            "vllm:cache_config_info", "Shape of the KV cache.", labels=["block_size", "num_gpu_blocks"]
        )
        cache.add_metric([str(self._block_tokens), str(load.kv_blocks)], 1)
        yield cache
        blocks = GaugeMetricFamily(
            "prism_runtime_kv_blocks",
            "Blocks of the KV cache: used by requests, kept for prompts that begin alike, free.",
            labels=["state"],
        )
        free = load.kv_blocks - load.kv_blocks_used - load.kv_blocks_kept
        for state, count in (("used", load.kv_blocks_used), ("kept", load.kv_blocks_kept), ("free", free)):
            blocks.add_metric([state], count)
        yield blocks

    def _classes(self) -> Iterator[Metric]:
        tokens = CounterMetricFamily(
            "prism_runtime_tokens", "Generated tokens by operating point.", labels=["class", "point"]
        )
        requests = CounterMetricFamily("prism_runtime_requests", "Requests by outcome.", labels=["class", "outcome"])
        budget = GaugeMetricFamily(
            "prism_runtime_budget_ratio", "Realised activation budget, token-weighted, last minute.", labels=["class"]
        )
        quality = GaugeMetricFamily(
            "prism_runtime_relative_quality_ratio", "Relative quality, token-weighted, last minute.", labels=["class"]
        )
        live = GaugeMetricFamily(
            "prism_runtime_operating_point", "1 for the point a class runs at now.", labels=["class", "point"]
        )
        now_s, class_point = self._clock(), self._engine_loop.engine.plan.class_point
        for name, totals in sorted(self._accounting.totals.items()):
            for point, count in sorted(totals.tokens_by_point.items()):
                tokens.add_metric([name, point], count)
            for outcome in Outcome:
                requests.add_metric([name, outcome.value], getattr(totals, outcome.value))
        for name, service_class in self._engine_loop.classes.live.items():
            point_index = class_point[service_class.slot]
            live.add_metric([name, self._names[point_index]], 1)
            for family, weights in ((budget, self._budget), (quality, self._quality)):
                family.add_metric(
                    [name], self._accounting.recent_share(name, now_s, weights, otherwise=weights[point_index])
                )
        yield from (tokens, requests, budget, quality, live)

    def _held_budgets(self) -> Iterator[Metric]:
        """Of points whose threshold the drift guard shifts; prefixes spend their budget exactly."""
        nominal = GaugeMetricFamily(
            "prism_runtime_point_nominal_budget_ratio", "Budget the drift guard holds.", labels=["point"]
        )
        realised = GaugeMetricFamily(
            "prism_runtime_point_realised_budget_ratio",
            "Budget realised over the drift guard's window, gate and compensation included.",
            labels=["point"],
        )
        shift = GaugeMetricFamily(
            "prism_runtime_point_threshold_shift", "Added to the logarithm of the threshold.", labels=["point"]
        )
        limit = GaugeMetricFamily(
            "prism_runtime_point_shift_at_limit", "1 where the budget is no longer held.", labels=["point"]
        )
        for held in self._engine_loop.engine.budgets():
            point = [self._names[held.point]]
            nominal.add_metric(point, held.nominal)
            shift.add_metric(point, held.shift)
            limit.add_metric(point, float(held.at_limit))
            if held.realised is not None:
                realised.add_metric(point, held.realised)
        yield from (nominal, realised, shift, limit)

    def _fence(self) -> Iterator[Metric]:
        held = self._engine_loop.held()
        prefix = "prism_runtime_"
        yield GaugeMetricFamily(f"{prefix}directive_epoch", "Epoch of the held directive.", value=held.epoch)
        yield GaugeMetricFamily(f"{prefix}directive_sequence", "Sequence of the held directive.", value=held.sequence)
        yield GaugeMetricFamily(f"{prefix}directive_age_seconds", "Since its last receipt.", value=held.age_ms / 1000)
        yield GaugeMetricFamily(
            f"{prefix}envelope_ttl_seconds", "Left until the safe point.", value=held.ttl_left_ms / 1000
        )
        state = GaugeMetricFamily(f"{prefix}envelope_state", "1 for the state the pod is in.", labels=["state"])
        for each in EnvelopeState:
            state.add_metric([each.value], 1 if each is held.state else 0)
        yield state
        expiry = GaugeMetricFamily("prism_cert_expiry_seconds", "Until a certificate expires.", labels=["role"])
        for role, not_after_s in sorted(self._cert_not_after_s().items()):
            expiry.add_metric([role], not_after_s - self._wall_clock())
        yield expiry

    def _work(self) -> Iterator[Metric]:
        totals, pacer, prefix = self._engine_loop.totals, self._engine_loop.pacer, "prism_runtime_"
        yield CounterMetricFamily(f"{prefix}steps", "Engine steps with work.", value=totals.count)
        yield CounterMetricFamily(f"{prefix}busy_seconds", "Time in them, pace included.", value=totals.busy_s)
        yield CounterMetricFamily(f"{prefix}failed_steps", "Steps that raised.", value=totals.failed)
        if pacer:
            yield CounterMetricFamily(
                f"{prefix}lagging_steps", "Steps slower than the pace.", value=pacer.lagging_steps
            )
            yield CounterMetricFamily(f"{prefix}lag_seconds", "Time by which they were slower.", value=pacer.lag_s)
