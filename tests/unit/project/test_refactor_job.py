"""The example Job: valid, allowed under the restricted Pod Security Standard, and in step with the command line."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from prism_runtime.__main__ import build_parser

FOLDER = Path(__file__).parents[3] / "examples" / "refactor-job"
FILES = sorted(FOLDER.glob("*.yaml"))


def documents(path: Path) -> Iterator[dict[str, Any]]:
    yield from yaml.safe_load_all(path.read_text())


def pod_of(name: str) -> dict[str, Any]:
    (job,) = documents(FOLDER / name)
    pod: dict[str, Any] = job["spec"]["template"]["spec"]
    return pod


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_object_is_valid_for_the_kubernetes_version(path: Path) -> None:
    found = list(documents(path))
    assert found
    for document in found:
        kubernetes_validate.validate(document, "1.37", strict=True)


@pytest.mark.parametrize("name", ["shards.yaml", "merge.yaml"])
def test_pods_keep_the_restricted_pod_security_standard(name: str) -> None:
    pod = pod_of(name)
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert pod["automountServiceAccountToken"] is False


def test_every_completion_runs_its_own_shard_of_as_many() -> None:
    (job,) = documents(FOLDER / "shards.yaml")
    completions = job["spec"]["completions"]
    (argument,) = (each for each in pod_of("shards.yaml")["containers"][0]["args"] if each.startswith("--shard="))
    assert re.fullmatch(r"--shard=\$\(JOB_COMPLETION_INDEX\)/(\d+)", argument)
    for index in range(completions):
        spelt = argument.replace("$(JOB_COMPLETION_INDEX)", str(index))
        parsed = build_parser().parse_args(["refactor", "m", "--calibration", "t", spelt])
        assert parsed.shard == (index, completions)


def test_the_command_line_knows_the_arguments_and_merge_reads_where_the_shards_write() -> None:
    shards = pod_of("shards.yaml")["containers"][0]["args"]
    parsed = build_parser().parse_args([each.replace("$(JOB_COMPLETION_INDEX)", "0") for each in shards])
    merged = build_parser().parse_args(pod_of("merge.yaml")["containers"][0]["args"])
    assert merged.work == [parsed.work]


def test_the_guide_names_every_manifest() -> None:
    guide = (FOLDER.parents[1] / "docs" / "refactor-job.md").read_text()
    assert [path.name for path in FILES if path.name not in guide] == []
