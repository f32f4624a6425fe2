"""Simulated pods start waiting requests in the order of the runtime's own policy."""

import math

from hypothesis import given
from hypothesis import strategies as st

from prism_operator.simulate import order
from prism_operator.simulate.workload import SimRequest
from prism_runtime.engine.batching import Slack
from tests.unit.test_batching import costs, sequence

CLASSES = {"gold": (1, 0.5), "plain": (0, 2.0), "batch": (0, None)}
"""Priority and objective of the first token."""
ONE = st.tuples(st.sampled_from(list(CLASSES)), st.integers(0, 400), st.integers(1, 3000))
"""Class, hundredths of a second of arrival, prompt tokens."""


@given(st.lists(ONE, min_size=1, max_size=12), st.integers(0, 40), st.floats(0, 6))
def test_the_next_to_start_is_the_one_that_the_runtime_would_start(
    drawn: list[tuple[str, int, int]], starts: int, now_s: float
) -> None:
    assert order.FAIR == Slack.FAIR
    arrived = sorted(drawn, key=lambda one: one[1])
    simulated = [SimRequest(at / 100 + i * 1e-6, name, prompt, 1) for i, (name, at, prompt) in enumerate(arrived)]
    real = [
        sequence(priority=CLASSES[one.service_class][0], ttft_s=CLASSES[one.service_class][1], prompt=one.prompt_tokens,
                 arrived_s=one.arrived_s)
        for one in simulated
    ]  # fmt: skip
    priced = costs()
    promises = {name: order.Promise(priority, ttft_s or math.inf) for name, (priority, ttft_s) in CLASSES.items()}
    chosen = order.by_deadline(
        simulated, promises, lambda one: priced.reading_seconds(0, one.prompt_tokens), starts, now_s
    )
    assert real[chosen] is Slack(priced).first(real, now_s, starts)
