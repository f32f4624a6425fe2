"""The soak in small: what it finds is nothing, and it finds what there is."""

import pytest

from evidence.runtime_soak import SwitchingEngine, soak
from prism_runtime.engine.blocks import BlockPool, Context


def test_a_short_soak_leaks_nothing_fails_nobody_and_meets_cancels_bad_requests_and_switches() -> None:
    found = soak(requests=150, seed=1)
    assert (found.failed_requests, found.leaked_blocks, found.leaked_tasks) == (0, 0, 0)
    assert min(found.good, found.bad, found.cancelled, found.prompt_tokens_known) > 0
    assert found.switches == found.steps > 100


def test_a_soak_finds_blocks_that_are_not_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget_the_last_block(self: BlockPool, context: Context) -> None:
        self._drop(reversed(context.blocks[:-1]))
        context.blocks.clear()

    monkeypatch.setattr(BlockPool, "close", forget_the_last_block)
    assert soak(requests=8, seed=1).leaked_blocks > 0


def test_a_soak_finds_answers_that_are_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    step, calls = SwitchingEngine.step, iter(range(10**6))

    def failing(self: SwitchingEngine) -> object:
        if next(calls) == 3:
            raise RuntimeError("broken step")
        return step(self)

    monkeypatch.setattr(SwitchingEngine, "step", failing)
    assert soak(requests=40, seed=1).failed_requests > 0
