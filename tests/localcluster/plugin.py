"""Fixtures for tests that need a Kubernetes: one cluster a session, one namespace a test.

First hit wins: the user's own cluster (KUBECONFIG and `--use-existing-cluster`), the running local cluster, a new one
that ends with the session. Without any, tests fail in CI and are skipped elsewhere.
"""

import os
import uuid
from collections.abc import Iterator

import pytest
from rich.console import Console

from tests.localcluster import binaries, doctor, images, paths
from tests.localcluster.cluster import DEFAULT_NAME, GPU, Cluster
from tests.localcluster.failure import ClusterError

CRDS = tuple(sorted((paths.REPOSITORY / "crds").glob("*.yaml")))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--use-existing-cluster",
        action="store_true",
        help="run cluster tests on the cluster of KUBECONFIG; never done without this flag",
    )


def unavailable(reason: str) -> None:
    """Fail in CI, where a missing cluster is a defect; skip elsewhere, with the reason and the cure."""
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def _found(config: pytest.Config) -> Cluster:
    if config.getoption("--use-existing-cluster"):
        return Cluster.existing()
    try:
        return Cluster.attach(DEFAULT_NAME)
    except ClusterError:
        doctor.require()
        return Cluster.up(DEFAULT_NAME, crds=CRDS, console=Console(stderr=True))


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """The cluster of this session; one that it started ends with it."""
    try:
        found = _found(request.config)
    except ClusterError as error:
        unavailable(str(error))
        raise
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.write_line(found.describe())
    yield found
    if found.start_seconds is not None:
        found.down()


def lacking(cluster: Cluster, needs: tuple[str, ...]) -> list[str]:
    """Needs of a `cluster` marker that a cluster does not meet: `crd`, `nodes=N`, `gpus=N` (a node), `own`."""
    missing = []
    for need in needs:
        name, _, value = need.partition("=")
        match name:
            case "crd":
                met = bool(cluster.get("crd"))
            case "own":
                met = cluster.own
            case "nodes":
                met = len(cluster.nodes()) >= int(value)
            case "gpus":
                capacities = [item["status"]["capacity"] for item in cluster.get("nodes")["items"]]
                met = any(int(capacity.get(GPU, "0")) >= int(value) for capacity in capacities)
            case _:
                raise ValueError(f"cluster marker needs '{need}'; it can be: crd, own, nodes=N, gpus=N")
        if not met:
            missing.append(need)
    return missing


@pytest.fixture(autouse=True)
def _cluster_meets_the_marker(request: pytest.FixtureRequest) -> None:
    marker = request.node.get_closest_marker("cluster")
    if marker is None:
        return
    found: Cluster = request.getfixturevalue("cluster")
    if missing := lacking(found, marker.args):
        unavailable(f"{found.describe()}; this test needs {', '.join(missing)}")


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """A namespace of the test's own, with Pod Security `restricted` enforced."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    cluster.kubectl("create", "namespace", name)
    cluster.kubectl("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted")
    cluster.wait_for_namespace(name)
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture(scope="session")
def project_images(cluster: Cluster) -> dict[str, str]:
    """References of the project's own images, built and pushed: operator, runtime, model."""
    return {image.__name__: cluster.image(image.__name__) for image in images.PROJECT_IMAGES}


def pytest_report_header() -> str:
    built = "built" if not binaries.missing() else "not built yet"
    return f"local cluster: Kubernetes {binaries.KUBERNETES} ({built}), cache {paths.cache()}"
