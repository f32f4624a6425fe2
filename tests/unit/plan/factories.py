"""Valid objects for planner tests: a test sets only what it is about."""

from typing import Any

from prism_api.control import HISTOGRAM_BOUNDS_MS, Fence, Load, histogram_bucket
from prism_api.model import PrismModelSpec
from prism_api.profile import PointProfile, Profile
from prism_api.service import PrismServiceSpec
from prism_operator.plan import demand, policy
from prism_operator.plan.types import (
    ClassDelta,
    DemandState,
    LoopSettings,
    Observation,
    PodView,
    ServicePolicy,
)

POINTS = {"b500": 500, "b625": 625, "b750": 750, "b875": 875, "full": 1000}
QUALITY = {"b500": "0.90", "b625": "0.94", "b750": "0.97", "b875": "0.99", "full": "1"}
FULL_STEP_S, PER_SEQUENCE_S, PER_PREFILL_TOKEN_S = 0.030, 0.003, 0.00035
HALF_SPEED_UP = 1.6
DIGEST = "sha256:" + "0" * 64


def share_of_full(permille: int) -> float:
    """Cost of a point, linear in the budget; half the budget is 1.6 times cheaper."""
    return 1 - (1 - 1 / HALF_SPEED_UP) * (1000 - permille) / 500


def profile(**changes: Any) -> Profile:
    """A paced accelerator: 30 ms a step at full, 3 ms a sequence, 0.35 ms a prefill token."""
    fields: dict[str, Any] = {
        "accelerator": "demo-gpu",
        "provenance": "made up for tests",
        "max_sequences": 16,
        "kv_tokens": 16_384,
        "prefill_tokens_per_step": 256,
        "points": {name: point_profile(share_of_full(permille)) for name, permille in POINTS.items()},
    }
    return Profile(**(fields | changes))


def point_profile(share: float) -> PointProfile:
    def cost(seconds: float) -> int:
        return round(seconds * share * 1e9)

    return PointProfile(
        step_base_nanoseconds=cost(FULL_STEP_S),
        step_per_sequence_nanoseconds=cost(PER_SEQUENCE_S),
        step_per_kilotoken_nanoseconds=0,
        prefill_base_nanoseconds=0,
        prefill_per_token_nanoseconds=cost(PER_PREFILL_TOKEN_S),
    )


def model_spec(**changes: Any) -> PrismModelSpec:
    fields: dict[str, Any] = {
        "source": {"image": {"reference": "registry.example/models/small@sha256:1"}},
        "digest": DIGEST,
        "servedName": "small-moe",
        "operatingPoints": [
            {
                "name": name,
                "budgetPermille": permille,
                "policy": "prefix",
                "relativeQuality": QUALITY[name],
                "relativeQualityLow": QUALITY[name],
            }
            for name, permille in POINTS.items()
        ],
    }
    return PrismModelSpec.model_validate(fields | changes)


def service_class(name: str = "interactive", **changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "name": name,
        "objectives": {"ttftMilliseconds": 1500, "tpotMilliseconds": 200},
        "quality": {"minRelativeQuality": "0.90"},
    }
    return fields | changes


def service_spec(**changes: Any) -> PrismServiceSpec:
    fields: dict[str, Any] = {
        "modelRef": {"name": "small-moe"},
        "classes": [service_class()],
        "scaling": {"minReplicas": 1, "maxReplicas": 3},
        "pools": [{"name": "main", "accelerator": {"name": "demo-gpu"}, "pricePerHour": "2.50"}],
        "runtime": {"image": "registry.example/prism-runtime@sha256:2"},
    }
    return PrismServiceSpec.model_validate(fields | changes)


def service_policy(loop: LoopSettings | None = None, **changes: Any) -> ServicePolicy:
    resolved = policy.resolve(service_spec(**changes), model_spec(), loop or LoopSettings())
    assert isinstance(resolved, ServicePolicy), str(resolved)
    return resolved


def pod(
    name: str = "pod-0", point: str = "full", classes: tuple[str, ...] = ("interactive",), **changes: Any
) -> PodView:
    """A ready pod with a fresh report."""
    fields: dict[str, Any] = {
        "name": name,
        "uid": f"uid-{name}",
        "created_s": -100.0,
        "ready": True,
        "ready_s": -90.0,
        "held": Fence(epoch=1, sequence=1),
        "points": dict.fromkeys(classes, point),
        "load": load(),
        "profile": profile(),
    }
    return PodView(**(fields | changes))


def load(running: int = 0, waiting: int = 0) -> Load:
    return Load(running=running, waiting=waiting, kv_blocks=1024, kv_blocks_used=0, preemptions=0)


def starting_pod(name: str, created_s: float, **changes: Any) -> PodView:
    fields: dict[str, Any] = {"name": name, "uid": f"uid-{name}", "created_s": created_s, "stale": True}
    return PodView(**(fields | changes))


def observation(now_s: float, pods: int | tuple[PodView, ...] = 1, **changes: Any) -> Observation:
    views = tuple(pod(f"pod-{i}") for i in range(pods)) if isinstance(pods, int) else pods
    fields: dict[str, Any] = {"now_s": now_s, "pods": views, "ordered_replicas": len(views)}
    return Observation(**(fields | changes))


def histogram(milliseconds: float, count: int) -> tuple[int, ...]:
    counts = [0] * len(HISTOGRAM_BOUNDS_MS)
    counts[histogram_bucket(milliseconds)] = count
    return tuple(counts)


def delta(
    arrived: int = 0,
    prompt: int = 64,
    output: int = 32,
    ttft_ms: float = 100,
    tpot_ms: float = 50,
    point: str = "full",
) -> ClassDelta:
    """One tick in which as many requests finish as arrive, all met and all at `point`."""
    return ClassDelta(
        arrived=arrived,
        finished=arrived,
        met=arrived,
        prompt_tokens=prompt * arrived,
        output_tokens=output * arrived,
        ttft=histogram(ttft_ms, arrived) if arrived else (),
        tpot=histogram(tpot_ms, arrived) if arrived else (),
        tokens_by_point={point: output * arrived} if arrived else {},
    )


def demand_of(
    resolved: ServicePolicy,
    per_s: dict[str, int] | int,
    now_s: float = 60.0,
    seconds: int = 60,
    pods: int | tuple[PodView, ...] = 1,
    **changes: Any,
) -> DemandState:
    """History of `seconds` one-second ticks that ends at `now_s`, each with the same arrivals."""
    rates = per_s if isinstance(per_s, dict) else {resolved.classes[0].name: per_s}
    state = DemandState()
    for tick in range(seconds + 1):
        at_s = now_s - seconds + tick
        classes = {name: delta(rate, **changes) for name, rate in rates.items()}
        state = demand.update(state, observation(at_s, pods, classes=classes), resolved)
    return state
