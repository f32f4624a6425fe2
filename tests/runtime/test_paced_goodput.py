"""The replay to paced pods: what counts as kept, what the classes are allowed, and that a pod serves what is sent."""

import asyncio
from typing import Any

import pytest

from evidence import runtime_paced as paced
from evidence.runtime_goodput import BULK, GOLD
from examples.demo import prompts
from examples.demo.records import Answer
from examples.demo.trace import Arrival

POD = paced.paced_pod()


def answer(**changes: Any) -> Answer:
    fields = {"index": 0, "at_s": 0.0, "sent_s": 0.0, "outcome": "finished", "status": 200, "end_s": 1.0}
    return Answer(**{**fields, "ttft_s": POD.ttft_s, "tpot_s": POD.tpot_s, **changes})


@pytest.mark.parametrize(
    ("changes", "met"),
    [
        ({}, True),
        ({"tpot_s": None}, True),
        ({"ttft_s": POD.ttft_s + 0.001}, False),
        ({"tpot_s": POD.tpot_s + 0.001}, False),
        ({"outcome": "shed", "ttft_s": None, "tpot_s": None}, False),
        ({"outcome": "failed"}, False),
    ],
)
def test_a_request_is_kept_when_it_got_its_whole_answer_within_both_objectives(
    changes: dict[str, Any], met: bool
) -> None:
    assert paced.is_met(answer(**changes), POD) is met


def test_gold_may_never_sink_and_bulk_to_its_floor_alone() -> None:
    ordered = {one.name: (one.floor, one.point, one.ceiling) for one in paced.directive(POD).classes}
    assert ordered == {"gold": ("full", "full", "full"), "bulk": (POD.bulk_floor, "full", "full")}


def test_every_policy_is_sent_the_same_requests_and_seeds_differ() -> None:
    loads = [paced.load_of(POD, "azure2023_code", seed, 60.0) for seed in (0, 0, 1)]
    assert loads[0] == loads[1] != loads[2]
    assert {GOLD, BULK} == set(loads[0].classes)


def test_a_paced_pod_answers_each_request_under_its_class() -> None:
    load = paced.Load([Arrival(0.1 * n, 20, 4) for n in range(6)], [GOLD, BULK] * 3)

    async def scenario() -> paced.Run:
        async with paced.pods(["slack"]) as ports:
            return (await paced.play(load, ports, prompts.held_out_tokens(), first=0))["slack"]

    run = asyncio.run(scenario())
    assert run.arrived == {GOLD: 3, BULK: 3}
    assert run.met.total() > 0
    assert run.seconds == 0.5
