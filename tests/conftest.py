"""Order and accounting of the test levels; the local cluster's fixtures come from its plugin."""

import os
from collections import Counter
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

pytest_plugins = ["tests.localcluster.plugin", "tests.e2e.fixtures"]

TESTS = Path(__file__).parent
LEVELS = ("unit", "property", "sim", "runtime", "gpu", "cluster", "e2e", "chaos")
"""Cheapest first: a broken invariant is told before a cluster is started for it."""

outcomes: dict[str, Counter[str]] = {level: Counter() for level in LEVELS}


def level_of(path: Path) -> str:
    return path.relative_to(TESTS).parts[0]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LEVELS.index(level_of(item.path)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = yield
    if report.when == "call" or report.outcome != "passed":
        outcomes[level_of(item.path)][report.outcome] += 1
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("levels")
    for level, counts in outcomes.items():
        if counts:
            terminalreporter.line(
                f"{level:9} {counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped"
            )


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    """Two busy threads on two shared cores are slower than one, and their sums differ in the last bit.

    For every test, because commands under test set the number that they are told.
    """
    import sys

    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
