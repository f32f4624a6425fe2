"""The installed system, shared by the levels that put load on it and break it."""

from collections.abc import Iterator

import pytest

from examples.demo import install
from tests.e2e.system import System
from tests.localcluster.cluster import Cluster


@pytest.fixture(scope="session")
def system(cluster: Cluster) -> Iterator[System]:
    """The chart, one model and one service, installed once; removed at the end."""
    installed = System.install(cluster)
    yield installed
    installed.delete()
    install.uninstall(cluster)
