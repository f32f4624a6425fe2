"""Rehearsed scale-downs on pods: labels follow the plan, whoever planned it and whoever else touches them."""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from prism_operator.control import loops
from prism_operator.control.informer import pod_record
from prism_operator.control.resources import PODS, Object
from prism_operator.control.traffic import DELETION_COST_ANNOTATION
from prism_operator.plan.pod_template import SERVING_LABEL
from prism_operator.plan.types import Reason, ReplicaPlan, ReplicaState, Status
from tests.unit.control import test_operator_loops as ticking
from tests.unit.control import test_operator_reconcile as visiting
from tests.unit.control.test_operator_world import record

PLAN = ReplicaPlan(Status.HOLD, Reason.REHEARSAL, "'a' leaves traffic for 60 s", 2, 2)


class House(visiting.House):
    """A reconciled service with two pods, `a` and `b`."""

    def plan(self, *away: str) -> None:
        self.service.replica_plan = replace(PLAN, out_of_traffic=away)

    @property
    def service(self) -> Any:
        return self.world.services[visiting.KEY]

    def pod(self, name: str, uid: str = "", labels: dict[str, str] | None = None, **metadata: Any) -> None:
        """A pod appears, or somebody changes it; the informer tells."""
        own = {"moeprism.io/service": "chat"} | ({SERVING_LABEL: "true"} if labels is None else labels)
        metadata = {"creationTimestamp": "2026-01-01T00:00:00Z", **metadata}
        named = {"namespace": "team-a", "name": name, "uid": uid or name, "labels": own, **metadata}
        self.kube.put(PODS, {"apiVersion": "v1", "kind": "Pod", "metadata": named})
        self.tell(name)

    def tell(self, name: str) -> None:
        known = {record.name: record for record in (pod.record for pod in self.service.pods.values())}
        self.world.see_pod(known.get(name), pod_record(self.live(name)))

    def live(self, name: str) -> Object:
        found: Object = self.kube.objects[PODS.plural, "team-a", name]
        return found

    def serving(self, name: str) -> bool:
        return self.live(name)["metadata"]["labels"].get(SERVING_LABEL) == "true"

    def cost(self, name: str) -> str | None:
        return self.live(name)["metadata"].get("annotations", {}).get(DELETION_COST_ANNOTATION)

    async def visit(self) -> list[tuple[str, str, str]]:
        written = [write for write in await super().visit() if write[1] == "Pod"]
        for name in {pod.record.name for pod in self.service.pods.values()}:
            self.tell(name)
        return written


def run(scenario: Callable[[House], Awaitable[None]]) -> None:
    async def furnished(_: object) -> None:
        house = House()
        await house.visit()
        house.pod("a")
        house.pod("b")
        await scenario(house)

    visiting.run(furnished)


def test_the_pod_on_trial_leaves_traffic_and_is_the_first_to_be_removed_and_one_write_does_it() -> None:
    async def scenario(house: House) -> None:
        house.plan("a")
        assert await house.visit() == [("patch", "Pod", "a")]
        assert (house.serving("a"), house.serving("b")) == (False, True)
        assert int(house.cost("a") or 0) < 0
        assert house.cost("b") is None
        assert await house.visit() == []

    run(scenario)


def test_a_failed_rehearsal_leaves_no_trace_on_the_pod() -> None:
    async def scenario(house: House) -> None:
        before = house.live("a")["metadata"]["labels"]
        house.plan("a")
        await house.visit()
        house.plan()
        assert await house.visit() == [("patch", "Pod", "a")]
        assert house.live("a")["metadata"]["labels"] == before
        assert house.live("a")["metadata"]["annotations"] == {}

    run(scenario)


def test_a_new_process_touches_nothing_before_it_has_planned_and_then_mends_what_it_finds() -> None:
    async def scenario(house: House) -> None:
        house.plan("a")
        await house.visit()
        house.service.replica_plan = None
        assert await house.visit() == []
        house.plan()
        await house.visit()
        assert house.serving("a")

    run(scenario)


def test_a_pod_that_somebody_took_out_of_traffic_by_hand_stays_out_and_counts_as_out() -> None:
    async def scenario(house: House) -> None:
        house.plan()
        house.pod("a", labels={})
        assert await house.visit() == []
        assert not house.serving("a")
        assert [view.serving for view in house.service.observe(0.0).pods] == [False, True]

    run(scenario)


def test_a_pod_that_ends_is_left_alone() -> None:
    async def scenario(house: House) -> None:
        house.plan("a")
        await house.visit()
        metadata = house.live("a")["metadata"]
        house.pod("a", annotations=metadata["annotations"], labels={}, deletionTimestamp="2026-01-01T00:01:00Z")
        house.plan()
        assert await house.visit() == []

    run(scenario)


def test_another_pod_under_the_name_of_the_one_on_trial_stays_in_traffic() -> None:
    async def scenario(house: House) -> None:
        house.plan("a")
        labels = {"moeprism.io/service": "chat", SERVING_LABEL: "true"}
        metadata = {"namespace": "team-a", "name": "a", "uid": "another", "labels": labels}
        house.kube.put(PODS, {"metadata": {**metadata, "creationTimestamp": "2026-01-01T00:00:00Z"}})
        await house.visit()
        assert house.serving("a")

    run(scenario)


@pytest.mark.parametrize(
    ("plan", "rehearsed", "ordered", "event"),
    [
        (replace(PLAN, out_of_traffic=("pod-1",)), False, True, "RehearsalStarted"),
        (replace(PLAN, out_of_traffic=("pod-1",)), True, False, "RehearsalStarted"),
        (replace(PLAN, reason=Reason.REHEARSAL_FAILED), True, True, "RehearsalFailed"),
        (replace(PLAN, reason=Reason.STEADY), False, False, None),
    ],
)
def test_a_tick_orders_what_differs_from_its_plan_and_says_so(
    monkeypatch: pytest.MonkeyPatch, plan: ReplicaPlan, rehearsed: bool, ordered: bool, event: str | None
) -> None:
    async def scenario(house: ticking.House) -> None:
        monkeypatch.setattr(loops.replicas, "decide", lambda *_: (replace(plan, replicas=1), ReplicaState()))
        house.world.see_pod(None, record("pod-1", rehearsed=rehearsed, serving=not rehearsed))
        await house.ticks()
        house.loop.slow_tick()
        assert house.orders == [visiting.KEY] * ordered
        assert (event is None) == (not {"RehearsalStarted", "RehearsalFailed"} & set(house.events.reasons))
        assert event is None or event in house.events.reasons

    ticking.run(scenario)
