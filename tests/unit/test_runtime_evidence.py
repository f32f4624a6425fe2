"""Figures of the runtime are the worst of what was timed, and say why where there is none."""

from types import SimpleNamespace
from typing import Any

import pytest

from evidence import runtime
from evidence.runtime import COLLECTORS, collect

LAYER = {
    1: {"transformers": 4.0, "cpp.half": 1.5, "cpp.full": 2.5, "torch.half": 3.0, "torch.full": 5.0},
    8: {"transformers": 30.0, "cpp.half": 5.0, "cpp.full": 10.0, "torch.half": 17.5, "torch.full": 25.0},
}
EMBEDDED = {8: {"generate": 3.0, "batching": 4.0, "full": 2.0}, 32: {"generate": 9.0, "batching": 8.0, "full": 5.0}}
LARGER = {
    8: {"generate": 8.0, "batching": 7.0, "full": 4.0, "half": 2.0},
    32: {"generate": 9.0, "batching": 30.0, "full": 6.0, "half": 4.0},
}


def runs(**changes: Any) -> Any:
    taken = {"layer": [LAYER], "embedded": [EMBEDDED], "larger": [LARGER], "spilled": [0, 8, 0]}
    return SimpleNamespace(**(taken | {"architectures": {}} | changes))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layer.half_over_full.cpp", 0.6),
        ("layer.half_over_full.torch", 0.7),
        ("layer.speedup_over_transformers.cpp", 1.6),
        ("engine.over_generate.b8", 1.5),
        ("engine.over_generate.b32", 1.5),
        ("engine.over_continuous_batching.b8", 1.75),
        ("engine.over_continuous_batching.b32", 1.6),
        ("engine.half_over_full", 1.5),
        ("aot.kernels", 3),
        ("aot.spills", 1),
    ],
)
def test_a_figure_is_the_worst_of_its_shapes_and_models(
    name: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime.bench.cpu_moe, "available", lambda: True)
    assert collect(name, runs()).value == value


def test_rounds_give_an_interval() -> None:
    figure = collect("engine.half_over_full", runs(larger=[LARGER, {8: {"full": 4.0, "half": 2.0}}]))
    assert figure.low is not None
    assert figure.high is not None
    assert figure.low < 1.75 < figure.high


def test_without_compiled_code_its_figures_are_null_and_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.bench.cpu_moe, "available", lambda: False)
    figure = collect("layer.half_over_full.cpp", runs())
    assert figure.value is None
    assert "no C compiler" in str(figure.why)
    assert collect("layer.half_over_full.torch", runs()).value == 0.7


def test_architectures_count_that_pass_both_tests() -> None:
    passed = {f"{runtime.SAME_LOGITS}[a]": "passed", f"{runtime.SAME_TOKENS}[a]": "passed"}
    half = {f"{runtime.SAME_LOGITS}[b]": "passed", f"{runtime.SAME_TOKENS}[b]": "failed"}
    assert collect("equal.architectures", runs(architectures=passed | half)).value == 1
    assert collect("equal.architectures", runs(architectures=half)).value is None


def test_every_figure_of_the_runtime_has_a_collector() -> None:
    assert list(COLLECTORS) == [
        *("layer.half_over_full.cpp", "layer.half_over_full.torch"),
        *("layer.threshold_over_full.t1", "layer.threshold_over_full.t8", "layer.threshold_over_full.t32"),
        "layer.speedup_over_transformers.cpp",
        *("layer.two_threads.t1", "layer.two_threads.t8", "layer.two_threads.t32"),
        *("engine.over_generate.b8", "engine.over_generate.b32"),
        *("engine.over_continuous_batching.b8", "engine.over_continuous_batching.b32", "engine.half_over_full"),
        *("goodput.over_fifo", "goodput.over_paper_policy"),
        *("goodput.in_virtual_time.over_fifo", "goodput.in_virtual_time.over_paper_policy"),
        *("soak.requests", "soak.failed_requests", "soak.leaked_blocks", "soak.rss_growth_megabytes"),
        *("aot.kernels", "aot.spills", "equal.architectures"),
    ]


def test_replays_give_one_ratio_a_seed_over_all_traces_and_a_soak_gives_its_counts() -> None:
    def outcome(goodput: float) -> SimpleNamespace:
        return SimpleNamespace(goodput=goodput)

    replays = [
        {"slack": {"a": outcome(3.0), "b": outcome(1.0)}, "fifo": {"a": outcome(1.0), "b": outcome(own)}}
        for own in (1.0, 3.0)
    ]
    for name, given in (("goodput.over_fifo", "paced"), ("goodput.in_virtual_time.over_fifo", "replays")):
        figure = collect(name, runs(**{given: replays}))
        assert figure.value == 1.5
        assert figure.low is not None
        assert figure.seeds == runtime.REPLAY_SEEDS
    assert collect("soak.leaked_blocks", runs(soak={"leaked_blocks": 0})).value == 0
