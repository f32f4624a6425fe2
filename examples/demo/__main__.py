"""make demo: from nothing to a measured comparison.

Cluster, `helm install`, `kubectl apply`, a burst of production traffic, the same burst with the budget held at full.
"""

import argparse
import asyncio
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console

from examples.demo import foresight, install, manifests, report, trace
from examples.demo.episode import EpisodeError, Load, api_socket, play
from examples.demo.observe import Observer
from examples.demo.results import Episode, Ladder, Objectives, comparison, summarise
from examples.demo.table import View
from prism_api.model import PrismModelSpec
from prism_api.service import PrismServiceSpec
from tests.localcluster import binaries, doctor, paths
from tests.localcluster.cluster import Cluster
from tests.localcluster.failure import ClusterError

OUTPUT = paths.REPOSITORY / "build" / "demo"
EXIT_CANNOT_RUN, EXIT_INTERRUPTED = 3, 130
COLD_MINUTES, WARM_MINUTES, FAST_MINUTES = 25, 5, 2
MEMORY_GIGABYTES = 6
WATCH_ON_S, WATCH_ON_FAST_S = 60.0, 3.0
"""How long after the last answer the budget's return to full is watched."""

SERVICE_IN_URL = "{service}"

TOLERABLE_LAG = 0.05
"""Share of busy time: the burst is about 10 % above what one replica holds, so more lag than half of that decides."""

NOT_SHOWN = (
    "GPUs: nvidia.com/gpu is a declared number, and pods are paced by a made-up profile. Times are of that profile.",
    "How often bursts are of this kind: the slice was chosen so that its burst lies within what the knob can absorb. "
    "11 % of the 10-s windows of this trace exceed 4 times the minute before, which no knob absorbs.",
    "Statistics: this is one replay of each kind. Routing to pods is random, so figures differ from run to run.",
    "Many machines: the nodes are namespaces on one kernel.",
)


@dataclass(slots=True)
class Steps:
    """Prints what is being done, and keeps how long each step took."""

    console: Console
    began_s: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        self.console.print(f"[bold]{name}[/bold]", highlight=False)
        began_s = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began_s
        self.console.print(f"  done in {self.seconds[name]:.1f} s", style="dim", highlight=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo",
        description="From nothing to a result: a real Kubernetes on this machine, the operator, one PrismService, a "
        "burst of production traffic, and the same burst with the budget held at full.",
        epilog="The report goes to build/demo/. Ctrl-C cleans up; run it again to go on.",
    )
    parser.add_argument(
        "--fast", action="store_true", help="22 s of load instead of 75 s, and pods that start in 2 s instead of 15 s"
    )
    parser.add_argument("--keep", action="store_true", help="leave cluster and service running for a look around")
    parser.add_argument(
        "--url",
        help=f"send the load here instead of to the Services' cluster addresses; {SERVICE_IN_URL} in it becomes the "
        "name of the Service",
    )
    parser.add_argument(
        "--use-existing-cluster",
        action="store_true",
        help="the cluster of KUBECONFIG; needs --url and images under PRISM_IMAGE_PREFIX",
    )
    return parser


def _announce(console: Console, arguments: argparse.Namespace) -> None:
    """What comes, how long it takes and what it needs, before anything is done."""
    warm = FAST_MINUTES if arguments.fast else WARM_MINUTES
    if arguments.use_existing_cluster:
        console.print(f"Installs the chart and a PrismService on the cluster of KUBECONFIG; about {warm} minutes.")
        return
    cold = bool(binaries.missing())
    console.print(
        f"This {'builds Kubernetes and the images from source, ' if cold else ''}starts a Kubernetes of two nodes in "
        f"namespaces of this machine, installs the operator, and replays one burst twice.\n"
        f"Time: about {COLD_MINUTES if cold else warm} minutes ({COLD_MINUTES} from empty caches, {warm} after that). "
        f"Disk: {doctor.needed_gigabytes(2)} GB more in {paths.cache()}. Memory: {MEMORY_GIGABYTES} GB. "
        f"Ctrl-C cleans up.",
        highlight=False,
    )


def _start_cluster(arguments: argparse.Namespace, console: Console) -> tuple[Cluster, Callable[[Cluster], None]]:
    """The cluster to use and how to leave it: one that ran before goes on without what the demo put there."""
    if arguments.use_existing_cluster:
        return Cluster.existing(), install.uninstall
    try:
        return Cluster.attach(), install.uninstall
    except ClusterError:
        return Cluster.up(console=console), Cluster.down


def _ladder(model: PrismModelSpec) -> Ladder:
    return Ladder(
        budget={point.name: point.budget_permille for point in model.operating_points},
        quality={point.name: float(point.relative_quality) for point in model.operating_points},
    )


def _template(service: manifests.Document, model: PrismModelSpec, trace_file: Path) -> Episode:
    spec = PrismServiceSpec.model_validate(service["spec"])
    of_class = next(each for each in spec.classes if each.name == spec.default_class_name)
    ttft_ms, tpot_ms = of_class.objectives.ttft_milliseconds, of_class.objectives.tpot_milliseconds
    price = spec.pool.price_per_hour
    return Episode(
        arrivals_s=[arrival.at_s for arrival in trace.load(trace_file)],
        answers=(),
        samples=(),
        objectives=Objectives(ttft_ms and ttft_ms / 1000, tpot_ms and tpot_ms / 1000),
        ladder=_ladder(model),
        service_class=spec.default_class_name,
        price_per_hour=None if price is None else float(price),
    )


def _trace_file(arguments: argparse.Namespace) -> Path:
    return trace.SHIPPED_FAST if arguments.fast else trace.SHIPPED


def _start_seconds(arguments: argparse.Namespace) -> int | None:
    """How long a pod's start is paced; None as the example says."""
    return manifests.FAST_START_SECONDS if arguments.fast else None


def _url(cluster: Cluster, service: manifests.Document, arguments: argparse.Namespace) -> str:
    given: str | None = arguments.url
    if given is None:
        return install.service_url(cluster, service)
    return given.replace(SERVICE_IN_URL, service["metadata"]["name"])


def _replay_twice(
    cluster: Cluster, images: install.Images, model: PrismModelSpec, arguments: argparse.Namespace, steps: Steps
) -> dict[str, Episode]:
    """The elastic replay first, then the held one, each on a service of its own that had no load before."""
    trace_file = _trace_file(arguments)
    watch_on_s = WATCH_ON_FAST_S if arguments.fast else WATCH_ON_S
    services = {
        name: manifests.service(
            runtime_image=images.runtime,
            budget_control=control,
            start_seconds=_start_seconds(arguments),
        )
        for name, control in ((report.ELASTIC, "Auto"), (report.HELD, "Off"))
    }
    with steps.step("kubectl apply: two PrismServices, budget.control Auto and Off"):
        install.start_services(cluster, services.values())
    episodes: dict[str, Episode] = {}
    for name, service in services.items():
        load = Load(_url(cluster, service, arguments), trace_file, OUTPUT / f"{name}.jsonl")
        title, template = f"Replay {report.NAMES[name]}", _template(service, model, trace_file)
        with steps.step(title), View(steps.console, title, template.arrivals_s[-1]) as view:
            episodes[name] = asyncio.run(_watched(cluster, load, template, service, view, watch_on_s))
        if not arguments.keep:
            install.end_service(cluster, service)
    return episodes


async def _watched(
    cluster: Cluster, load: Load, template: Episode, service: manifests.Document, view: View, watch_on_s: float
) -> Episode:
    with api_socket(cluster) as socket:
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(socket))) as session:
            observer = Observer(
                session,
                namespace=service["metadata"]["namespace"],
                service=service["metadata"]["name"],
                operator_namespace=install.OPERATOR_NAMESPACE,
            )
            return await play(cluster, observer, load, template, view.show, watch_on_s=watch_on_s)


def _facts(cluster: Cluster, arguments: argparse.Namespace, steps: Steps) -> Mapping[str, Any]:
    profile = foresight.read_profile("demo")
    service = manifests.service(start_seconds=_start_seconds(arguments))
    trace_file = _trace_file(arguments)
    return {
        "cluster": cluster.describe(),
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.release()}",
        "trace": f"{trace_file.name}: a slice of azure2023_code (CC-BY-4.0), thinned and clipped, see examples/traces/",
        "pods": f"paced as '{profile.accelerator}': {profile.provenance}",
        "objectives": service["spec"]["classes"][0]["objectives"],
        "replicas": f"{service['spec']['scaling']['minReplicas']} to {service['spec']['scaling']['maxReplicas']}; "
        f"scale-up window {manifests.SCALE_UP_WINDOW_S} s and replica loop {manifests.SLOW_LOOP_S} s instead of 30 s, "
        f"because these pods start in {manifests.paced_start_seconds(service)} s and a little more",
        "second replay": "a second service with budget.control Off, applied with the first; nothing else differs",
        "seconds by step": {name: round(seconds, 1) for name, seconds in steps.seconds.items()},
    }


def _run(arguments: argparse.Namespace, console: Console) -> None:
    steps = Steps(console)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    with steps.step("Kubernetes"):
        cluster, leave = _start_cluster(arguments, console)
    console.print(f"  export KUBECONFIG={cluster.kubeconfig}", highlight=False, soft_wrap=True)
    try:
        with steps.step("Images: operator, runtime, model"):
            images = install.Images(*(cluster.image(name, console) for name in ("operator", "runtime", "model")))
        with steps.step("helm install: CRDs and operator"):
            install.install_operator(cluster, images.operator)
        model = install.apply_model(cluster, images.model)
        episodes = _replay_twice(cluster, images, model, arguments, steps)
        page = report.write(OUTPUT, episodes, _facts(cluster, arguments, steps), NOT_SHOWN)
    finally:
        if arguments.keep:
            console.print(f"Kept. Look around: export KUBECONFIG={cluster.kubeconfig}", highlight=False, soft_wrap=True)
        else:
            console.print("Cleaning up")
            leave(cluster)
    elastic, held = (summarise(episodes[name]) for name in (report.ELASTIC, report.HELD))
    console.print(
        f"Report: {os.path.relpath(page)}, and report.json beside it. {time.monotonic() - steps.began_s:.0f} s in all.",
        highlight=False,
    )
    lag = max(each.lag_share or 0.0 for each in (elastic, held))
    if lag > TOLERABLE_LAG:
        console.print(
            f"[yellow]Pods missed their pace for {lag:.0%} of their busy time: this machine was too "
            "busy, and the latencies are its own. Run it again when nothing else runs.[/yellow]"
        )
    console.print(f"[bold]{comparison(elastic, held)}[/bold]", highlight=False)


def main() -> int:
    arguments, console = _parser().parse_args(), Console()
    if arguments.use_existing_cluster and SERVICE_IN_URL not in (arguments.url or ""):
        console.print(
            f"--use-existing-cluster needs --url with {SERVICE_IN_URL} in it: an address that this machine reaches and "
            f"that spreads connections over the pods of the Service of that name, for example http://gateway/"
            f"{SERVICE_IN_URL}. The demo runs two Services.",
            highlight=False,
            markup=False,
        )
        return 2
    if not arguments.use_existing_cluster:
        fatal = [finding for finding in doctor.cannot_run_containers() if not finding.ok]
        if fatal:
            console.print("This machine cannot run containers.")
            for finding in fatal:
                console.print(f"  {finding.what}: {finding.found}", highlight=False)
            console.print(doctor.WAYS_ON)
            return EXIT_CANNOT_RUN
    _announce(console, arguments)
    try:
        if not arguments.use_existing_cluster:
            doctor.install_packages()
            doctor.require(2)
        _run(arguments, console)
    except (ClusterError, EpisodeError, aiohttp.ClientError, OSError) as error:
        console.print(f"[red]{error}[/red]", highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted; run it again to go on.")
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
