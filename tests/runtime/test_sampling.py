"""Sampling: settings per request, draws that depend on nobody else."""

import math
from collections import Counter

import pytest
import torch

from prism_runtime.engine.sampler import History, sample
from prism_runtime.engine.types import Rejected, Sampling, Token
from tests.runtime.models import prompts, request, run, tiny_engine, tokens_of


def test_temperature_zero_is_the_argmax() -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    assert sample(logits, [Sampling(1, temperature=0.0)] * 5, [0.99] * 5) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("draw", [0.0, 0.5, math.nextafter(1.0, 0.0)])
def test_tiny_temperature_approaches_the_argmax_without_overflow(draw: float) -> None:
    logits = torch.tensor([[1.0, 30000.0, 29999.0]])
    assert sample(logits, [Sampling(1, temperature=1e-6)], [draw]) == [1]


def test_draws_follow_the_softmax_at_the_requests_temperature() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    draws = [(i + 0.5) / 3000 for i in range(3000)]
    counts = Counter(sample(logits.expand(3000, -1), [Sampling(1, temperature=2.0)] * 3000, draws))
    expected = (logits[0] / 2).softmax(-1)
    assert [counts[i] / 3000 for i in range(3)] == pytest.approx(expected.tolist(), abs=1e-3)


def test_top_p_keeps_the_smallest_set_that_reaches_it_and_never_less_than_one_token() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[None]
    draws = [(i + 0.5) / 400 for i in range(400)]

    def reached(top_p: float) -> set[int]:
        return set(sample(logits.expand(400, -1), [Sampling(1, top_p=top_p)] * 400, draws))

    assert reached(1e-9) == {0}
    assert reached(0.79) == {0, 1}
    assert reached(0.81) == {0, 1, 2}
    assert reached(1.0) == {0, 1, 2, 3}


def test_draw_next_to_one_never_falls_on_a_token_that_was_cut() -> None:
    logits = torch.zeros(1, 50)
    logits[0, 25:] = -50.0
    almost_one = math.nextafter(1.0, 0.0)
    assert sample(logits, [Sampling(1, top_p=0.5)], [almost_one])[0] < 25


def reached(logits: torch.Tensor, sampling: Sampling) -> set[int]:
    draws = [(i + 0.5) / 400 for i in range(400)]
    return set(sample(logits.expand(400, -1), [sampling] * 400, draws))


def test_top_k_keeps_the_most_likely_tokens_and_ties_with_the_last_of_them() -> None:
    logits = torch.tensor([0.4, 0.3, 0.15, 0.15]).log()[None]
    assert reached(logits, Sampling(1, top_k=1)) == {0}
    assert reached(logits, Sampling(1, top_k=3)) == {0, 1, 2, 3}
    assert reached(logits, Sampling(1, top_k=99)) == {0, 1, 2, 3}


def test_min_p_keeps_tokens_of_that_share_of_the_most_likely_one() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[None]
    assert reached(logits, Sampling(1, min_p=0.5)) == {0, 1}
    assert reached(logits, Sampling(1, min_p=0.2)) == {0, 1, 2}


def test_penalties_and_bias_change_even_a_greedy_choice_and_only_their_own_row() -> None:
    logits = torch.tensor([[2.0, 1.9, -1.0, -1.1]]).expand(6, -1)
    settings = [
        Sampling(1, temperature=0.0),
        Sampling(1, temperature=0.0, presence_penalty=0.2),
        Sampling(1, temperature=0.0, frequency_penalty=0.06),
        Sampling(1, temperature=0.0, repetition_penalty=1.1),
        Sampling(1, temperature=0.0, logit_bias=((3, 4.0),)),
        Sampling(1, temperature=0.0, frequency_penalty=0.06),
    ]
    twice, prompt_only = History(answer=(0, 0)), History(prompt=(0,))
    histories = [twice, twice, twice, prompt_only, twice, History(prompt=(0, 0, 0))]
    assert sample(logits, settings, [0.0] * 6, histories) == [0, 1, 1, 1, 3, 0]
    negative = torch.tensor([[-1.0, -1.05]])
    assert sample(negative, [Sampling(1, temperature=0.0, repetition_penalty=1.1)], [0.0], [prompt_only]) == [1]


def test_reported_probabilities_are_the_models_own_and_sum_to_one() -> None:
    engine = tiny_engine()
    engine.submit(request("plain", prompts([6])[0], max_tokens=4, temperature=0.0))
    engine.submit(
        request("biased", prompts([6])[0], max_tokens=4, temperature=0.0, top_logprobs=engine.vocabulary_size)
    )
    events = run(engine)
    plain = [e for e in events if isinstance(e, Token) and e.request_id == "plain"]
    asked = [e for e in events if isinstance(e, Token) and e.request_id == "biased"]
    assert all(token.log_probabilities is None for token in plain)
    for token in asked:
        found = token.log_probabilities
        assert found is not None
        assert sum(math.exp(logprob) for _, logprob in found.top) == pytest.approx(1.0, abs=1e-4)
        assert found.top[0] == (token.token_id, pytest.approx(found.token))


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("top_k", -1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("presence_penalty", math.inf),
        ("frequency_penalty", math.nan),
        ("logit_bias", ((10**6, 1.0),)),
        ("top_logprobs", -1),
    ],
)
def test_shaping_that_makes_no_sense_is_refused_by_name(parameter: str, value: object) -> None:
    with pytest.raises(Rejected) as refused:
        tiny_engine().submit(request("a", prompts([4])[0], max_tokens=2, **{parameter: value}))
    assert refused.value.parameter == parameter


def test_rows_keep_their_own_settings_in_one_batch() -> None:
    logits = torch.tensor([[0.6, 0.4]]).log().expand(3, -1)
    settings = [Sampling(1, temperature=0.0), Sampling(1, top_p=0.5), Sampling(1)]
    assert sample(logits, settings, [0.9, 0.9, 0.9]) == [0, 0, 1]


def test_seeded_request_draws_the_same_tokens_alone_and_in_any_batch() -> None:
    prompt, *others = prompts([12, 5, 20, 9])
    seeded = request("seeded", prompt, max_tokens=16, temperature=1.0, top_p=0.9, seed=7)
    alone = tiny_engine()
    alone.submit(seeded)
    crowded = tiny_engine(seed=99, prefill_tokens_per_step=10)
    for i, other in enumerate(others):
        crowded.submit(request(f"r{i}", other, max_tokens=16, temperature=1.0))
    crowded.submit(seeded)
    tokens = tokens_of(run(alone), "seeded")
    assert tokens == tokens_of(run(crowded), "seeded")
    assert len(set(tokens)) > 3


def test_requests_without_a_seed_follow_the_engines_seed() -> None:
    def tokens(seed: int) -> list[int]:
        engine = tiny_engine(seed=seed)
        engine.submit(request("a", prompts([6])[0], max_tokens=12, temperature=1.0))
        return tokens_of(run(engine), "a")

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)
