"""The demo's ways in and out: what it says first, where it stops, and what it leaves behind."""

import sys
from pathlib import Path
from typing import Any

import pytest

from examples.demo import __main__ as demo
from examples.demo import manifests
from prism_api.service import PrismServiceSpec
from tests.localcluster.doctor import Finding
from tests.localcluster.failure import ClusterError


class FakeCluster:
    """A cluster that runs already; the first thing asked of it fails in the way of the test."""

    kubeconfig = Path("kubeconfig")

    def __init__(self, failure: BaseException) -> None:
        self._failure = failure
        self.left: list[str] = []

    def image(self, *_: Any) -> str:
        raise self._failure

    def kubectl(self, *arguments: str, **_: Any) -> str:
        self.left.append(" ".join(arguments[:3]))
        return ""

    helm = kubectl


def run_demo(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["demo", *arguments])
    return demo.main()


@pytest.fixture
def capable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine on which everything is installed, as far as the doctor says."""
    monkeypatch.setattr(demo.doctor, "cannot_run_containers", list)
    monkeypatch.setattr(demo.doctor, "install_packages", lambda: None)
    monkeypatch.setattr(demo.doctor, "require", lambda nodes: None)
    monkeypatch.setattr(demo, "OUTPUT", tmp_path)


def test_a_machine_that_cannot_run_containers_is_told_so_with_the_two_ways_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finding = Finding("root", False, "uid 1000", "run it as root", fatal=True)
    monkeypatch.setattr(demo.doctor, "cannot_run_containers", lambda: [finding])
    assert run_demo(monkeypatch) == demo.EXIT_CANNOT_RUN
    said = capsys.readouterr().out
    assert "uid 1000" in said
    assert "make serve" in said
    assert "KUBECONFIG" in said


@pytest.mark.usefixtures("capable")
def test_time_disk_and_memory_are_told_before_anything_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any) -> None:
        raise ClusterError("nothing was done yet")

    monkeypatch.setattr(demo, "_run", stop)
    assert run_demo(monkeypatch) == 1
    said = capsys.readouterr().out
    assert said.index("minutes") < said.index("nothing was done yet")
    assert "GB more" in said
    assert "Memory" in said


@pytest.mark.usefixtures("capable")
@pytest.mark.parametrize(
    ("failure", "code"), [(ClusterError("no space left"), 1), (KeyboardInterrupt(), demo.EXIT_INTERRUPTED)]
)
def test_whatever_ends_the_demo_what_it_put_on_a_cluster_is_removed(
    monkeypatch: pytest.MonkeyPatch, failure: BaseException, code: int
) -> None:
    cluster = FakeCluster(failure)
    monkeypatch.setattr(demo.Cluster, "attach", lambda: cluster)
    assert run_demo(monkeypatch) == code
    assert cluster.left == ["delete namespace demo", "uninstall prism -n", "delete namespace prism-system"]


@pytest.mark.usefixtures("capable")
def test_keep_leaves_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster(ClusterError("no space left"))
    monkeypatch.setattr(demo.Cluster, "attach", lambda: cluster)
    run_demo(monkeypatch, "--keep")
    assert cluster.left == []


def test_a_users_own_cluster_needs_an_address_for_the_load(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_demo(monkeypatch, "--use-existing-cluster") == 2
    assert "--url" in capsys.readouterr().out


@pytest.mark.parametrize("control", ["Auto", "Off"])
def test_both_replays_run_a_valid_service_that_differs_in_name_and_the_budgets_control_alone(control: str) -> None:
    service = manifests.service(runtime_image="registry.example/runtime:1", budget_control=control)
    spec = PrismServiceSpec.model_validate(service["spec"])
    assert spec.budget.control == control
    assert spec.runtime.image == "registry.example/runtime:1"
    other = manifests.service(runtime_image="registry.example/runtime:1", budget_control="Auto")
    other["spec"]["budget"]["control"] = control
    other["metadata"]["name"] = {"Auto": "chat", "Off": "chat-held"}[control]
    assert service == other


def test_the_demos_objectives_are_those_of_the_example() -> None:
    spec = PrismServiceSpec.model_validate(manifests.service()["spec"])
    of_class = next(each for each in spec.classes if each.name == spec.default_class_name)
    assert (of_class.objectives.ttft_milliseconds, of_class.objectives.tpot_milliseconds) == (1500, 200)
