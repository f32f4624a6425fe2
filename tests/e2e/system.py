"""The whole system on the local cluster: chart installed, a PrismService serving, load on it, parts of it killed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from examples.demo import install, manifests
from examples.demo.observe import METRICS_PORT, PodSample, pod_sample
from examples.demo.records import Answer, read_answers
from examples.demo.replay import BEGAN
from prism_api.model import PrismModelSpec
from tests.localcluster import paths
from tests.localcluster.cluster import Cluster
from tests.localcluster.failure import ClusterError

OPERATOR_NAMESPACE, NAMESPACE, SERVICE = install.OPERATOR_NAMESPACE, "demo", "chat"
RESULTS = paths.REPOSITORY / "build/results"
Object = dict[str, Any]


@dataclass(frozen=True)
class Pod:
    name: str
    ip: str
    node: str
    ready: bool
    restarts: int


class System:
    """Operator and one service; every wait has a deadline and says what it last saw."""

    def __init__(self, cluster: Cluster, model: PrismModelSpec, service: Object) -> None:
        self.cluster, self.service = cluster, service
        self.ladder = model.ladder

    # ---- installation -------------------------------------------------------------------------------------------
    @classmethod
    def install(cls, cluster: Cluster) -> "System":
        """Images, chart, model and service, as the demo installs them."""
        install.install_operator(cluster, cluster.image("operator"))
        model = install.apply_model(cluster, cluster.image("model"))
        system = cls(cluster, model, manifests.service(runtime_image=cluster.image("runtime")))
        system.apply()
        return system

    def apply(self, **spec: Any) -> None:
        """Apply the service; keyword arguments are merged into its spec."""
        cluster, body = self.cluster, merged(self.service, {"spec": spec})
        cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", input=json.dumps(body))

    def delete(self) -> None:
        self.cluster.kubectl("delete", "psvc", SERVICE, "-n", NAMESPACE, "--wait=false", "--ignore-not-found")

    # ---- what is seen -------------------------------------------------------------------------------------------
    def status(self) -> Object:
        found: Object = self.cluster.get("psvc", SERVICE, "-n", NAMESPACE).get("status", {})
        return found

    def condition(self, kind: str) -> Object:
        return next(c for c in self.status()["conditions"] if c["type"] == kind)

    def deployment(self) -> Object:
        found: Object = self.cluster.get("deployment", SERVICE, "-n", NAMESPACE)
        return found

    def pods(self) -> list[Pod]:
        return [
            Pod(
                item["metadata"]["name"],
                item["status"].get("podIP", ""),
                item["spec"].get("nodeName", ""),
                any(c["type"] == "Ready" and c["status"] == "True" for c in item["status"].get("conditions", ())),
                sum(c["restartCount"] for c in item["status"].get("containerStatuses", ())),
            )
            for item in self.cluster.get("pods", "-n", NAMESPACE, "-l", f"moeprism.io/service={SERVICE}")["items"]
            if "deletionTimestamp" not in item["metadata"]
        ]

    def operator_pod(self) -> Object:
        items = self.cluster.get("pods", "-n", OPERATOR_NAMESPACE)["items"]
        found: Object = next(item for item in items if "deletionTimestamp" not in item["metadata"])
        return found

    def metrics(self, pod: Pod) -> PodSample | None:
        """A pod's metrics page, through the API server; None if it does not answer."""
        path = f"/api/v1/namespaces/{NAMESPACE}/pods/{pod.name}:{METRICS_PORT}/proxy/metrics"
        try:
            return pod_sample(self.cluster.kubectl("get", "--raw", path))
        except ClusterError:
            return None

    def budgets(self) -> dict[str, int]:
        """Per-mille that each Ready pod runs its default class at, as the pods themselves say."""
        seen = {pod.name: self.metrics(pod) for pod in self.pods() if pod.ready}
        default = self.service["spec"]["defaultClass"]
        return {name: self.ladder[page.points[default]].budget_permille for name, page in seen.items() if page}

    def floor_permille(self) -> int:
        """Lowest budget that the default class's quality floor allows."""
        spec = self.service["spec"]
        (default,) = (c for c in spec["classes"] if c["name"] == spec["defaultClass"])
        floor = Decimal(default["quality"]["minRelativeQuality"])
        return self.ladder.floor_for(floor).budget_permille

    # ---- waiting and breaking -----------------------------------------------------------------------------------
    def wait_until(self, what: str, ready: Callable[[], bool], timeout_s: float = 60) -> None:
        self.cluster.wait_until(what, ready, timeout_s)

    def wait_ready(self, replicas: int | None = None, timeout_s: float = 120) -> None:
        """Until exactly this many pods (default: as many as the Deployment wants) are Ready and follow the operator."""

        def ready() -> bool:
            pods, wanted = self.pods(), replicas or self.deployment()["spec"]["replicas"]
            acknowledged = self.status().get("budget", {}).get("ackedReplicas") == wanted
            return len(pods) == wanted and all(pod.ready for pod in pods) and acknowledged

        self.wait_until(f"{replicas or 'all'} pods are Ready and follow the operator", ready, timeout_s)

    def kill(self, namespace: str, pod: str) -> None:
        """SIGKILL to a pod's process; its kubelet restarts it."""
        os.kill(self.cluster.container_pid(namespace, pod), signal.SIGKILL)

    @contextmanager
    def load(self, name: str, arrivals: list[tuple[float, int, int]]) -> Iterator["Load"]:
        """Requests at (second, prompt tokens, output tokens) from node-0 through the Service while the body runs."""
        load = Load(self, name, arrivals)
        load.start()
        try:
            yield load
        finally:
            load.finish()


class Load:
    """An open-loop replay in a process of its own, in node-0's network, through the Service."""

    def __init__(self, system: System, name: str, arrivals: list[tuple[float, int, int]]) -> None:
        RESULTS.mkdir(parents=True, exist_ok=True)
        self.trace, self.out = RESULTS / f"{name}.trace.csv", RESULTS / f"{name}.jsonl"
        self.duration_s = max(at for at, _, _ in arrivals)
        self.system = system
        lines = ["t_s,input_tokens,output_tokens", *(f"{at:.3f},{i},{o}" for at, i, o in arrivals)]
        self.trace.write_text("\n".join(lines) + "\n")
        self.out.unlink(missing_ok=True)
        self.answers: list[Answer] = []

    def start(self) -> None:
        url = install.service_url(self.system.cluster, self.system.service)
        argv = [sys.executable, "-m", "examples.demo.replay", "--url", url]
        argv += ["--trace", str(self.trace), "--out", str(self.out)]
        options: dict[str, Any] = {"cwd": paths.REPOSITORY, "stdout": subprocess.PIPE, "text": True}
        self.process = self.system.cluster.inside(argv, node="node-0", **options)
        line = self.process.stdout.readline() if self.process.stdout else ""
        assert line.startswith(BEGAN), f"the load generator did not begin: {line}"
        self.began_s = float(line.removeprefix(BEGAN))
        """On CLOCK_MONOTONIC, which all processes of a machine share."""

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def finish(self) -> None:
        """Wait for the last answer and read what was measured."""
        self.process.communicate(timeout=self.duration_s + 150)
        assert self.process.returncode == 0, f"the load generator failed; answers so far: {self.out}"
        self.answers = read_answers(self.out)

    @property
    def failed(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.outcome != "finished"]


def merged(base: Object, change: Object) -> Object:
    """`base` with `change` laid over it, dicts merged, everything else replaced; neither is modified."""
    result = dict(base)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def record(name: str, **figures: float) -> Path:
    """Write figures for `make evidence-slice` to read."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(figures, indent=1))
    return path


def steady_then_burst(
    seconds: float, calm_per_s: float, burst_per_s: float, burst_at_s: float, burst_s: float
) -> list[tuple[float, int, int]]:
    """Evenly spaced requests of 160 prompt and 24 output tokens, faster during a burst."""
    arrivals, at = [], 0.0
    while at < seconds:
        arrivals.append((at, 160, 24))
        at += 1 / (burst_per_s if burst_at_s <= at < burst_at_s + burst_s else calm_per_s)
    return arrivals
