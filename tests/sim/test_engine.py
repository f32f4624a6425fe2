"""The simulated engine against closed forms and against itself, step by step."""

import random

import pytest

from prism_api.profile import PointProfile, Profile
from prism_operator.simulate.engine import SimPod
from prism_operator.simulate.engine_model import EngineModel
from prism_operator.simulate.fleet import Fleet
from prism_operator.simulate.order import FAIR, Promise
from prism_operator.simulate.workload import SimRequest, poisson
from prism_operator.simulate.world import World
from tests.unit.plan.factories import profile, service_policy

QUALITY = {"full": 1.0, "b500": 0.9}


def cost_profile(
    base_ms: float = 0, sequence_ms: float = 0, kilotoken_ms: float = 0, prefill_token_ms: float = 0, **limits: int
) -> Profile:
    def point(share: float) -> PointProfile:
        return PointProfile(
            step_base_nanoseconds=round(base_ms * share * 1e6),
            step_per_sequence_nanoseconds=round(sequence_ms * share * 1e6),
            step_per_kilotoken_nanoseconds=round(kilotoken_ms * share * 1e6),
            prefill_base_nanoseconds=0,
            prefill_per_token_nanoseconds=round(prefill_token_ms * share * 1e6),
        )

    fields: dict[str, object] = {"max_sequences": 64, "kv_tokens": 10**6, "prefill_tokens_per_step": 10**6} | limits
    return Profile.model_validate(
        {"accelerator": "made-up", "provenance": "test", "points": {"full": point(1), "b500": point(0.5)}, **fields}
    )


def pod(costs: Profile, promises: dict[str, Promise] | None = None) -> SimPod:
    model = EngineModel.of(costs, ["default"], QUALITY, promises=promises)
    return SimPod("pod-0", 0, 0.0, 0.0, model, {"default": "full"}, random.Random(0))


def drain(one: SimPod) -> float:
    """Advance until nothing is left; the time of the last step's end."""
    at_s = 0.0
    while one.wake_s is not None:
        at_s = one.wake_s
        one.advance(at_s)
    return at_s


def request(prompt: int, output: int, at_s: float = 0.0) -> SimRequest:
    return SimRequest(at_s, "default", prompt, output)


def test_a_lone_request_takes_its_prefill_and_one_step_a_token() -> None:
    one = pod(cost_profile(base_ms=10, sequence_ms=2, kilotoken_ms=1, prefill_token_ms=0.1))
    alone = request(prompt=100, output=4)
    one.submit(alone, 0.0)
    drain(one)
    # 10 + 100 * 0.1, then three steps at contexts of 101, 102 and 103 tokens.
    assert alone.first_s == pytest.approx(0.020)
    assert alone.done_s == pytest.approx(0.020 + 3 * 0.012 + (101 + 102 + 103) * 1e-6)


def test_a_run_of_steps_equals_the_same_steps_one_by_one() -> None:
    """Settling after every millisecond must change nothing."""
    costs = cost_profile(base_ms=7, sequence_ms=1, kilotoken_ms=3, prefill_token_ms=0.05)
    whole, pieces = pod(costs), pod(costs)
    ours, theirs = ([request(50 * n, 20 * n) for n in range(1, 6)] for _ in range(2))
    for mine, yours in zip(ours, theirs, strict=True):
        whole.submit(mine, 0.0)
        pieces.submit(yours, 0.0)
    drain(whole)
    at_s = 0.0
    while pieces.wake_s is not None:
        at_s = min(at_s + 0.001, pieces.wake_s)
        pieces.settle(at_s)
        if at_s == pieces.wake_s:
            pieces.advance(at_s)
    assert [one.done_s for one in theirs] == pytest.approx([one.done_s for one in ours])


def test_a_prompt_joins_at_the_end_of_the_current_step() -> None:
    one = pod(cost_profile(base_ms=10))
    one.submit(request(1, 1000), 0.0)
    one.advance(0.010)
    late = request(1, 2, at_s=0.033)
    assert one.submit(late, 0.033)
    drain(one)
    assert late.first_s == pytest.approx(0.050)


def test_a_new_point_holds_from_the_next_step_on() -> None:
    one = pod(cost_profile(base_ms=10))
    only = request(1, 11)
    one.submit(only, 0.0)
    one.advance(0.010)
    one.set_points({"default": "b500"}, 0.045)
    drain(one)
    # The step from 40 to 50 ms ends at `full`; five tokens came by then, six are made in 5 ms each.
    assert only.done_s == pytest.approx(0.050 + 6 * 0.005)
    assert only.quality == pytest.approx(5 * 1.0 + 6 * 0.9)
    assert one.counters["default"].tokens_by_point == {"full": 5, "b500": 6}


def test_by_deadline_who_is_late_already_makes_way_for_who_can_be_in_time() -> None:
    """A step of 1 s for every prompt, promised within 3 s: by arrival all but the first few would be late."""
    costs = cost_profile(prefill_token_ms=10, prefill_tokens_per_step=100)

    def met(promises: dict[str, Promise] | None) -> list[bool]:
        one = pod(costs, promises)
        requests = [request(100, 1, at_s=i / 1.5) for i in range(4 * FAIR)]
        for each in requests:
            while one.wake_s is not None and one.wake_s <= each.arrived_s:
                one.advance(one.wake_s)
            one.submit(each, each.arrived_s)
        drain(one)
        return [each.ttft_s <= 3 for each in requests]

    in_order, by_deadline = met(None), met({"default": Promise(0, 3.0)})
    assert in_order == sorted(in_order, reverse=True)
    assert sum(by_deadline) > 1.5 * sum(in_order)
    assert sum(by_deadline[-FAIR:]) > FAIR / 2


def test_by_deadline_a_late_request_is_not_forgotten() -> None:
    one = pod(cost_profile(prefill_token_ms=10, prefill_tokens_per_step=100), {"default": Promise(0, 1.5)})
    one.submit(request(100, 1), 0.0)
    late = request(100, 1, at_s=0.0)
    one.submit(late, 0.0)
    for i in range(1, 3 * FAIR):
        one.submit(request(100, 1, at_s=float(i)), float(i))
        one.advance(float(i))
    assert late.done_s is not None


def test_prompts_wait_for_room_in_the_kv_cache() -> None:
    one = pod(cost_profile(base_ms=10, kv_tokens=150))
    first, second = request(100, 10), request(100, 10)
    one.submit(first, 0.0)
    one.submit(second, 0.0)
    drain(one)
    assert first.done_s is not None
    assert second.first_s is not None
    assert second.first_s > first.done_s


def test_the_youngest_is_preempted_when_the_kv_cache_is_full_and_still_ends_whole() -> None:
    one = pod(cost_profile(base_ms=10, kv_tokens=100))
    old, young = request(20, 60), request(20, 60)
    one.submit(old, 0.0)
    one.submit(young, 0.0)
    drain(one)
    assert one.preemptions >= 1
    assert (old.produced, young.produced) == (60, 60)
    assert old.done_s is not None
    assert young.done_s is not None
    assert old.done_s < young.done_s
    assert one.kv_used == 0


def waits(rate: float, draw_exponential: bool, seed: int = 1, count: int = 60_000) -> float:
    """Mean time in queue of a server that takes one request at a time, 1 s each on average."""
    rng = random.Random(seed)
    one = pod(cost_profile(prefill_token_ms=1, max_sequences=1))
    at_s, found = 0.0, []
    for _ in range(count):
        at_s += rng.expovariate(rate)
        tokens = max(1, round(rng.expovariate(1 / 1000))) if draw_exponential else 1000
        while one.wake_s is not None and one.wake_s <= at_s:
            one.advance(one.wake_s)
        arrival = request(tokens, 1, at_s)
        one.submit(arrival, at_s)
        found.append((arrival, tokens / 1000))
    drain(one)
    return sum((one.done_s or 0.0) - one.arrived_s - service_s for one, service_s in found) / count


def test_waiting_agrees_with_m_d_1_within_two_percent_of_the_service_time() -> None:
    load = 0.5
    assert waits(load, draw_exponential=False) == pytest.approx(load / (2 * (1 - load)), abs=0.02)


def test_waiting_agrees_with_m_m_1() -> None:
    load = 0.5
    assert waits(load, draw_exponential=True) == pytest.approx(load / (1 - load), rel=0.05)


def test_littles_law_holds() -> None:
    """Mean number in the system is arrival rate times mean time in it."""
    rate, seconds = 3.0, 1000.0
    policy = service_policy(budget={"control": "Off"}, scaling={"minReplicas": 1, "maxReplicas": 1})
    requests = poisson(7, [(seconds, rate)])
    fleet = Fleet(policy, profile())
    inside = 0.0
    for tick in range(1, int(seconds) * 4 + 1):
        fleet.run(requests if tick == 1 else (), tick / 4)
        inside += fleet.outstanding / 4
    time_in_system = sum((one.done_s or 0.0) - one.arrived_s for one in fleet.finished)
    assert inside == pytest.approx(time_in_system, rel=0.02)


@pytest.mark.parametrize("seed", [0, 1])
def test_requests_and_tokens_are_conserved_in_a_hostile_world(seed: int) -> None:
    world = World(seed=seed, report_loss=0.2, crashes_per_hour=20, never_ready=0.2, slow_pods=0.3, report_lag_s=0.4)
    requests = poisson(seed, [(200.0, 6.0)])
    fleet = Fleet(service_policy(), profile(), pods=2, world=world)
    fleet.run(requests, 400.0)
    lost = fleet.shed + sum(fleet.lost.broken.values())
    assert len(fleet.finished) + lost + fleet.outstanding == len(requests)
    assert all(one.produced == one.output_tokens for one in fleet.finished)
    assert all(0 < one.quality <= one.produced + 1e-6 for one in fleet.finished)


def test_equal_seeds_give_equal_runs_and_others_do_not() -> None:
    def ends(seed: int) -> list[float | None]:
        fleet = Fleet(service_policy(), profile(), world=World(seed=seed, crashes_per_hour=30, report_loss=0.1))
        fleet.run(poisson(3, [(60.0, 4.0)]), 120.0)
        return [one.done_s for one in fleet.finished]

    assert ends(1) == ends(1)
    assert ends(1) != ends(2)
