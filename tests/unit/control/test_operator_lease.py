import asyncio

import pytest

from prism_operator.control.fence import EPOCH_ANNOTATION, FENCE_NAME, raise_epoch
from prism_operator.control.kube import Conflict, KubeError
from prism_operator.control.lease import Elector, LeaseLost, LeaseTimes, Move, next_move, observe
from prism_operator.control.resources import LEASES
from tests.unit.control.fake_kube import FakeKube

QUICK = LeaseTimes(duration_s=15, renew_deadline_s=10.0, retry_s=0.001)


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, timeout=10))


class Clock:
    def __init__(self):
        self.now_s = 1000.0

    def __call__(self):
        return self.now_s


def lease(holder, version, duration_s=15):
    return {
        "metadata": {"resourceVersion": version},
        "spec": {"holderIdentity": holder, "leaseDurationSeconds": duration_s},
    }


def elector(kube, clock, identity="me"):
    return Elector(kube, "prism-system", identity, times=QUICK, clock=clock)


def test_a_foreign_lease_is_taken_only_after_it_was_seen_unchanged_for_its_duration():
    first = observe(lease("other", "7"), None, now_s=100.0)
    assert next_move(first, "me", now_s=115.0) is Move.WAIT
    again = observe(lease("other", "7"), first, now_s=115.5)
    assert again.since_s == 100.0
    assert next_move(again, "me", now_s=115.5) is Move.ACQUIRE


def test_a_renewed_foreign_lease_starts_a_new_wait():
    first = observe(lease("other", "7"), None, now_s=100.0)
    renewed = observe(lease("other", "8"), first, now_s=114.0)
    assert next_move(renewed, "me", now_s=116.0) is Move.WAIT


def test_a_released_lease_is_free_at_once():
    assert next_move(observe(lease("", "9"), None, 100.0), "me", 100.0) is Move.ACQUIRE


def test_the_leader_stops_acting_at_the_renew_deadline_before_others_may_take_the_lease():
    async def scenario():
        clock, kube = Clock(), FakeKube()
        leader = elector(kube, clock)
        await leader.acquire()
        clock.now_s += 9.9
        assert leader.may_act()
        clock.now_s += 0.2
        assert not leader.may_act()
        observed = observe(kube.objects["leases", "prism-system", "prism-operator"], None, 1000.0)
        assert next_move(observed, "other", clock.now_s) is Move.WAIT

    run(scenario())


def test_the_lease_is_lost_when_the_api_server_stays_away_until_the_deadline():
    async def scenario():
        clock, kube = Clock(), FakeKube()
        leader = elector(kube, clock)
        await leader.acquire()
        kube.failing = KubeError("get", "lease", 0, "", "connection refused", frozenset())
        clock.now_s += 10.1
        with pytest.raises(LeaseLost):
            await leader.hold()
        assert not leader.may_act()

    run(scenario())


def test_a_leader_that_sees_another_holder_stops_at_once():
    async def scenario():
        clock, kube = Clock(), FakeKube()
        leader = elector(kube, clock)
        await leader.acquire()
        stored = await kube.get(LEASES, "prism-system", "prism-operator")
        stored["spec"]["holderIdentity"] = "other"
        await kube.replace_if(stored)
        with pytest.raises(LeaseLost, match="other"):
            await leader.hold()

    run(scenario())


def test_a_released_lease_lets_a_standby_in_without_waiting_for_its_expiry():
    async def scenario():
        clock, kube = Clock(), FakeKube()
        leader, standby = elector(kube, clock), elector(kube, clock, "standby")
        await leader.acquire()
        await leader.release()
        assert not leader.may_act()
        await standby.acquire()
        assert standby.may_act()
        stored = await kube.get(LEASES, "prism-system", "prism-operator")
        assert stored["spec"]["holderIdentity"] == "standby"
        assert stored["spec"]["leaseTransitions"] == 1

    run(scenario())


def test_times_that_would_allow_two_leaders_are_refused():
    with pytest.raises(ValueError, match="renew deadline"):
        LeaseTimes(duration_s=10, renew_deadline_s=15.0)


def test_the_epoch_rises_by_every_acquisition_and_above_what_a_pod_holds():
    async def scenario():
        kube = FakeKube()
        assert await raise_epoch(kube, "prism-system") == 1
        assert await raise_epoch(kube, "prism-system") == 2
        assert await raise_epoch(kube, "prism-system", above=40) == 41
        assert await raise_epoch(kube, "prism-system", above=7) == 42

    run(scenario())


def test_two_processes_that_raise_the_epoch_at_once_get_different_values():
    async def scenario():
        kube = FakeKube()
        await raise_epoch(kube, "prism-system")
        honest_get, raced = kube.get, []

        async def racing_get(*args, **kwargs):
            answer = await honest_get(*args, **kwargs)
            if not raced:
                raced.append(True)
                rival = await honest_get(*args, **kwargs)
                rival["metadata"]["annotations"][EPOCH_ANNOTATION] = "2"
                await kube.replace_if(rival)
            return answer

        kube.get = racing_get
        assert await raise_epoch(kube, "prism-system") == 3

    run(scenario())


def test_an_epoch_that_never_wins_the_swap_is_an_error_and_not_an_endless_loop():
    async def scenario():
        kube = FakeKube()
        await raise_epoch(kube, "prism-system")

        async def lose(obj, **_):
            raise Conflict("update", "x", 409, "Conflict", "", frozenset())

        kube.replace_if = lose
        with pytest.raises(Conflict):
            await raise_epoch(kube, "prism-system")

    run(scenario())


def test_a_garbled_epoch_is_refused_with_what_would_help():
    async def scenario():
        kube = FakeKube()
        metadata = {"name": FENCE_NAME, "namespace": "prism-system", "annotations": {EPOCH_ANNOTATION: "-3"}}
        kube.put(LEASES, {"metadata": metadata, "spec": {}})
        with pytest.raises(ValueError, match=r"found '-3'.*Delete the Lease"):
            await raise_epoch(kube, "prism-system")

    run(scenario())
