"""Figures of the vertical slice: runs the demo, the tests and the cluster, and writes evidence/slice.json.

    python -m evidence.slice                   everything but the cold figures
    python -m evidence.slice --only ID...      these, keeping the others
    python -m evidence.slice --cold            the cold figures too: a fresh clone and empty caches (about an hour)

Nothing here is typed by hand: a figure that cannot be taken is null and says why.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from rich.console import Console

from evidence import figures
from evidence.figures import ROOT, Collector, NotTaken, absent, load, merge
from tests.localcluster import paths
from tests.localcluster.cluster import Cluster
from tests.localcluster.failure import ClusterError

OUT = Path(__file__).with_name("slice.json")
RESULTS = ROOT / "build" / "results"
DEMO_REPORT = ROOT / "build" / "demo" / "report.json"
DEMO, TESTS = "python -m examples.demo", "python -m pytest"
FRESH = "fresh clone, empty caches"
DEMO_RUNS, CLUSTER_STARTS = 3, 3
COLD_CACHES = ("PRISM_CACHE", "XDG_CACHE_HOME", "GOCACHE", "GOMODCACHE", "UV_CACHE_DIR", "PIP_CACHE_DIR")
OF_OUTER_RUN = ("VIRTUAL_ENV", "MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "ARGS")
"""Left out of a cold run's environment: a `make evidence-slice ARGS=...` would hand its ARGS on."""
SAME_LOGITS = "test_full_budget_gives_the_logits_of_the_stock_model"
SAME_TOKENS = "test_continuous_batching_at_full_budget_gives_the_greedy_tokens_of_the_stock_model"
REFUSED = ("test_an_invalid_manifest_is_refused", "test_a_change_of_an_immutable_field_is_refused")

Summary = dict[str, Any]


class Runs:
    """The real things, each run at most once however many figures it gives."""

    def __init__(self, console: Console, demo_runs: int = DEMO_RUNS) -> None:
        self._console, self._demo_runs = console, demo_runs
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def command(self, argv: list[str], *, cwd: Path = ROOT, environment: Mapping[str, str] | None = None) -> float:
        """Seconds that a command took. Raises NotTaken if it failed, with the end of what it said."""
        self._console.print(f"Running {' '.join(argv)}", highlight=False)
        began_s = time.monotonic()
        run = subprocess.run(
            argv, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if run.returncode:
            raise NotTaken(f"'{' '.join(argv)}' failed (exit {run.returncode}): {' '.join(run.stdout.split()[-60:])}")
        return time.monotonic() - began_s

    @cached_property
    def demos(self) -> list[tuple[float, Summary]]:
        """Wall seconds and report of each demo, on warm caches; the reports stay, for `evidence.planner_cluster`."""
        taken = []
        for number in range(1, self._demo_runs + 1):
            DEMO_REPORT.unlink(missing_ok=True)
            seconds = self.command([sys.executable, "-m", "examples.demo"])
            text = DEMO_REPORT.read_text()
            DEMO_REPORT.with_stem(f"report-{number}").write_text(text)
            taken.append((seconds, json.loads(text)))
        return taken

    @cached_property
    def tests(self) -> tuple[float, dict[str, str]]:
        """Wall seconds of the whole suite on warm caches, and the outcome of each test by its name.

        A failed test is an outcome, not a reason to take no figure of the others.
        """
        RESULTS.mkdir(parents=True, exist_ok=True)
        junit = RESULTS / "junit.xml"
        for stale in (junit, *RESULTS.glob("*_kill.json")):
            stale.unlink(missing_ok=True)
        began_s = time.monotonic()
        self._console.print(f"Running {TESTS}", highlight=False)
        argv = [sys.executable, "-m", "pytest", "-q", f"--junit-xml={junit}"]
        subprocess.run(argv, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
        if not junit.exists():
            raise NotTaken(f"'{TESTS}' ended without {junit.name}")
        return time.monotonic() - began_s, outcomes(junit)

    @cached_property
    def starts(self) -> list[float]:
        """Seconds from nothing to two Ready nodes, binaries and images built before."""
        taken = []
        for _ in range(CLUSTER_STARTS):
            try:
                cluster = Cluster.up("evidence", console=self._console)
            except ClusterError as error:
                raise NotTaken(str(error)) from error
            cluster.down()
            assert cluster.start_seconds is not None
            taken.append(cluster.start_seconds)
        return taken

    @cached_property
    def cold_demo(self) -> tuple[float, float]:
        """Seconds of `make demo` in a fresh clone with empty caches, and the gigabytes that it all takes afterwards."""
        return self._cold("demo")

    @cached_property
    def cold_test(self) -> tuple[float, float]:
        """The same of `make test`."""
        return self._cold("test")

    def _cold(self, target: str) -> tuple[float, float]:
        self.clean()
        self._folder = tempfile.TemporaryDirectory(prefix="cold-", dir=paths.cache().parent)
        folder = Path(self._folder.name)
        clone, caches = folder / "clone", folder / "c"  # short: a socket path has 107 bytes
        self.command(["git", "clone", "-q", str(ROOT), str(clone)])
        inherited = {name: value for name, value in os.environ.items() if name not in OF_OUTER_RUN}
        environment = inherited | {name: str(caches / name.lower()) for name in COLD_CACHES}
        seconds = self.command(["make", target], cwd=clone, environment=environment)
        return seconds, gigabytes(folder)

    def clean(self) -> None:
        """Remove what the last cold run left: 40 GB, which takes minutes, so figures are written before."""
        if self._folder is None:
            return
        # Modules of Go are read-only, also for whoever removes the folder.
        subprocess.run(["chmod", "-R", "u+w", self._folder.name], check=False)
        self._folder.cleanup()
        self._folder = None


def outcomes(junit: Path) -> dict[str, str]:
    """passed, failed or skipped by the name of a test, parameters included."""
    found = {}
    for case in ET.parse(junit).iter("testcase"):
        worst = next((name for name in ("failure", "error", "skipped") if case.find(name) is not None), None)
        found[case.attrib["name"]] = {"failure": "failed", "error": "failed"}.get(worst or "", worst or "passed")
    return found


def gigabytes(folder: Path) -> float:
    """Disk that a folder takes, in 10^9 bytes; files that are linked twice count once."""
    seen: dict[tuple[int, int], int] = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            status = os.lstat(os.path.join(parent, name))
            seen[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(seen.values()) / 1e9


Values = Sequence[float | None]


def _demo(which: str, key: str, unit: str, scale: float = 1.0) -> Collector[Runs]:
    """A figure of one of the demo's two replays."""

    def take(runs: Runs) -> Values:
        values = [document["summaries"][which][key] for _, document in runs.demos]
        return [None if value is None else value * scale for value in values]

    return Collector(unit, DEMO, take)


def _failed_requests(runs: Runs) -> Values:
    return [sum(each["failed"] for each in document["summaries"].values()) for _, document in runs.demos]


def _warm_tests(runs: Runs) -> Values:
    seconds, by_name = runs.tests
    failed = sorted(name for name, outcome in by_name.items() if outcome == "failed")
    if failed:
        raise NotTaken(f"{len(failed)} tests failed, the first: {failed[0]}")
    return [seconds]


def _refused(runs: Runs) -> Values:
    names = [name for name, outcome in runs.tests[1].items() if name.startswith(REFUSED) and outcome == "passed"]
    if not names:
        raise NotTaken("no test of tests/cluster/test_api.py that refuses a manifest passed")
    return [len(names)]


def _equal_at_full(runs: Runs) -> Values:
    both = passed_parameters(runs.tests[1], SAME_LOGITS) & passed_parameters(runs.tests[1], SAME_TOKENS)
    if not both:
        raise NotTaken("no architecture passed both tests of tests/runtime/test_architectures.py")
    return [len(both)]


def passed_parameters(by_name: Mapping[str, str], test: str) -> set[str]:
    """Parameters with which a parametrised test passed."""
    pattern = re.compile(re.escape(test) + r"\[(.+)\]")
    matches = [pattern.fullmatch(name) for name, outcome in by_name.items() if outcome == "passed"]
    return {match.group(1) for match in matches if match}


def _chaos(name: str) -> Collector[Runs]:
    """What a test of tests/chaos recorded about the requests of its load, if it came so far."""

    def take(runs: Runs) -> Values:
        assert runs.tests
        path = RESULTS / f"{name}.json"
        if not path.exists():
            raise NotTaken(f"the test of tests/chaos that writes {path.name} did not come so far")
        return [json.loads(path.read_text())["failed_requests"]]

    return Collector("requests", f"{TESTS} tests/chaos", take)


COLD = {
    "demo.cold_seconds": Collector("s", f"make demo, {FRESH}", lambda runs: [runs.cold_demo[0]]),
    "test.cold_seconds": Collector("s", f"make test, {FRESH}", lambda runs: [runs.cold_test[0]]),
    "disk.gigabytes": Collector("GB", f"clone, .venv and caches after make demo, {FRESH}", lambda r: [r.cold_demo[1]]),
}
COLLECTORS = COLD | {
    "demo.warm_seconds": Collector("s", DEMO, lambda runs: [seconds for seconds, _ in runs.demos]),
    "test.warm_seconds": Collector("s", TESTS, _warm_tests),
    "replay.requests": _demo("elastic", "requests", "requests"),
    "replay.failed_requests": Collector("requests", f"{DEMO}, both replays", _failed_requests),
    "replay.ack_p99_milliseconds": _demo("elastic", "ack_p99_s", "ms", scale=1000),
    "replay.onset_to_lower_seconds": _demo("elastic", "onset_to_lower_s", "s"),
    "replay.attainment": _demo("elastic", "attainment", "share"),
    "replay.attainment_budget_full": _demo("held", "attainment", "share"),
    "replay.replica_seconds": _demo("elastic", "replica_seconds", "replica-seconds"),
    "replay.replica_seconds_budget_full": _demo("held", "replica_seconds", "replica-seconds"),
    "replay.mean_relative_quality": _demo("elastic", "mean_relative_quality", "share"),
    "manifests.refused": Collector("manifests", f"{TESTS} tests/cluster/test_api.py", _refused),
    "operator_kill.failed_requests": _chaos("operator_kill"),
    "node_kill.failed_requests": _chaos("node_kill"),
    "cluster.start_seconds": Collector("s", "tests.localcluster Cluster.up, two nodes", lambda runs: runs.starts),
    "models.equal_at_full": Collector(
        "architectures", f"{TESTS} tests/runtime/test_architectures.py: logits and greedy tokens", _equal_at_full
    ),
}
NEVER_TAKEN = "not taken yet; run: make evidence-slice"
UNTAKEN_COLD = "taken only with --cold: it needs a fresh clone and empty caches"


collect = partial(figures.collect, COLLECTORS)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m evidence.slice", description="Re-take the published figures.")
    ids = ", ".join(COLLECTORS)
    parser.add_argument("--only", nargs="+", choices=COLLECTORS, metavar="ID", help=f"re-take these alone: {ids}")
    parser.add_argument("--cold", action="store_true", help="take the cold figures too: about an hour, 60 GB of disk")
    parser.add_argument("--demo-runs", type=int, default=DEMO_RUNS, help=f"demos to run (default {DEMO_RUNS})")
    arguments = parser.parse_args()
    console, known = Console(stderr=True), load(OUT)
    runs = Runs(console, arguments.demo_runs)
    try:
        wanted = [name for name in COLLECTORS if name in (arguments.only or COLLECTORS)]
        for name in [name for name in wanted if name in COLD and name not in known and not arguments.cold]:
            merge(OUT, absent(name, COLD[name].unit, COLD[name].how, UNTAKEN_COLD), tuple(COLLECTORS))
        names = [name for name in wanted if name not in COLD or arguments.cold]
        figures.take_into(OUT, COLLECTORS, names, runs, partial(console.print, highlight=False))
    finally:
        runs.clean()
    figures.fill_in(OUT, COLLECTORS, NEVER_TAKEN)
    return 0


if __name__ == "__main__":
    sys.exit(main())
