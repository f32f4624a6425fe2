"""Records that are valid by themselves: a test sets only what it is about."""

from typing import Any

from examples.demo.records import Answer, PodSample, Sample
from examples.demo.results import Episode, Ladder, Objectives

LADDER = Ladder(budget={"b500": 500, "b750": 750, "full": 1000}, quality={"b500": 0.98, "b750": 0.99, "full": 1.0})
OBJECTIVES = Objectives(ttft_s=1.5, tpot_s=0.2)
CLASS = "interactive"


def answer(at_s: float = 0.0, **changes: Any) -> Answer:
    fields: dict[str, Any] = {
        "index": 0,
        "at_s": at_s,
        "sent_s": at_s,
        "outcome": "finished",
        "status": 200,
        "end_s": at_s + 1.0,
        "ttft_s": 0.2,
        "tpot_s": 0.04,
        "prompt_tokens": 300,
        "output_tokens": 20,
        "point": "full",
    }
    return Answer(**(fields | changes))


def pod(point: str = "full", tokens: dict[str, int] | None = None, waiting: int = 0, running: int = 0) -> PodSample:
    return PodSample({CLASS: point}, waiting, running, tokens or {})


def sample(at_s: float, existing: int = 1, pods: dict[str, PodSample] | None = None, **changes: Any) -> Sample:
    return Sample(at_s, changes.get("desired", existing), changes.get("ready", existing), existing, pods or {})


def episode(answers: list[Answer], samples: list[Sample], **changes: Any) -> Episode:
    fields: dict[str, Any] = {
        "arrivals_s": [each.at_s for each in answers],
        "answers": answers,
        "samples": samples,
        "objectives": OBJECTIVES,
        "ladder": LADDER,
        "service_class": CLASS,
        "price_per_hour": 2.5,
    }
    return Episode(**(fields | changes))


def burst_times(calm_s: float = 20, burst_s: float = 15, after_s: float = 20) -> list[float]:
    """One request a second, four in the burst."""
    times = [float(second) for second in range(int(calm_s))]
    times += [calm_s + index / 4 for index in range(int(burst_s * 4))]
    return times + [calm_s + burst_s + float(second) for second in range(int(after_s))]
