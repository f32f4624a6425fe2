"""The replay of traces against batching policies: what it counts, and that it can tell policies apart."""

import pytest

from evidence import runtime_goodput as goodput
from prism_runtime.engine.batching import POLICIES
from prism_runtime.engine.pace import load_profile

PROFILE = load_profile("demo").model_copy(
    update={"points": {name: load_profile("demo").points[name] for name in ("b500", "full")}}
)
POD = goodput.pod_of(PROFILE)
PIECE = {"seed": 0, "start_s": 600.0, "span_s": 60.0, "most_in": 384, "most_out": 64}


def load(share: float) -> list[goodput.Arrival]:
    unit = goodput.capacity(POD, goodput.arrivals("azure2023_conv", rate=1.0, **PIECE))
    return goodput.arrivals("azure2023_conv", rate=share * unit, **PIECE)


@pytest.mark.parametrize("policy", POLICIES)
def test_everybody_meets_their_objectives_at_a_low_load_and_each_request_is_counted_once(policy: str) -> None:
    requests = load(0.2)
    outcome = goodput.play(POD, requests, policy, seed=0)
    assert outcome.arrived.total() == len(requests)
    assert outcome.met.total() >= (0.5 if policy == "paper" else 0.85) * len(requests)
    assert outcome == goodput.play(POD, requests, policy, seed=0), "virtual time knows no chance but the seed's"


def test_beyond_capacity_ours_keeps_more_promises_than_both_baselines_and_gold_stays_at_full() -> None:
    requests = load(1.4)
    ours, paper, fifo = (goodput.play(POD, requests, policy, seed=0) for policy in ("slack", "paper", "fifo"))
    assert ours.goodput > 1.3 * max(paper.goodput, fifo.goodput)
    assert ours.budget[goodput.GOLD] == fifo.budget[goodput.BULK] == 1.0
    assert 0.5 <= ours.budget[goodput.BULK] < 1.0


def test_a_trace_is_thinned_or_repeated_to_the_asked_rate_and_clipped_to_the_pod() -> None:
    for rate in (1.0, 20.0):
        taken = goodput.arrivals("azure2023_conv", rate=rate, **PIECE)
        assert len(taken) == pytest.approx(rate * PIECE["span_s"], rel=0.15)
        assert max(one.input_tokens for one in taken) <= 384
        assert min(one.output_tokens for one in taken) >= 2
        assert [one.at_s for one in taken] == sorted(one.at_s for one in taken)
