import asyncio
from itertools import pairwise

from prism_operator.control.queue import Backoff, KeyedQueue


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, timeout=10))


def test_keys_added_while_a_visit_runs_coalesce_into_one_later_visit():
    async def scenario():
        visits, release, started = [], asyncio.Event(), asyncio.Event()

        async def visit(key):
            visits.append(key)
            started.set()
            await release.wait()

        queue = KeyedQueue(visit)
        queue.resume()
        queue.add("a")
        await started.wait()
        for _ in range(5):
            queue.add("a")
        release.set()
        await queue.idle()
        assert visits == ["a", "a"]

    run(scenario())


def test_a_key_is_never_visited_twice_at_the_same_time_and_concurrency_is_bounded():
    async def scenario():
        running, most, keys_running = 0, 0, set()

        async def visit(key):
            nonlocal running, most
            assert key not in keys_running
            keys_running.add(key)
            running += 1
            most = max(most, running)
            for _ in range(3):
                await asyncio.sleep(0)
            running -= 1
            keys_running.discard(key)

        queue = KeyedQueue(visit, concurrency=3)
        queue.resume()
        for _ in range(4):
            for key in range(10):
                queue.add(key)
            await asyncio.sleep(0)
        await queue.idle()
        assert most == 3

    run(scenario())


def test_a_failing_key_is_repeated_with_growing_delays_and_does_not_hold_up_others():
    async def scenario():
        loop = asyncio.get_running_loop()
        visits, done = [], asyncio.Event()

        async def visit(key):
            visits.append((key, loop.time()))
            if key == "bad":
                if sum(k == "bad" for k, _ in visits) == 4:
                    done.set()
                    return
                raise Backoff("not yet")

        queue = KeyedQueue(visit, first_backoff_s=0.02, longest_backoff_s=1.0)
        queue.resume()
        queue.add("bad")
        queue.add("good")
        await done.wait()
        times = [at for key, at in visits if key == "bad"]
        gaps = [b - a for a, b in pairwise(times)]
        assert gaps[0] >= 0.01
        assert gaps[2] >= 0.04  # the third back-off is drawn from [0.04, 0.08]
        assert [key for key, _ in visits].index("good") == 1

    run(scenario())


def test_an_unexpected_error_is_repeated_too_and_the_queue_lives_on():
    async def scenario():
        visits = []

        async def visit(key):
            visits.append(key)
            if len(visits) == 1:
                raise RuntimeError("a bug")
            done.set()

        done = asyncio.Event()
        queue = KeyedQueue(visit, first_backoff_s=0.01)
        queue.resume()
        queue.add("a")
        await done.wait()
        assert visits == ["a", "a"]

    run(scenario())


def test_a_paused_queue_collects_keys_and_visits_none_until_resumed():
    async def scenario():
        visits = []

        async def visit(key):
            visits.append(key)

        queue = KeyedQueue(visit)
        queue.add("a")
        queue.add("b")
        for _ in range(3):
            await asyncio.sleep(0)
        assert visits == []
        assert queue.depth == 2
        queue.resume()
        await queue.idle()
        assert visits == ["a", "b"]

    run(scenario())


def test_drain_lets_running_visits_end_and_starts_no_more():
    async def scenario():
        ended, release = [], asyncio.Event()

        async def visit(key):
            await release.wait()
            ended.append(key)

        queue = KeyedQueue(visit, concurrency=1)
        queue.resume()
        queue.add("a")
        queue.add("b")
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_soon(release.set)
        await queue.drain(timeout_s=5)
        assert ended == ["a"]

    run(scenario())


def test_a_forgotten_key_is_not_visited_again():
    async def scenario():
        visits = []

        async def visit(key):
            visits.append(key)
            return 0.0

        queue = KeyedQueue(visit)
        queue.add("a")
        queue.forget("a")
        queue.resume()
        await queue.idle()
        assert visits == []

    run(scenario())
