import asyncio
import copy

import pytest

from prism_operator.control.certificates import Certificates
from prism_operator.control.informer import deployment_record
from prism_operator.control.kube import Forbidden
from prism_operator.control.queue import Backoff
from prism_operator.control.reconcile import Reconciler
from prism_operator.control.resources import DEPLOYMENTS, NETWORK_POLICIES, PRISM_MODELS, PRISM_SERVICES, SERVICES
from prism_operator.control.status_view import StatusView
from prism_operator.control.status_writer import StatusWriter
from prism_operator.control.world import World
from prism_operator.plan.children import ChildSettings
from prism_operator.plan.types import LoopSettings
from tests.unit.control.fake_kube import FakeKube
from tests.unit.control.services import model_spec, service_wire

KEY = ("team-a", "chat")


class Leading:
    def __init__(self):
        self.leads = True

    def may_act(self):
        return self.leads


class OpenTenants:
    def __init__(self):
        self.refused = None
        self.stopped = []

    def ensure(self, namespace): ...

    def stop(self, namespace):
        self.stopped.append(namespace)

    async def until_synced(self, namespace, timeout_s):
        return self.refused is None

    def refusal(self, namespace):
        return self.refused


class RecordedLoops:
    def __init__(self):
        self.running = set()

    def ensure(self, service):
        self.running.add(service.key)

    def stop(self, key):
        self.running.discard(key)


class RecordedEvents:
    def __init__(self):
        self.posted = []

    def post(self, regarding, reason, action, note):
        self.posted.append((reason, note))


class House:
    """A reconciler with everything around it; `visit` is one act."""

    def __init__(self):
        self.kube, self.world, self.loops = FakeKube(), World(), RecordedLoops()
        self.leading, self.tenants, self.events = Leading(), OpenTenants(), RecordedEvents()
        self.writer = StatusWriter(self.kube, interval_s=0.0)
        certificates = Certificates(self.kube, "prism-system")
        self.reconciler = Reconciler(
            self.kube,
            self.world,
            self.tenants,
            self.loops,
            self.leading,
            certificates,
            self.events,
            StatusView(self.writer),
            LoopSettings(),
            ChildSettings(operator_namespace="prism-system"),
        )
        self.certificates = certificates
        metadata = {"namespace": "team-a", "name": "small-moe", "generation": 1}
        self.kube.put(PRISM_MODELS, {"metadata": metadata, "spec": model_spec().to_wire()})
        self.uid = self.spec()["metadata"]["uid"]

    def spec(self, **changes):
        """Create or change the PrismService."""
        metadata = {"namespace": "team-a", "name": "chat", "generation": 1, "uid": "uid-chat"}
        obj = {"apiVersion": "moeprism.io/v1alpha1", "kind": "PrismService", "metadata": metadata}
        return self.kube.put(PRISM_SERVICES, {**obj, "spec": service_wire(**changes)})

    async def visit(self):
        """Writes of one visit, informers told of the Deployment afterwards."""
        before = len(self.kube.writes)
        await self.certificates.load_authority()
        await self.reconciler.service(*KEY)
        if deployment := self.kube.objects.get((DEPLOYMENTS.plural, *KEY)):
            self.world.see_deployment(None, deployment_record(deployment))
        return [write for write in self.kube.writes[before:] if write[2] != "prism-ca"]

    async def status(self):
        while self.writer._tasks:
            await asyncio.gather(*self.writer._tasks.values())
        return self.kube.statuses[-1][1]

    async def condition(self, kind):
        return next(c for c in (await self.status())["conditions"] if c["type"] == kind)


def run(scenario):
    asyncio.run(asyncio.wait_for(scenario(House()), timeout=20))


def test_the_first_visit_creates_every_child_and_the_second_writes_nothing():
    async def scenario(house):
        assert await house.visit() == [
            ("apply", "Secret", "chat-control-tls"),
            ("apply", "Service", "chat"),
            ("apply", "Deployment", "chat"),
            ("apply", "PodDisruptionBudget", "chat"),
            ("apply", "NetworkPolicy", "chat"),
        ]
        assert house.kube.objects[DEPLOYMENTS.plural, "team-a", "chat"]["spec"]["replicas"] == 1
        assert await house.visit() == []
        assert house.loops.running == {KEY}

    run(scenario)


def test_every_condition_is_there_after_the_first_visit():
    async def scenario(house):
        await house.visit()
        status = await house.status()
        assert {"Ready", "Accepted", "ModelResolved", "CapacityAvailable"} <= {c["type"] for c in status["conditions"]}
        assert (await house.condition("Accepted"))["status"] == "True"

    run(scenario)


def test_a_foreign_edit_of_a_child_is_repaired():
    async def scenario(house):
        await house.visit()
        place = (DEPLOYMENTS.plural, "team-a", "chat")
        house.kube.objects[place]["spec"]["replicas"] = 3
        house.kube.objects[place]["metadata"]["managedFields"] = [
            {"manager": "kubectl", "time": "2026-03-01T00:00:00Z", "fieldsV1": {"f:spec": {"f:replicas": {}}}}
        ]
        house.world.see_deployment(None, deployment_record(house.kube.objects[place]))
        assert await house.visit() == [("apply", "Deployment", "chat")]
        assert house.kube.objects[place]["spec"]["replicas"] == 1
        assert [reason for reason, _ in house.events.posted if reason == "ReplicasReverted"]

    run(scenario)


@pytest.mark.parametrize("resource", [DEPLOYMENTS, SERVICES, NETWORK_POLICIES])
def test_an_object_of_that_name_that_is_not_ours_is_left_alone_and_reported(resource):
    async def scenario(house):
        theirs = {
            "apiVersion": resource.api_version,
            "kind": resource.kind,
            "metadata": {"namespace": "team-a", "name": "chat"},
            "spec": {"replicas": 7},
        }
        before = house.kube.put(resource, theirs)
        with pytest.raises(Backoff):
            await house.visit()
        assert house.kube.objects[resource.plural, "team-a", "chat"] == before
        condition = await house.condition("ScalingActive")
        assert (condition["status"], condition["reason"]) == ("False", "ConflictingOwner")
        assert resource.kind in condition["message"]

    run(scenario)


def test_a_child_that_is_switched_off_is_deleted_and_a_foreign_one_is_not():
    async def scenario(house):
        await house.visit()
        house.spec(networking={"networkPolicy": "Disabled"})
        assert await house.visit() == [("delete", "NetworkPolicy", "chat")]
        metadata = {"namespace": "team-a", "name": "chat"}
        house.kube.put(NETWORK_POLICIES, {"kind": "NetworkPolicy", "metadata": metadata})
        assert await house.visit() == []

    run(scenario)


def test_a_missing_right_turns_a_condition_that_names_it():
    async def scenario(house):
        house.tenants.refused = Forbidden(
            "list", "/api/v1/namespaces/team-a/pods", 403, "Forbidden", "pods is forbidden", frozenset()
        )
        with pytest.raises(Backoff):
            await house.visit()
        condition = await house.condition("Accepted")
        assert (condition["status"], condition["reason"]) == ("False", "NamespaceNotEnabled")
        assert "may not list /api/v1/namespaces/team-a/pods" in condition["message"]
        assert "tenantNamespaces" in condition["message"]

    run(scenario)


def test_a_terminating_namespace_is_forgotten_without_a_complaint():
    async def scenario(house):
        house.tenants.refused = Forbidden(
            "create", "/x", 403, "Forbidden", "being terminated", frozenset({"NamespaceTerminating"})
        )
        assert await house.visit() == []
        assert house.world.services == {}
        assert house.events.posted == []

    run(scenario)


def test_a_deleted_service_is_forgotten_and_its_children_are_left_to_garbage_collection():
    async def scenario(house):
        await house.visit()
        del house.kube.objects[PRISM_SERVICES.plural, "team-a", "chat"]
        assert await house.visit() == []
        assert house.loops.running == set()
        assert house.world.services == {}
        assert house.tenants.stopped == ["team-a"]

    run(scenario)


def test_a_service_without_its_model_waits_and_says_so():
    async def scenario(house):
        del house.kube.objects[PRISM_MODELS.plural, "team-a", "small-moe"]
        assert await house.visit() == []
        assert (await house.condition("ModelResolved"))["reason"] == "NotFound"

    run(scenario)


def test_a_running_service_keeps_the_last_accepted_spec_when_the_new_one_cannot_be_planned():
    async def scenario(house):
        await house.visit()
        accepted = house.world.services[KEY].spec
        house.spec(budget={"min": "b999"})
        assert await house.visit() == []
        assert house.world.services[KEY].spec is accepted
        assert house.loops.running == {KEY}
        assert (await house.condition("Accepted"))["reason"] == "UnknownOperatingPoint"
        house.spec()
        await house.visit()
        assert (await house.condition("Accepted"))["status"] == "True"

    run(scenario)


def test_after_a_start_the_existing_deployment_is_the_truth_about_replicas():
    async def scenario(house):
        await house.visit()
        deployment = copy.deepcopy(house.kube.objects[DEPLOYMENTS.plural, "team-a", "chat"])
        deployment["spec"]["replicas"] = 3
        house.world.forget(KEY)
        house.world.see_deployment(None, deployment_record(deployment))
        await house.reconciler.service(*KEY)
        assert house.world.services[KEY].desired_replicas == 3

    run(scenario)


def test_an_external_owner_of_replicas_is_followed():
    async def scenario(house):
        house.spec(replicas=2, scaling={"control": "External", "maxReplicas": 8})
        await house.visit()
        house.spec(replicas=5, scaling={"control": "External", "maxReplicas": 8})
        assert await house.visit() == [("apply", "Deployment", "chat")]
        assert house.kube.objects[DEPLOYMENTS.plural, "team-a", "chat"]["spec"]["replicas"] == 5

    run(scenario)


def test_a_visit_that_outlives_the_lease_writes_no_child():
    async def scenario(house):
        await house.visit()
        house.spec(networking={"networkPolicy": "Disabled"})
        house.leading.leads = False
        with pytest.raises(Backoff, match="not leading"):
            await house.visit()
        assert (NETWORK_POLICIES.plural, "team-a", "chat") in house.kube.objects

    run(scenario)
