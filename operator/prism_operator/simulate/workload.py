"""Requests: what arrives when, how long it is, and what became of it. Arrivals and lengths have streams of their own,
so that two policies meet the same world.
"""

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

Draw = Callable[[random.Random], int]
"""One length in tokens."""


@dataclass(slots=True)
class SimRequest:
    """One request. Times are seconds of the simulated clock; None until it happened."""

    arrived_s: float
    service_class: str
    prompt_tokens: int
    output_tokens: int
    prefilled: int = 0
    produced: int = 0
    """Output tokens so far, settled when the request leaves the batch: by the end, or preempted."""
    first_s: float | None = None
    done_s: float | None = None
    quality: float = 0.0
    """Sum over its output tokens of the relative quality of the point that made them."""

    @property
    def ttft_s(self) -> float:
        assert self.first_s is not None
        return self.first_s - self.arrived_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None with a single token."""
        assert self.first_s is not None
        assert self.done_s is not None
        return (self.done_s - self.first_s) / (self.produced - 1) if self.produced > 1 else None


def exponential(mean: float) -> Draw:
    return lambda rng: max(1, round(rng.expovariate(1 / mean)))


def truncated_normal(mean: float, deviation: float, least: int, most: int) -> Draw:
    """Normal, drawn again until it lies within [least, most]."""

    def draw(rng: random.Random) -> int:
        while True:
            tokens = round(rng.gauss(mean, deviation))
            if least <= tokens <= most:
                return tokens

    return draw


def poisson(
    seed: int, phases: Iterable[tuple[float, float]], prompt: float = 64, output: float = 32, name: str = "interactive"
) -> list[SimRequest]:
    """Poisson arrivals of (seconds, rate per second) phases, lengths exponential around their means."""
    arrivals, lengths = random.Random(seed), random.Random(seed + 1)
    draws = (exponential(prompt), exponential(output))
    requests, start_s = [], 0.0
    for seconds, rate in phases:
        at_s = start_s + arrivals.expovariate(rate) if rate else start_s + seconds
        while at_s < start_s + seconds:
            requests.append(SimRequest(at_s, name, *(draw(lengths) for draw in draws)))
            at_s += arrivals.expovariate(rate)
        start_s += seconds
    return requests


def constant(
    lengths: random.Random, start_s: float, seconds: float, rate: float, prompt: Draw, output: Draw, name: str
) -> list[SimRequest]:
    """Evenly spaced arrivals, as load generators send them at a constant rate."""
    count = math.floor(seconds * rate)
    return [SimRequest(start_s + (n + 0.5) / rate, name, prompt(lengths), output(lengths)) for n in range(count)]


def gamma_renewal(rng: random.Random, start_s: float, end_s: float, rate: float, cv: float) -> Iterable[float]:
    """Arrival times of a renewal process with Gamma gaps of mean 1/rate and coefficient of variation `cv`.

    The first gap is drawn whole, so a window's count is a little low for a large `cv`; bursts inside it are as asked.
    """
    if rate <= 0:
        return
    shape = 1 / (cv * cv) if cv > 0 else 0.0
    gap: Callable[[], float] = (lambda: rng.gammavariate(shape, 1 / (rate * shape))) if shape else (lambda: 1 / rate)
    at_s = start_s + gap() * rng.random()
    while at_s < end_s:
        yield at_s
        at_s += gap()
