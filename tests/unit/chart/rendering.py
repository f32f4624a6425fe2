"""Renders the chart with the local cluster's own helm; an answer is kept, for many tests look at the same one."""

import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.localcluster import binaries
from tests.localcluster.failure import ClusterError

CHART = Path(__file__).parents[3] / "helm/prism"
NAMESPACE = "prism-system"
Object = dict[str, Any]


class HelmError(Exception):
    """What helm wrote when it refused."""


def helm() -> str:
    """Path of helm. Where it is not built, tests are skipped, in CI they fail."""
    try:
        return str(binaries.path("helm"))
    except ClusterError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error), pytrace=False)
        pytest.skip(str(error))


@cache
def rendered(*settings: str, release: str = "prism") -> str:
    """What `helm template --set SETTING ...` prints. Raises HelmError."""
    flags = [flag for setting in settings for flag in ("--set", setting)]
    argv = [helm(), "template", release, str(CHART), "--namespace", NAMESPACE, *flags]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        raise HelmError(done.stderr)
    return done.stdout


def objects(*settings: str, release: str = "prism") -> list[Object]:
    return [obj for obj in yaml.safe_load_all(rendered(*settings, release=release)) if obj]


def of_kind(kind: str, *settings: str) -> dict[str, Object]:
    """The objects of a kind by name."""
    return {obj["metadata"]["name"]: obj for obj in objects(*settings) if obj["kind"] == kind}
