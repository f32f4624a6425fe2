"""Fixtures for tests that need a Kubernetes: one cluster a session, one namespace a test."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from tests.localcluster import binaries, doctor, images, paths
from tests.localcluster.cluster import DEFAULT_NAME, Cluster
from tests.localcluster.failure import ClusterError

CRDS = tuple(sorted((paths.REPOSITORY / "crds").glob("*.yaml")))


def unavailable(reason: str) -> None:
    """Fail in CI, where a missing cluster is a defect; skip elsewhere, with the reason and the cure."""
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The running cluster, or a new one that ends with the session."""
    try:
        doctor.require()
    except ClusterError as error:
        unavailable(str(error))
    try:
        yield Cluster.attach(DEFAULT_NAME)
        return
    except ClusterError:
        started = Cluster.up(DEFAULT_NAME, crds=CRDS, console=Console(stderr=True))
    yield started
    started.down()


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """A namespace of the test's own, with Pod Security `restricted` enforced."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    cluster.kubectl("create", "namespace", name)
    cluster.kubectl("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted")
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture(scope="session")
def project_images(cluster: Cluster) -> dict[str, str]:
    """References of the project's own images, built and pushed: operator, runtime, model."""
    wanted = [image() for image in images.PROJECT_IMAGES]
    images.ensure(Console(stderr=True), wanted)
    return {image.name: image.reference for image in wanted}


def pytest_report_header() -> list[str]:
    built = "built" if not binaries.missing() else "not built yet"
    return [f"local cluster: Kubernetes {binaries.KUBERNETES} ({built}), cache {Path(paths.cache())}"]
