"""Fits of the published figures, kept between programs, on a tiny model."""

import gzip
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from evidence import refactor_fits
from evidence.refactor_fits import Fits
from prism_runtime.refactor.fit import RecipeSettings
from tests.runtime.letters import write_source

torch.set_num_threads(1)

SETTINGS = RecipeSettings(
    sub_experts=4, budgets_permille=(750, 500), fisher_samples=1, proposals=100, partition_rows=100, rank=2
)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint `tiny`, calibration and evaluation text."""
    folder = tmp_path_factory.mktemp("texts")
    write_source(folder)
    for name in ("calibration", "evaluation"):
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress((folder / "text.jsonl").read_bytes()))
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRISM_CACHE", str(tmp_path / "cache"))


def fits(texts: Path, *, refit: bool = False) -> Fits:
    console = Console(quiet=True)
    return Fits(texts / "tiny", texts, console, held=2, evaluation=4, fit=None, half=True, refit=refit)


def test_a_later_program_takes_the_same_recipe_without_fitting(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = fits(texts).recipe(SETTINGS)
    for name in ("calibrate_recipe", "fit_gated", "fit_budget"):
        monkeypatch.setattr(refactor_fits, name, lambda *_: pytest.fail("fitted again"))
    later = fits(texts)
    taken = later.recipe(SETTINGS)
    for one, other in zip(made.gates, taken.gates, strict=True):
        assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("weight", "bias", "token"))
        assert one.kappa == other.kappa
    for permille, point in made.points.items():
        assert torch.equal(point.log_tau, taken.points[permille].log_tau)
        pairs = zip(point.compensation or (), taken.points[permille].compensation or (), strict=True)
        assert all(torch.equal(one.u, other.u) and torch.equal(one.c, other.c) for one, other in pairs)
    with pytest.raises(pytest.fail.Exception, match="fitted again"):
        fits(texts, refit=True).recipe(SETTINGS)


def test_budgets_share_a_partition_and_rows_are_measured_in_it(texts: Path) -> None:
    small = fits(texts)
    both = small.recipe_rows(SETTINGS)
    assert [row.name for row in both] == ["prism-750", "prism-500"]
    assert both[0].realised > both[1].realised
    (alone,) = small.recipe_rows(replace(SETTINGS, budgets_permille=(500,)))
    assert alone.kl == pytest.approx(both[1].kl)


def test_another_seed_text_or_ingredient_is_another_recipe(texts: Path) -> None:
    small = fits(texts)
    one = small.recipe(SETTINGS).gates[0].weight
    for changed in (replace(SETTINGS, seed=1), replace(SETTINGS, metric="identity"), replace(SETTINGS, sub_experts=2)):
        other = small.recipe(changed).gates[0].weight
        assert one.shape != other.shape or not torch.equal(one, other)
    assert not torch.equal(one, small.recipe(SETTINGS, without=("d0",)).gates[0].weight)


def test_the_recipe_sees_nothing_of_the_domains_that_are_left_out(texts: Path) -> None:
    small = fits(texts)
    assert {each.domain for each in [*small.fit_text(0, ("d0",)), *small.held_text(("d0",))]} == {"d1"}
