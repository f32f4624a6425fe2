"""How the figures of the refactoring engine are kept, chosen and written; the fits themselves are made elsewhere."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from evidence import refactor_ablation as ablation
from evidence import refactor_cache
from evidence import refactor_page as page
from evidence.pages import filled
from evidence.refactor_bytes import ByteFigures, prefix_counts
from evidence.refactor_cache import FITTING, FitCache, sources_of
from evidence.refactor_drift import DriftFigures, Served
from prism_runtime.refactor.elastic import ElasticMethod
from prism_runtime.refactor.stages import Output
from prism_runtime.refactor.text import TokenSequence

MODEL = "sha256:" + "5" * 64


@dataclass
class Fitting:
    """Counts how often something is fitted."""

    times: int = 0

    def __call__(self) -> Output:
        self.times += 1
        return Output({"tau": torch.tensor([float(self.times)])})


def taken(cache: FitCache, fitting: Fitting, **question: Any) -> float:
    return float(cache.take("point", question, fitting).tensors["tau"])


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


# -- fits that are kept ---------------------------------------------------------------------------------------------


def test_a_second_process_takes_the_fit_that_the_first_one_made(tmp_path: Path) -> None:
    fitting = Fitting()
    for _ in range(2):
        assert taken(FitCache(MODEL, folder=tmp_path), fitting, seed=0) == 1
    assert fitting.times == 1


def test_another_question_or_model_is_another_fit(tmp_path: Path) -> None:
    fitting = Fitting()
    taken(FitCache(MODEL, folder=tmp_path), fitting, seed=0)
    taken(FitCache(MODEL, folder=tmp_path), fitting, seed=1)
    taken(FitCache("sha256:" + "6" * 64, folder=tmp_path), fitting, seed=0)
    assert fitting.times == len(files(tmp_path)) == 3


def test_refit_makes_a_fit_again_but_once_a_process(tmp_path: Path) -> None:
    fitting = Fitting()
    taken(FitCache(MODEL, folder=tmp_path), fitting, seed=0)
    again = FitCache(MODEL, refit=True, folder=tmp_path)
    assert [taken(again, fitting, seed=0) for _ in range(2)] == [2, 2]
    assert taken(FitCache(MODEL, folder=tmp_path), fitting, seed=0) == 2


def test_changed_code_fits_again_and_the_newest_versions_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitting = Fitting()
    taken(FitCache(MODEL, folder=tmp_path), fitting, seed=1)
    for version in range(5):
        monkeypatch.setattr(refactor_cache, "code_digest", lambda _, version=version: f"code {version}")
        assert taken(FitCache(MODEL, folder=tmp_path), fitting, seed=0) == version + 2
        os.utime(max(files(tmp_path), key=lambda path: path.stat().st_mtime_ns), ns=(version, version))
    assert len(files(tmp_path)) == 1 + refactor_cache.VERSIONS_KEPT  # the other question's, and the newest of this one
    assert taken(FitCache(MODEL, folder=tmp_path), fitting, seed=0) == 6
    monkeypatch.setattr(refactor_cache, "code_digest", lambda _: "code 0")
    assert taken(FitCache(MODEL, folder=tmp_path), fitting, seed=0) == 7


def test_a_damaged_fit_is_made_again(tmp_path: Path) -> None:
    fitting = Fitting()
    taken(FitCache(MODEL, folder=tmp_path), fitting, seed=0)
    (path,) = files(tmp_path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert taken(FitCache(MODEL, folder=tmp_path), fitting, seed=0) == 2


def test_the_code_of_a_fit_is_all_that_fits_and_nothing_that_reports() -> None:
    names = {path.name for path in sources_of(FITTING)}
    assert {"fit.py", "paper.py", "swap.c", "compensation.py", "ridge.py", "selection.py"} <= names
    assert not {"report.py", "points.py", "bytes.py", "evaluate.py"} & names


# -- weight bytes ---------------------------------------------------------------------------------------------------


class MadeUpRatios(ByteFigures):
    """Ratios by seed in place of a model."""

    def __init__(self, ratios: Sequence[dict[str, float]]) -> None:
        self._found = ratios

    def _ratios(self, batch: int, seed: int) -> dict[str, float]:
        return self._found[seed]


def test_the_best_selection_is_the_same_for_all_seeds() -> None:
    figures = MadeUpRatios([{"token": 9.0, "step": 10.0}, {"token": 12.0, "step": 8.0}])
    assert figures.best(8, (0, 1)) == [9.0, 12.0]


def test_a_selection_that_one_seed_does_not_show_is_not_the_best() -> None:
    figures = MadeUpRatios([{"token": 9.0, "step": 10.0}, {"step": 8.0}])
    assert figures.best(8, (0, 1)) == [10.0, 8.0]
    assert figures.over("token", 8, (0, 1)) == [9.0, None]
    assert MadeUpRatios([{}, {}]).best(8, (0, 1)) == [None, None]


# -- drift ----------------------------------------------------------------------------------------------------------


@dataclass
class DriftingModel:
    """Runs a share of the neurons that falls with the threshold, and a fifth more than nominal at shift 0."""

    nominal: float
    shifts: list[float] = field(default_factory=list)

    def forward(self, method: ElasticMethod, sequence: TokenSequence) -> tuple[float, float]:
        self.shifts.append(float(method.log_tau[0]))
        share = self.nominal * 1.2 * (1 - 0.8 * self.shifts[-1])
        return 1000 * share * len(sequence.ids), 1000.0 * len(sequence.ids)


def realised(model: DriftingModel, *, guarded: bool) -> float:
    figures = DriftFigures.__new__(DriftFigures)
    figures._forward = model.forward  # type: ignore[method-assign]
    text = [TokenSequence("unseen", (1,) * 256)] * 56
    return figures._realised(ElasticMethod([], torch.zeros(1)), text, model.nominal, guarded=guarded)


def test_the_guard_corrects_between_forwards_and_the_start_counts() -> None:
    model = DriftingModel(0.5)
    found = realised(model, guarded=True)
    assert model.shifts[0] == 0
    assert model.shifts[-1] == pytest.approx((1 - 1 / 1.2) / 0.8, abs=0.01)
    assert 1.001 < found < 1.03


def test_without_the_guard_the_text_s_own_budget_is_realised() -> None:
    assert realised(DriftingModel(0.25), guarded=False) == pytest.approx(1.2)


def test_the_error_of_a_rotation_is_its_largest_to_either_side() -> None:
    served = [Served("a", 500, 10, 1.004, 1.05), Served("b", 500, 10, 0.99, 1.01)]
    figures = SimpleNamespace(served=lambda rotation: served)
    errors = [DriftFigures.errors(figures, (0, 1), guarded=guarded) for guarded in (True, False)]  # type: ignore[arg-type]
    assert errors == [pytest.approx([10, 10]), pytest.approx([50, 50])]


# -- ablation -------------------------------------------------------------------------------------------------------


def test_no_two_rows_of_the_ablation_say_the_same() -> None:
    said = [json.dumps(variant.ingredients(), sort_keys=True) for variant in ablation.VARIANTS.values()]
    assert len(set(said)) == len(said)


def test_a_row_changes_what_its_name_says_and_nothing_else() -> None:
    recipe = ablation.VARIANTS["recipe"].ingredients()

    def changed(name: str) -> dict[str, Any]:
        found = ablation.VARIANTS[name].ingredients()
        return {key: value for key, value in found.items() if value != recipe[key]}

    assert changed("metric.identity") == {"metric": "identity"}
    assert changed("partition.random") == {"partition": "random"}
    assert changed("granularity.8") == {"sub_experts": 8}
    assert changed("gate.oracle") == {"gate": "oracle", "compensation": "none"}


def test_rows_are_taken_seed_by_seed_and_others_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, order = tmp_path / "ablation.json", []

    def take(name: str, seed: int, fits: Any) -> ablation.Taken:
        order.append((seed, name))
        if seed == 2:
            raise KeyboardInterrupt
        return ablation.Taken(0.004 + 0.001 * seed, 0.5, 10.0 - seed)

    monkeypatch.setattr(ablation, "take", take)
    kept = ablation.row_of("metric.identity", [ablation.Taken(0.006, 0.5, 8.0)] * 3, (0, 1, 2))
    ablation.merge_row(path, kept)
    with pytest.raises(KeyboardInterrupt):
        ablation.run(None, ["recipe", "granularity.8"], (0, 1, 2), print, path)  # type: ignore[arg-type]
    assert order[:3] == [(0, "recipe"), (0, "granularity.8"), (1, "recipe")]
    rows = json.loads(path.read_text())
    assert [row["id"] for row in rows] == ["ablation.recipe", "ablation.metric.identity", "ablation.granularity.8"]
    assert rows[0]["seeds"] == [0, 1]
    assert rows[0]["value"] == pytest.approx(4.5)
    assert rows[0]["low"] < 4 < 5 < rows[0]["high"]
    assert rows[0]["topk_over"]["value"] == pytest.approx(9.5)
    assert rows[1] == json.loads(json.dumps(kept))


def test_a_row_with_one_seed_has_no_interval() -> None:
    row = ablation.row_of("recipe", [ablation.Taken(0.004, 0.5, 10.0)], (0,))
    assert (row["value"], row["low"], row["high"]) == (4.0, None, None)
    assert replace(ablation.VARIANTS["recipe"], oracle=True) == ablation.VARIANTS["gate.oracle"]


# -- the page -------------------------------------------------------------------------------------------------------


def test_the_page_holds_the_figures_of_the_evidence(capsys: pytest.CaptureFixture[str]) -> None:
    assert page.main(["--check"]) == 0, capsys.readouterr().out


def test_a_figure_is_shown_with_its_interval_and_one_that_was_not_taken_says_so() -> None:
    taken = {"value": 10.6784, "low": 10.4622, "high": 10.8945, "unit": "ratio"}
    lines = page.figure_table({"kl.topk_over_prism.b500": taken})
    assert "| the same at 50 % (`kl.topk_over_prism.b500`) | 10.6784 | 10.4622 to 10.8945 | ratio |" in lines
    assert any(line.endswith("(`kl.prism.b500`) | not taken | | |") for line in lines)
    shares = {"bytes.b500.batch8.topk_share": taken | {"value": 0.71, "low": None}}
    assert page.byte_table(shares | {"bytes.b500.batch8.kl_topk_over.step": taken})[2] == (
        "| 8 | 0.71 | not taken | 10.68 (10.46 to 10.89) | not taken |"
    )


def test_what_a_row_changes_is_bold_and_the_recipe_s_own_is_not() -> None:
    taken = [ablation.Taken(0.004, 0.5, 10.0)]
    rows = [ablation.row_of(name, taken, (0,)) for name in ("recipe", "metric.identity")]
    recipe, identity = page.ablation_table(rows)[2:]
    assert "**" not in recipe
    assert identity == recipe.replace("| fisher |", "| **identity** |")
    assert recipe.endswith("| 4.00 | 10.00 | 1 |")


def test_a_page_without_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match="no block 'bytes'"):
        filled("# Page", page.PROGRAM, {"bytes": []})


def test_a_prefix_between_two_whole_ones_is_larger_in_the_first_layers() -> None:
    counts = prefix_counts(15.5, layers=4, top_k=2)
    assert counts.tolist() == [[16, 16], [16, 16], [15, 15], [15, 15]]
    assert prefix_counts(11.0, layers=3, top_k=1).tolist() == [[11], [11], [11]]
