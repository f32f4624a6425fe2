import asyncio
from dataclasses import replace

import pytest

from prism_api.control import ClassCounters, EffectivePoint, Held, Refusal
from prism_operator.control import loops
from prism_operator.control.channel import Answer, Refused
from prism_operator.control.informer import DeploymentRecord, PodRecord
from prism_operator.control.loops import Ports, ServiceLoop
from prism_operator.control.recorder import Recorder
from prism_operator.control.world import ServiceWorld
from prism_operator.plan import policy
from prism_operator.plan.types import Reason, ReplicaPlan, ReplicaState, Status
from tests.unit.control.pod_server import report
from tests.unit.control.services import model_spec, service_spec

KEY = ("team-a", "chat")


class Clock:
    def __init__(self):
        self.now_s = 1000.0

    def __call__(self):
        return self.now_s


class Leadership:
    def __init__(self):
        self.epoch, self.identity, self.leads, self.raised = 7, "operator-0", True, []

    def may_act(self):
        return self.leads

    def raise_above(self, held):
        self.raised.append(held)


class Tenants:
    def __init__(self):
        self.is_synced = self.is_fresh = True

    def synced(self, namespace):
        return self.is_synced

    def fresh(self, namespace):
        return self.is_fresh


class Events:
    def __init__(self):
        self.reasons = []

    def post(self, regarding, reason, action, note):
        self.reasons.append(reason)


class PlayedPods:
    """Plays the channel and the pods behind it: obeys directives, answers polls, or refuses."""

    def __init__(self, world, clock):
        self.world, self.clock = world, clock
        self.held, self.point, self.sent, self.refuse, self.silent = Held(), "full", [], None, False

    def report(self):
        return report(
            held=self.held,
            effective=[EffectivePoint(class_name="gold", point=self.point, plan_version=1)],
            classes=[ClassCounters(name="gold")],
        )

    async def poll(self, peers, deadline_s):
        for peer in peers:
            if not self.silent:
                self.world.see_outcome(Answer(peer, self.report(), self.clock()))

    async def send(self, directives, deadline_s):
        for peer, directive in directives.items():
            self.sent.append(directive)
            if self.refuse is not None:
                self.world.see_outcome(Refused(peer, directive, 422, Refusal(error="no", held=self.held), self.clock()))
                continue
            self.held = Held(epoch=directive.epoch, sequence=directive.sequence, state="Managed")
            self.point = directive.classes[0].point
            self.world.see_outcome(Answer(peer, self.report(), self.clock(), directive))


class House:
    def __init__(self):
        self.clock = Clock()
        self.world = ServiceWorld(KEY, "uid-1", self.clock, lambda: 5000.0 + self.clock.now_s)
        self.world.spec, self.world.model = service_spec(), model_spec()
        self.world.policy = policy.resolve(self.world.spec, self.world.model)
        self.world.see_pod(None, self.pod())
        self.world.see_deployment(
            DeploymentRecord("team-a", "chat", "uid-d", "chat", "uid-1", "hash", 1, 1, False, None)
        )
        self.world.desired_replicas = 1
        self.pods, self.leadership, self.tenants = PlayedPods(self.world, self.clock), Leadership(), Tenants()
        self.events, self.orders, self.offers = Events(), [], []
        ports = Ports(
            channel=self.pods,
            leadership=self.leadership,
            events=self.events,
            recorder=Recorder(self.events),
            tenants=self.tenants,
            order_reconcile=self.orders.append,
            offer_status=self.offers.append,
        )
        self.loop = ServiceLoop(self.world, ports, self.clock)

    @staticmethod
    def pod():
        return PodRecord(
            "team-a", "pod-1", "pod-1", "chat", "10.0.0.1", "n1", "Running", True, False, False, 5500.0, 5510.0
        )

    async def ticks(self, count=1):
        before = len(self.pods.sent)
        for _ in range(count):
            await self.loop.fast_tick()
            self.clock.now_s += 1.0
        return self.pods.sent[before:]


def run(scenario):
    asyncio.run(asyncio.wait_for(scenario(House()), timeout=20))


def test_the_first_directive_repeats_what_the_pod_holds_under_a_new_epoch():
    async def scenario(house):
        house.pods.point, house.pods.held = "b750", Held(epoch=6, sequence=412, state="Managed")
        (first,) = await house.ticks()
        assert (first.epoch, first.sequence, first.classes[0].point) == (7, 1, "b750")

    run(scenario)


def test_an_unchanged_directive_is_sent_again_only_after_a_third_of_its_time():
    async def scenario(house):
        sent = await house.ticks(31)
        assert len({d.fence.sequence for d in sent}) == 1
        assert len(sent) == 4  # at 0, 10, 20 and 30 s of a 30-s envelope

    run(scenario)


def test_a_process_that_may_not_act_neither_polls_nor_sends():
    async def scenario(house):
        house.leadership.leads = False
        assert await house.ticks(3) == []
        assert house.offers == []

    run(scenario)


def test_nothing_is_decided_before_the_pods_are_listed_and_heard():
    async def scenario(house):
        house.tenants.is_synced = False
        assert await house.ticks(2) == []
        house.tenants.is_synced, house.pods.silent = True, True
        assert await house.ticks(2) == []
        house.pods.silent = False
        assert len(await house.ticks()) == 1

    run(scenario)


def test_a_pod_with_a_higher_epoch_makes_the_operator_raise_its_own_and_send_nothing_meanwhile():
    async def scenario(house):
        house.pods.held = Held(epoch=9, sequence=3, state="Managed")
        assert await house.ticks(2) == []
        assert house.leadership.raised == [9, 9]
        house.leadership.epoch = 10
        (directive,) = await house.ticks()
        assert (directive.epoch, directive.sequence) == (10, 1)

    run(scenario)


def test_a_pod_that_lost_its_memory_is_told_again_at_the_next_tick():
    async def scenario(house):
        await house.ticks(2)
        house.pods.held = Held()
        assert len(await house.ticks()) == 1

    run(scenario)


def test_a_pod_that_refuses_is_not_asked_every_second_and_it_is_reported():
    async def scenario(house):
        house.pods.refuse = True
        assert len(await house.ticks(9)) == 1
        assert "DirectiveRejected" in house.events.reasons
        assert house.world.refusing_pods() == 1

    run(scenario)


def test_a_plan_below_a_quality_floor_is_withheld_although_the_planner_wants_it(monkeypatch):
    async def scenario(house):
        await house.ticks()
        honest = loops.budget.decide

        def careless(*arguments):
            plan, state = honest(*arguments)
            low = tuple(replace(target, point="b500", floor="b500") for target in plan.classes)
            return replace(plan, classes=low), state

        monkeypatch.setattr(loops.budget, "decide", careless)
        assert await house.ticks(3) == []
        assert "DirectiveWithheld" in house.events.reasons
        assert house.pods.point == "full"

    run(scenario)


def replica_plan(replicas):
    def decide(*_):
        return ReplicaPlan(Status.PROGRESS, Reason.DEMAND, "because", replicas, replicas), ReplicaState()

    return decide


def test_an_order_goes_to_reconcile_and_into_the_record(monkeypatch):
    async def scenario(house):
        monkeypatch.setattr(loops.replicas, "decide", replica_plan(3))
        await house.ticks()
        house.loop.slow_tick()
        assert house.orders == [KEY]
        assert house.world.desired_replicas == 3
        assert house.world.decisions[0].to == "3"
        assert "ScaledUp" in house.events.reasons

    run(scenario)


@pytest.mark.parametrize("replicas", [0, 4])
def test_an_order_outside_the_bounds_is_withheld(monkeypatch, replicas):
    async def scenario(house):
        monkeypatch.setattr(loops.replicas, "decide", replica_plan(replicas))
        await house.ticks()
        house.loop.slow_tick()
        assert house.orders == []
        assert house.world.desired_replicas == 1

    run(scenario)


def test_replicas_are_not_decided_on_an_old_picture_of_the_cluster(monkeypatch):
    async def scenario(house):
        monkeypatch.setattr(loops.replicas, "decide", replica_plan(3))
        await house.ticks()
        house.tenants.is_fresh = False
        house.loop.slow_tick()
        assert house.orders == []

    run(scenario)


def test_a_tick_that_fails_does_not_end_the_loop(monkeypatch):
    async def scenario(house):
        calls, second = [], asyncio.Event()

        async def failing():
            calls.append(1)
            if len(calls) == 2:
                second.set()
            raise RuntimeError("a bug")

        monkeypatch.setattr(house.loop, "fast_tick", failing)
        house.loop._clock = asyncio.get_running_loop().time
        house.world.policy = replace(house.world.policy, loop=replace(house.world.policy.loop, fast_period_s=0.01))
        task = asyncio.create_task(house.loop.run())
        await second.wait()
        task.cancel()

    run(scenario)
