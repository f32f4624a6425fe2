"""The comparison of the simulator with the real engine: what each side does with the same requests."""

import pytest

from evidence.planner_engine import ARTIFACT, LIMITS, over, serve, simulate
from evidence.runtime_goodput import Arrival
from prism_api import FULL
from prism_api.profile import PointProfile
from prism_operator.simulate.cli import load_profile
from prism_runtime.server.serve import load_engine

LOAD = [Arrival(0.0, 40, 8), Arrival(0.0, 20, 1), Arrival(3.0, 30, 5)]
"""Two together, of which one is a single token, and one after a pause."""


def test_engine_answers_every_request_and_its_pauses_cost_nothing() -> None:
    engine = load_engine(ARTIFACT, LIMITS, threads=1, policy="fifo")
    taken = serve(engine, LOAD, engine.ladder.names[0], seed=0)
    assert len(taken.ttft_s) == len(LOAD)
    assert len(taken.tpot_s) == 2, "one token has no pace"
    assert min(taken.ttft_s) > 0
    assert max(taken.ttft_s) < 2.0, "the third found an idle engine"


def test_simulation_of_a_profile_twice_as_dear_shows_as_twice_the_latencies() -> None:
    profile = load_profile("cpu-small-moe")
    dear = PointProfile(**{field: 2 * cost for field, cost in profile.points[FULL].model_dump().items()})
    twice = profile.model_copy(update={"points": {FULL: dear}})
    one, two = (simulate(each, LOAD, FULL, seed=0) for each in (profile, twice))
    assert over(two, one) == {name: pytest.approx(2.0, rel=0.01) for name in one.quantiles()}
