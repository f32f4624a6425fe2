import asyncio

from prism_operator.control.events import CYCLE_S, Events, Regarding
from prism_operator.control.kube import KubeError
from prism_operator.control.resources import PRISM_SERVICES
from prism_operator.control.status_writer import StatusWriter
from tests.unit.control.fake_kube import FakeKube


class Time:
    """A clock that moves only when somebody sleeps."""

    def __init__(self):
        self.now_s, self.slept = 0.0, []

    def __call__(self):
        return self.now_s

    async def sleep(self, seconds):
        self.slept.append(seconds)
        self.now_s += seconds
        await asyncio.sleep(0)


def run(scenario):
    async def main():
        time, kube = Time(), FakeKube()
        await scenario(kube, StatusWriter(kube, interval_s=5.0, clock=time, sleep=time.sleep), time)

    asyncio.run(asyncio.wait_for(main(), timeout=10))


async def settle(writer):
    while writer._tasks:
        await asyncio.gather(*writer._tasks.values())


def offer(writer, **status):
    writer.offer(PRISM_SERVICES, "team-a", "chat", status)


def test_of_many_offers_within_the_interval_only_the_first_and_the_last_are_written():
    async def scenario(kube, writer, time):
        offer(writer, replicas=1)
        await asyncio.sleep(0)
        for n in range(2, 9):
            offer(writer, replicas=n)
        await settle(writer)
        assert [status for _, status in kube.statuses] == [{"replicas": 1}, {"replicas": 8}]
        assert time.now_s >= 5.0

    run(scenario)


def test_a_status_with_a_new_decision_does_not_wait_for_the_interval():
    async def scenario(kube, writer, time):
        offer(writer, replicas=1)
        await settle(writer)
        offer(writer, replicas=2)
        await asyncio.sleep(0)
        offer(writer, replicas=2, decisions=[{"kind": "Budget"}])
        await settle(writer)
        assert [status for _, status in kube.statuses] == [
            {"replicas": 1},
            {"replicas": 2, "decisions": [{"kind": "Budget"}]},
        ]
        assert time.now_s <= 2.0

    run(scenario)


def test_an_equal_status_is_not_written_again_not_even_after_a_restart():
    async def scenario(kube, writer, time):
        writer.remember(PRISM_SERVICES, "team-a", "chat", {"replicas": 1})
        offer(writer, replicas=1)
        await settle(writer)
        assert kube.statuses == []
        offer(writer, replicas=2)
        await settle(writer)
        offer(writer, replicas=2)
        await settle(writer)
        assert len(kube.statuses) == 1

    run(scenario)


def test_a_field_that_is_gone_is_removed_by_the_merge_patch():
    async def scenario(kube, writer, time):
        offer(writer, replicas=1, cost={"perHour": "1"})
        await settle(writer)
        offer(writer, replicas=1)
        await settle(writer)
        assert kube.statuses[-1][1] == {"replicas": 1, "cost": None}

    run(scenario)


def test_a_failed_write_is_tried_again_with_the_newest_offer():
    async def scenario(kube, writer, time):
        kube.failing = KubeError("patch", "x", 503, "", "", frozenset())
        offer(writer, replicas=1)
        await asyncio.sleep(0)
        kube.failing = None
        offer(writer, replicas=2)
        await settle(writer)
        assert [status for _, status in kube.statuses] == [{"replicas": 2}]

    run(scenario)


def test_one_event_per_reason_and_object_and_cycle():
    async def scenario(kube, _, time):
        events, chat, mail = Events(kube, "operator-0", clock=time), *(Regarding("a", n, n) for n in ("chat", "mail"))
        for _ in range(3):
            events.post(chat, "ScaledUp", "Plan", "1 -> 2")
        events.post(chat, "ScaledDown", "Plan", "2 -> 1")
        events.post(mail, "ScaledUp", "Plan", "1 -> 2")
        time.now_s += CYCLE_S
        events.post(chat, "ScaledUp", "Plan", "2 -> 3")
        await events.close()
        assert [(e["regarding"]["name"], e["reason"]) for e in kube.events] == [
            ("chat", "ScaledUp"),
            ("chat", "ScaledDown"),
            ("mail", "ScaledUp"),
            ("chat", "ScaledUp"),
        ]
        assert {e["type"] for e in kube.events} == {"Normal"}

    run(scenario)
