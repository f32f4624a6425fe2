"""The layout must not break Python: a package called `operator` at the root would shadow the standard library's."""

import operator
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_operator_is_the_standard_librarys() -> None:
    assert Path(operator.__file__).parent == Path(sysconfig.get_paths()["stdlib"])


def test_operator_is_the_standard_librarys_when_python_starts_in_the_repository_root() -> None:
    code = "import operator, collections; print(operator.__file__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert Path(found.strip()).parent == Path(sysconfig.get_paths()["stdlib"])


def test_import_roots_are_no_packages_themselves() -> None:
    for root in ("operator", "runtime", "crds"):
        assert not (ROOT / root / "__init__.py").exists(), f"remove {root}/__init__.py"


def test_operator_extra_does_not_bring_torch() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert not any(requirement.startswith(("torch", "transformers", "triton")) for requirement in extras["operator"])


def test_operator_imports_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\n"
        "import prism_operator.__main__, prism_operator.handlers"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_lock_pins_every_requirement_exactly_and_names_no_host() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line for line in lines if line and not line.lstrip().startswith("#")]
    assert len(pins) > 50
    assert [line for line in pins if not re.match(r"^[a-z0-9._-]+==\S+( ; .+)?$", line)] == []
    assert "://" not in "".join(lines)


def test_every_directory_of_the_architecture_has_its_job_in_one_line() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    folders = {
        "/".join(Path(name).parts[:depth])
        for name in tracked.split()
        for depth in (1, 2)
        if len(Path(name).parts) > depth
    }
    hidden = {folder for folder in folders if folder.startswith(".")}
    missing = sorted(folder for folder in folders - hidden if f"`{folder}/`" not in text)
    assert missing == []
