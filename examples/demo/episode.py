"""One replay on a cluster, watched: load in a process of its own, samples meanwhile, the live view."""

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from examples.demo.observe import Observer
from examples.demo.records import Sample, on_clock_of, read_answers
from examples.demo.replay import BEGAN
from examples.demo.results import Episode, Moment, lowest_budget_of, moment
from tests.localcluster import paths
from tests.localcluster.cluster import Cluster

SAMPLE_EVERY_S, SHOW_EVERY_S = 0.5, 0.5
BEGIN_WITHIN_S, END_WITHIN_S = 60, 120


class EpisodeError(RuntimeError):
    """The load generator did not do its work; the message carries what it said."""


@contextmanager
def api_socket(cluster: Cluster) -> Iterator[Path]:
    """The API server with the cluster's credentials: kubectl proxy on a socket that only this user can open."""
    with TemporaryDirectory(prefix="prism-demo-") as folder:
        socket = Path(folder) / "api.sock"
        argv = ["kubectl", "proxy", f"--unix-socket={socket}"]
        proxy = subprocess.Popen(argv, env=cluster.environment(), stdout=subprocess.PIPE, text=True)
        try:
            assert proxy.stdout is not None
            said = proxy.stdout.readline()
            if "Starting to serve" not in said:
                raise EpisodeError(f"kubectl proxy did not start; it said: '{said.strip()}'")
            yield socket
        finally:
            _end(proxy)


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent where; `out` is written by the load generator and read while it runs."""

    url: str
    trace: Path
    out: Path


async def play(
    cluster: Cluster,
    observer: Observer,
    load: Load,
    template: Episode,
    show: Callable[[Moment], None],
    *,
    watch_on_s: float,
) -> Episode:
    """Replay a trace and watch it to its end, and on for at most `watch_on_s` until all pods are back at full.

    `template` with the answers, samples and acknowledgements of this replay. Raises EpisodeError if the load generator
    itself fails; requests that fail are in the answers.
    """
    seen: list[Sample] = []
    before = await observer.acknowledgements()
    watch = asyncio.create_task(observer.watch(SAMPLE_EVERY_S, seen.append))
    try:
        with _generator(cluster, load) as generator:
            began_s = await _began(generator)

            def look() -> Episode:
                samples = on_clock_of(seen, began_s)
                episode = replace(template, answers=read_answers(load.out), samples=samples)
                if samples:
                    show(moment(episode, samples[-1].at_s))
                return episode

            while generator.poll() is None:
                await asyncio.sleep(SHOW_EVERY_S)
                look()
            if generator.returncode:
                raise EpisodeError(f"the load generator failed (exit {generator.returncode}); what it said is above")
            for _ in range(round(watch_on_s / SHOW_EVERY_S)):
                if is_at_full(look()):
                    break
                await asyncio.sleep(SHOW_EVERY_S)
            after = await observer.acknowledgements()
            acks = {bound: count - before.get(bound, 0.0) for bound, count in after.items()}
            return replace(look(), ack_buckets=acks)
    finally:
        watch.cancel()


def is_at_full(episode: Episode) -> bool:
    """Whether the last sample saw every pod at the largest budget."""
    if not episode.samples:
        return False
    lowest = lowest_budget_of(episode.samples[-1], episode.service_class, episode.ladder)
    return lowest == max(episode.ladder.budget.values())


@contextmanager
def _generator(cluster: Cluster, load: Load) -> Iterator["subprocess.Popen[str]"]:
    """On a node of our own cluster, where kube-proxy works; beside a user's own cluster, on this machine."""
    argv = [sys.executable, "-m", "examples.demo.replay"]
    argv += ["--url", load.url, "--trace", str(load.trace), "--out", str(load.out)]
    load.out.unlink(missing_ok=True)
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True, "cwd": paths.REPOSITORY}
    if cluster.own:
        process = cluster.inside(argv, node=cluster.nodes()[0], **options)
    else:
        process = subprocess.Popen(argv, **options)
    try:
        yield process
    finally:
        _end(process)


async def _began(load: "subprocess.Popen[str]") -> float:
    assert load.stdout is not None
    line = await asyncio.wait_for(asyncio.to_thread(load.stdout.readline), BEGIN_WITHIN_S)
    if not line.startswith(BEGAN):
        raise EpisodeError("the load generator ended before it began; what it said is above")
    return float(line.removeprefix(BEGAN))


def _end(process: "subprocess.Popen[str]") -> None:
    if process.poll() is None:
        process.terminate()
    process.wait(timeout=10)
    if process.stdout is not None:
        process.stdout.close()
