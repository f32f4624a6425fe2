import asyncio

from prism_operator.control.informer import (
    Informer,
    deployment_record,
    foreign_owner_of_replicas,
    pod_record,
)
from prism_operator.control.kube import Gone, KubeError
from prism_operator.control.resources import PODS
from prism_operator.control.tenants import Tenants


def pod(name, version="1", ready=False, ip=None):
    conditions = [
        {
            "type": "Ready",
            "status": "True" if ready else "False",
            "lastTransitionTime": "2026-03-01T12:00:20Z",
        }
    ]
    return {
        "metadata": {
            "namespace": "team-a",
            "name": name,
            "uid": f"uid-{name}",
            "resourceVersion": version,
            "labels": {"moeprism.io/service": "chat"},
            "creationTimestamp": "2026-03-01T12:00:00Z",
        },
        "spec": {"nodeName": "n1"},
        "status": {"phase": "Running", "podIP": ip, "conditions": conditions},
    }


class ScriptedKube:
    """Serves lists and watches from a script; the last watch hangs, as a quiet cluster does."""

    def __init__(self, lists, watches):
        self.lists, self.watches, self.watched_from = lists, watches, []
        self.exhausted = asyncio.Event()

    async def list_pages(self, *_):
        version, pages = self.lists.pop(0)
        for page in pages:
            yield page, version

    async def watch(self, _resource, _namespace, version, _selector):
        self.watched_from.append(version)
        if not self.watches:
            self.exhausted.set()
            await asyncio.Event().wait()
        for step in self.watches.pop(0):
            if isinstance(step, Exception):
                raise step
            yield step


def changes_of(kube):
    async def scenario():
        changes = []
        informer = Informer(kube, PODS, None, pod_record, lambda old, new: changes.append((old, new)))
        task = asyncio.create_task(informer.run())
        await asyncio.wait_for(kube.exhausted.wait(), timeout=10)
        task.cancel()
        assert informer.synced.is_set()
        return [(old.name if old else None, new.name if new else None) for old, new in changes]

    return asyncio.run(scenario())


def in_loop(build):
    async def make():
        return build()

    return asyncio.run(make())


def test_a_relist_replaces_the_copy_and_finds_deletions_missed_while_away():
    gone = Gone("watch", "pods", 410, "Expired", "", frozenset())
    kube = in_loop(
        lambda: ScriptedKube([("5", [[pod("a")], [pod("b")]]), ("9", [[pod("b"), pod("c")]])], [[gone]]),
    )
    assert changes_of(kube) == [(None, "a"), (None, "b"), ("a", None), (None, "c")]
    assert kube.watched_from == ["5", "9"]


def test_a_broken_watch_goes_on_from_the_last_bookmark_without_a_new_list():
    bookmark = ("BOOKMARK", {"metadata": {"resourceVersion": "70"}})
    broken = KubeError("watch", "pods", 0, "", "reset", frozenset())
    kube = in_loop(lambda: ScriptedKube([("5", [[pod("a")]])], [[bookmark, broken]]))
    assert changes_of(kube) == [(None, "a")]
    assert kube.watched_from == ["5", "70"]


def test_an_event_that_changes_nothing_we_keep_is_not_reported():
    events = [("MODIFIED", pod("a", "6")), ("MODIFIED", pod("a", "7", ready=True)), ("DELETED", pod("a", "8"))]
    kube = in_loop(lambda: ScriptedKube([("5", [[pod("a")]])], [events]))
    assert changes_of(kube) == [(None, "a"), ("a", "a"), ("a", None)]


def test_a_pod_record_keeps_times_readiness_and_place():
    record = pod_record(pod("a", ready=True, ip="10.0.0.7"))
    assert (record.service, record.ip, record.node, record.ready) == ("chat", "10.0.0.7", "n1", True)
    assert record.ready_unix_s - record.created_unix_s == 20


def test_a_pod_without_conditions_is_not_ready_and_schedulable_until_said_otherwise():
    bare = pod("a")
    bare["status"] = {}
    record = pod_record(bare)
    assert not record.ready
    assert not record.unschedulable
    bare["status"] = {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}]}
    assert pod_record(bare).unschedulable


def test_another_manager_of_replicas_is_seen_and_ours_and_status_writers_are_not():
    def entry(manager, **more):
        return {"manager": manager, "time": "2026-03-01T12:00:00Z", "fieldsV1": {"f:spec": {"f:replicas": {}}}, **more}

    assert foreign_owner_of_replicas([entry("prism-operator")]) is None
    assert foreign_owner_of_replicas([entry("kube-controller-manager", subresource="status")]) is None
    later = entry("kubectl-scale", time="2026-03-01T13:00:00Z", subresource="scale")
    assert foreign_owner_of_replicas([entry("prism-operator"), entry("hpa"), later]) == "kubectl-scale"


def test_a_deployment_record_keeps_its_controller_and_count():
    metadata = {
        **pod("chat")["metadata"],
        "ownerReferences": [{"uid": "owner", "controller": True}],
        "annotations": {"moeprism.io/intent-hash": "abc"},
    }
    record = deployment_record({"metadata": metadata, "spec": {"replicas": 3}})
    assert (record.owner_uid, record.replicas, record.intent_hash) == ("owner", 3, "abc")


def test_a_namespace_that_is_watched_no_longer_leaves_no_pods_behind():
    """A PrismService that comes back under its old name must not count the pods of the first one."""

    async def scenario():
        seen = []
        kube = ScriptedKube([("5", [[pod("a")]]), ("5", [[]])], [])
        tenants = Tenants(kube, lambda old, new: seen.append((old and old.name, new and new.name)), lambda *_: None)
        tenants.ensure("team-a")
        assert await tenants.until_synced("team-a", timeout_s=10)
        tenants.stop("team-a")
        await tenants.close()
        return seen

    assert asyncio.run(scenario()) == [(None, "a"), ("a", None)]
