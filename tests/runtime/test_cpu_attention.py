"""The compiled attention over blocks against the definition, and its place in the model."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prism_runtime.engine import attention_hook
from prism_runtime.engine.prefix_cache import BLOCK_TOKENS
from prism_runtime.kernels import cpu_attention
from tests.runtime.models import ARCHITECTURES, chunk, prompts, tiny_engine

Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float, Tensor | None]


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    assert cpu_attention.available(), "no C compiler: install gcc"


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Random shapes, odd widths among them; rows of different lengths, some behind a sliding window."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    rows, groups, each, per_row = (draw(st.integers(1, most)) for most in (3, 3, 3, 4))
    key_width, value_width = draw(st.sampled_from([(16, 16), (12, 12), (24, 40), (64, 64), (80, 96)]))
    blocks = rows * per_row + 2

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    keys = random(blocks, BLOCK_TOKENS, groups, key_width).to(dtype)
    values = random(blocks, BLOCK_TOKENS, groups, value_width).to(dtype)
    tables = torch.randperm(blocks, generator=generator)[: rows * per_row].view(rows, per_row)
    mask = torch.full((rows, per_row * BLOCK_TOKENS), torch.finfo(dtype).min, dtype=dtype)
    for row in range(rows):
        end = draw(st.integers(1, per_row * BLOCK_TOKENS))
        mask[row, max(0, end - draw(st.sampled_from([8, 20, 999]))) : end] = 0
    sinks = random(groups * each) if draw(st.booleans()) else None
    return random(rows, groups * each, key_width).to(dtype), keys, values, tables, mask, 0.3, sinks


def by_definition(
    query: Tensor, keys: Tensor, values: Tensor, tables: Tensor, mask: Tensor, scale: float, sinks: Tensor | None
) -> Tensor:
    """In double precision, over copies of the rows' blocks."""
    each = query.shape[1] // keys.shape[2]
    copied = [store[tables].flatten(1, 2).transpose(1, 2).double() for store in (keys, values)]
    own_keys, own_values = (one.repeat_interleave(each, 1) for one in copied)
    scores = torch.einsum("bhw,bhtw->bht", query.double(), own_keys) * scale + mask.double()[:, None]
    if sinks is not None:
        scores = torch.cat((scores, sinks.double()[None, :, None].expand(len(query), -1, 1)), -1)
    return torch.einsum("bht,bhtv->bhv", scores.softmax(-1)[..., : mask.shape[1]], own_values)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_attention_over_blocks_is_softmax_attention_over_their_tokens(case: Case) -> None:
    tolerance = 1e-5 if case[1].dtype == torch.float32 else 2e-2
    torch.testing.assert_close(
        cpu_attention.attend(*case).double(), by_definition(*case), atol=tolerance, rtol=tolerance
    )


@settings(max_examples=50, deadline=None)
@given(cases(), st.data())
def test_a_row_gives_the_same_bits_in_any_company(case: Case, data: st.DataObject) -> None:
    query, keys, values, tables, mask, scale, sinks = case
    row = data.draw(st.integers(0, len(query) - 1))
    alone = cpu_attention.attend(query[[row]], keys, values, tables[[row]], mask[[row]], scale, sinks)
    assert torch.equal(cpu_attention.attend(*case)[row], alone[0])


@settings(max_examples=50, deadline=None)
@given(cases())
def test_blocks_that_no_row_may_read_are_not_read(case: Case) -> None:
    query, keys, values, tables, mask, scale, sinks = case
    expected = cpu_attention.attend(*case)
    unread = (mask.view(*tables.shape, BLOCK_TOKENS) < -1e30).all(-1)
    keys[tables[unread]] = values[tables[unread]] = torch.nan
    assert torch.equal(cpu_attention.attend(query, keys, values, tables, mask, scale, sinks), expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decode_reads_in_place_what_copies_would_give(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def decoded() -> Tensor:
        engine, texts = tiny_engine(architecture), prompts([30, 5, 17])
        engine.model.logits([chunk(place, 0, text) for place, text in enumerate(texts)])
        return engine.model.logits([chunk(place, len(text), (7,)) for place, text in enumerate(texts)])

    in_place = decoded()
    plain = architecture in attention_hook.PLAIN
    assert bool(tiny_engine(architecture).model.cache.read_in_place) == plain
    monkeypatch.setattr(attention_hook, "PLAIN", ())
    copied = decoded()
    torch.testing.assert_close(in_place, copied, rtol=1e-4, atol=1e-4)
    assert torch.equal(in_place, copied) != plain
