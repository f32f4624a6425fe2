"""Compiled code: once a machine, safe for processes at the same time, and never a reason to fail."""

import ctypes
import multiprocessing
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from prism_runtime import native
from prism_runtime.kernels import cpu_attention, cpu_gating, cpu_moe, triton_launcher
from prism_runtime.refactor import swap

HAS_COMPILER = any(map(shutil.which, ("cc", "gcc", "clang")))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C compiler here")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native.library.cache_clear()
    yield
    native.library.cache_clear()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "answer.c"
    path.write_text("int answer(void) { return 42; }\n")
    return path


def answer(source: Path) -> int:
    library = native.library(source)
    assert isinstance(library, ctypes.CDLL)
    return int(library.answer())


def libraries() -> list[Path]:
    return sorted(native.cache_folder().iterdir())


@needs_compiler
def test_a_source_is_compiled_once_and_again_when_it_changes(source: Path) -> None:
    assert answer(source) == 42
    (first,) = libraries()
    written = first.stat().st_mtime_ns
    native.library.cache_clear()
    assert answer(source) == 42
    assert libraries() == [first]
    assert first.stat().st_mtime_ns == written
    source.write_text("int answer(void) { return 43; }\n")
    native.library.cache_clear()
    assert answer(source) == 43
    assert len(libraries()) == 2


@needs_compiler
def test_processes_that_compile_at_the_same_time_leave_one_whole_library(source: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert pool.map_async(answer, [source] * 3).get(timeout=120) == [42] * 3
    assert len(libraries()) == 1


@pytest.mark.parametrize("compiler", ["/nonexistent/cc", "false"])
def test_a_compiler_that_does_not_work_is_told_and_does_no_harm(
    compiler: str, source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", compiler)
    assert native.library(source) is None
    assert f"answer.c cannot be compiled with {compiler}, it runs in" in caplog.text


@needs_compiler
def test_an_error_of_the_compiler_is_told_in_its_words(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    source.write_text("int answer(void) { return forty_two; }\n")
    assert native.library(source) is None
    assert "forty_two" in caplog.text
    assert libraries() == []


def test_without_any_compiler_there_is_no_library(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert native.library(source) is None
    assert "no C compiler" in caplog.text


@needs_compiler
def test_a_cache_that_cannot_be_written_does_no_harm(source: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert native.library(source) is None


@needs_compiler
def test_what_was_compiled_beforehand_needs_no_compiler_until_its_source_changes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "PROGRAMS", {source: native.SAME_BITS})
    monkeypatch.setattr(native, "COMPILED", tmp_path / "compiled")
    assert native.main([str(tmp_path / "compiled")]) == 0
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    caplog.set_level("INFO")
    assert answer(source) == 42
    assert [record.processor for record in caplog.records] == [native.levels()[0].name]
    source.write_text("int answer(void) { return 43; }\n")
    native.library.cache_clear()
    assert native.library(source) is None


@needs_compiler
def test_a_program_that_does_not_compile_fails_the_build(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source.write_text("int answer(void) { return forty_two; }\n")
    monkeypatch.setattr(native, "PROGRAMS", {source: ()})
    assert native.main([str(tmp_path / "compiled")]) == 1
    assert "forty_two" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (frozenset(), ["portable"]),
        (native.LEVELS["x86_64"][2].needs, ["avx2", "portable"]),
        (native.LEVELS["x86_64"][1].needs, ["avx512", "avx2", "portable"]),
        (native.LEVELS["x86_64"][0].needs | {"amx_bf16"}, ["avx512-bf16", "avx512", "avx2", "portable"]),
    ],
)
def test_a_processor_takes_the_levels_that_it_has_best_first(
    flags: frozenset[str], names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "processor_flags", lambda: flags)
    monkeypatch.setattr(native.platform, "machine", lambda: "x86_64")
    assert [level.name for level in native.levels()] == names
    monkeypatch.setattr(native.platform, "machine", lambda: "aarch64")
    assert [level.name for level in native.levels()] == ["portable"]


def test_every_c_file_of_the_package_is_compiled_beforehand_as_it_is_asked_for() -> None:
    asked = {module.SOURCE: module.FLAGS for module in (cpu_attention, cpu_gating, cpu_moe)}
    assert asked | {swap.SOURCE: native.SAME_BITS} == native.PROGRAMS
    assert set(native.PACKAGE.rglob("*.c")) == set(native.PROGRAMS)


@needs_compiler
def test_triton_takes_its_launcher_as_it_was_compiled_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(native, "COMPILED", tmp_path)
    monkeypatch.setattr(triton.knobs.build, "impl", None)
    assert not triton_launcher.use_compiled()
    assert triton_launcher.main([str(tmp_path)]) == 0
    assert triton_launcher.use_compiled()
    (ready,) = tmp_path.iterdir()
    assert triton.knobs.build.impl("cuda_utils", "driver.c", str(tmp_path), [], [], []) == str(ready)
    with pytest.raises(RuntimeError, match="wants to compile 'other'"):
        triton.knobs.build.impl("other", "other.c", str(tmp_path), [], [], [])
