"""The part of `make lint` that no linter does: the chart, host names, and the size of files.

python -m tests.lint
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from tests.localcluster import binaries
from tests.localcluster.failure import ClusterError

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "helm/prism"
KUBERNETES = binaries.KUBERNETES.removeprefix("v")
LONGEST_FILE = 450
FOREIGN_HOSTS = re.compile(r"(pypi|pythonhosted|golang|npmjs|crates|maven|debian)\.(org|io|com)", re.IGNORECASE)
"""Registries are configured on the machine; a file that names one breaks wherever another is used."""
HOSTS_ALLOWED_IN = ("tests/localcluster/modules/", "examples/model/", "tests/lint.py")


def tracked_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.splitlines() if (ROOT / name).is_file()]


def chart_problems() -> Iterator[str]:
    """helm lint, and every rendered object against the schemas of the Kubernetes version it is for."""
    helm = str(binaries.path("helm"))
    lint = subprocess.run([helm, "lint", "--strict", str(CHART)], capture_output=True, text=True, check=False)
    if lint.returncode:
        yield f"helm lint: {lint.stdout}{lint.stderr}"
    rendered = subprocess.run(
        [helm, "template", "prism", str(CHART), "--namespace", "prism-system", "--set", "tenantNamespaces={demo}"],
        capture_output=True,
        text=True,
        check=False,
    )
    if rendered.returncode:
        yield f"helm template: {rendered.stderr}"
        return
    argv = [str(Path(sys.executable).with_name("kubernetes-validate")), "--strict", "-k", KUBERNETES, "-"]
    validate = subprocess.run(argv, input=rendered.stdout, capture_output=True, text=True, check=False)
    if validate.returncode:
        yield f"kubernetes-validate: {validate.stdout}{validate.stderr}"


def host_problems(names: list[str]) -> Iterator[str]:
    for name in names:
        if name.startswith(HOSTS_ALLOWED_IN) or name.endswith((".safetensors", ".jsonl", ".gz", ".png")):
            continue
        text = (ROOT / name).read_text(errors="replace")
        yield from (f"{name}: names the host {match.group()}" for match in FOREIGN_HOSTS.finditer(text))


def size_problems(names: list[str]) -> Iterator[str]:
    for name in names:
        if name.endswith(".py"):
            lines = len((ROOT / name).read_text().splitlines())
            if lines > LONGEST_FILE:
                yield f"{name}: {lines} lines; split it by job"


def main() -> int:
    try:
        binaries.build(Console(stderr=True), only=("helm",))
    except ClusterError as error:
        print(error, file=sys.stderr)
        return 1
    names = tracked_files()
    problems = [*chart_problems(), *host_problems(names), *size_problems(names)]
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"chart, host names, file sizes: {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
