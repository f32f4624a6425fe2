"""Operator metrics, in one registry of their own. No pod label: services have many pods, and pods come and go."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

REGISTRY = CollectorRegistry(auto_describe=True)

_MILLISECONDS_TO_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)

BUILD_INFO = Gauge(
    "prism_operator_build_info", "Always 1; the labels say what runs.", ["version", "python"], registry=REGISTRY
)
LEADER = Gauge("prism_operator_leader", "1 while this process may act.", ["shard"], registry=REGISTRY)
EPOCH = Gauge("prism_operator_epoch", "Epoch that fences this process's directives.", registry=REGISTRY)
RECONCILE_DURATION = Histogram(
    "prism_operator_reconcile_duration_seconds",
    "One reconcile of one object.",
    ["result"],
    buckets=_MILLISECONDS_TO_SECONDS,
    registry=REGISTRY,
)
QUEUE_DEPTH = Gauge("prism_operator_queue_depth", "Keys that wait for a reconcile.", registry=REGISTRY)
QUEUE_AGE = Gauge("prism_operator_queue_age_seconds", "How long the oldest waiting key has waited.", registry=REGISTRY)
API_REQUESTS = Counter(
    "prism_operator_api_requests_total",
    "Answers of the API server; code 0 is no answer.",
    ["verb", "code"],
    registry=REGISTRY,
)
API_THROTTLE = Counter(
    "prism_operator_api_throttle_seconds",
    "Time that writes waited for the token bucket or a Retry-After.",
    registry=REGISTRY,
)
LOOP_LAG = Gauge("prism_operator_loop_lag_seconds", "How late the event loop woke a sleeping task.", registry=REGISTRY)
TICK_DURATION = Histogram(
    "prism_operator_tick_duration_seconds",
    "One tick of one service.",
    ["loop"],
    buckets=_MILLISECONDS_TO_SECONDS,
    registry=REGISTRY,
)
CHANNEL_PODS = Gauge(
    "prism_operator_channel_pods", "Pods whose last call on the control channel was answered.", registry=REGISTRY
)
CHANNEL_POLL_DURATION = Histogram(
    "prism_operator_channel_poll_duration_seconds",
    "One report, request to validated answer.",
    buckets=_MILLISECONDS_TO_SECONDS,
    registry=REGISTRY,
)
DIRECTIVES = Counter(
    "prism_operator_directives_total",
    "Directives by result: Acked, Refused, Unreachable, Malformed, Withheld.",
    ["result"],
    registry=REGISTRY,
)
DIRECTIVE_ACK = Histogram(
    "prism_operator_directive_ack_seconds",
    "From sending a directive to the pod's acknowledgement.",
    buckets=_MILLISECONDS_TO_SECONDS,
    registry=REGISTRY,
)
DECISIONS = Counter(
    "prism_operator_decisions_total", "Moves of a knob by kind and reason.", ["kind", "reason"], registry=REGISTRY
)
EVENTS_DROPPED = Counter(
    "prism_operator_events_dropped_total", "Events given up because writes were throttled.", registry=REGISTRY
)
CERT_EXPIRY = Gauge(
    "prism_cert_expiry_seconds",
    "Seconds until the certificate expires, the soonest of its role.",
    ["role"],
    registry=REGISTRY,
)

_SERVICE = ["namespace", "service"]
DESIRED_REPLICAS = Gauge("prism_operator_desired_replicas", "Replicas ordered.", _SERVICE, registry=REGISTRY)
RECOMMENDED_REPLICAS = Gauge(
    "prism_operator_recommended_replicas", "Replicas that the plan wants.", _SERVICE, registry=REGISTRY
)
READY_REPLICAS = Gauge("prism_operator_ready_replicas", "Pods that are Ready.", _SERVICE, registry=REGISTRY)
SIGNAL_AGE = Gauge(
    "prism_operator_signal_age_seconds", "Age of the oldest report of a ready pod.", _SERVICE, registry=REGISTRY
)
POD_READY = Gauge(
    "prism_operator_pod_ready_seconds", "Measured time from a pod's creation to Ready.", _SERVICE, registry=REGISTRY
)
COST_PER_HOUR = Gauge("prism_operator_cost_per_hour", "Price of all replicas an hour.", _SERVICE, registry=REGISTRY)
BUDGET_RATIO = Gauge(
    "prism_operator_budget_ratio", "Activation budget ordered for a class.", [*_SERVICE, "class"], registry=REGISTRY
)
ATTAINMENT_RATIO = Gauge(
    "prism_operator_attainment_ratio", "Share of requests met in the window.", [*_SERVICE, "class"], registry=REGISTRY
)
RELATIVE_QUALITY_RATIO = Gauge(
    "prism_operator_relative_quality_ratio",
    "Token-weighted relative quality in the window.",
    [*_SERVICE, "class"],
    registry=REGISTRY,
)
DEGRADED_SECONDS = Counter(
    "prism_operator_degraded_seconds_total",
    "Time that a class was ordered below `full`.",
    [*_SERVICE, "class"],
    registry=REGISTRY,
)

_PER_SERVICE = (DESIRED_REPLICAS, RECOMMENDED_REPLICAS, READY_REPLICAS, SIGNAL_AGE, POD_READY, COST_PER_HOUR)
_PER_CLASS = (BUDGET_RATIO, ATTAINMENT_RATIO, RELATIVE_QUALITY_RATIO, DEGRADED_SECONDS)


def forget_service(namespace: str, service: str) -> None:
    """Drop a deleted service's series, so that dashboards do not show its last values for ever."""
    for metric in (*_PER_SERVICE, *_PER_CLASS):
        metric.remove_by_labels({"namespace": namespace, "service": service})
