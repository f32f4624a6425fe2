"""Pure steps of the offline engine: text, partition, points, quality."""

import gzip
import json
from decimal import Decimal
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prism_api.manifest import Divergence
from prism_runtime.refactor.evaluate import PointQuality, clustered_mean
from prism_runtime.refactor.memory import lockstep_bytes, lockstep_sequences
from prism_runtime.refactor.partition import (
    Partition,
    Saliency,
    allocate_prefixes,
    by_energy,
    invert,
    rank_energy,
)
from prism_runtime.refactor.prefixes import prefix_counts, strictly_rising
from prism_runtime.refactor.request import RecipeRefused
from prism_runtime.refactor.text import Document, TextRefused, cut_sequences, hold_out, read_documents, spread


def quality(mean: float, standard_error: float = 0.0) -> PointQuality:
    return PointQuality(Divergence(mean=mean, standard_error=standard_error, p99=0, tokens=1), 1.0, 1000, {})


def saliency(experts: int = 3, neurons: int = 16) -> Saliency:
    generator = torch.Generator().manual_seed(0)
    energy, power = torch.rand(2, experts, neurons, generator=generator)
    ranked = torch.rand(2, experts, neurons, generator=generator)
    return Saliency(energy, ranked, power, torch.ones(experts, dtype=torch.int64))


def test_partition_is_a_bijection_and_its_inverse_undoes_it() -> None:
    perm = by_energy(saliency().energy)
    assert torch.equal(perm.sort(1).values, torch.arange(16, dtype=torch.int32).expand(3, -1))
    assert torch.equal(perm.long().gather(1, invert(perm)), torch.arange(16).expand(3, -1))


def test_sub_experts_descend_in_energy_and_keep_all_of_it() -> None:
    measured = saliency()
    partition = Partition.of(by_energy(measured.energy), measured, 4)
    assert (partition.energy.diff(dim=1) <= 0).all()
    torch.testing.assert_close(partition.energy.sum(1), measured.energy.sum(1))
    torch.testing.assert_close(partition.prior.square().sum(1), measured.power.sum(1))


def test_neurons_of_equal_energy_keep_the_order_of_the_source() -> None:
    assert torch.equal(by_energy(torch.ones(2, 8)), torch.arange(8, dtype=torch.int32).expand(2, -1))


def test_rank_energy_follows_the_permutation_and_keeps_all_of_it() -> None:
    measured = saliency()
    partition = Partition.of(by_energy(measured.energy), measured, 4)
    energy = rank_energy(measured, partition)
    first = measured.ranked[1, :, :].gather(1, partition.perm.long()).view(3, 4, 4).sum((0, 2))
    torch.testing.assert_close(energy[1], first)
    torch.testing.assert_close(energy.sum(1), measured.ranked.sum((1, 2)))


@given(st.lists(st.lists(st.floats(0, 10), min_size=4, max_size=4), min_size=1, max_size=4), st.data())
def test_allocated_prefixes_spend_the_budget_nest_and_lose_least_energy(rows: list[list[float]], data: Any) -> None:
    energy = torch.tensor([sorted(row, reverse=True) for row in rows])
    ranks = len(rows)
    cells = data.draw(st.integers(1, 4 * ranks))
    counts = allocate_prefixes(energy, cells)
    assert sum(counts) == cells
    assert counts[0] >= 1
    assert all(0 <= count <= 4 for count in counts)
    if cells > 1:
        assert all(less <= more for less, more in zip(allocate_prefixes(energy, cells - 1), counts, strict=True))

    def kept(of: tuple[int, ...]) -> float:
        return sum(float(energy[rank, :count].sum()) for rank, count in enumerate(of))

    others = (c for c in product(range(5), repeat=ranks) if c[0] >= 1 and sum(c) == cells)
    assert kept(tuple(counts)) >= max(map(kept, others)) - 1e-4


def test_standard_error_counts_sequences_within_domains() -> None:
    mean, error, by_domain = clustered_mean([1.0, 3.0, 10.0, 10.0, 10.0], ["a", "a", "b", "b", "b"])
    assert by_domain == {"a": 2.0, "b": 10.0}
    assert mean == 6.0
    assert error == pytest.approx(0.5)  # variance of a's mean is 2 / 2 = 1, of b's 0; half of each mean counts


def test_domain_with_one_sequence_has_no_standard_error_and_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 2 sequences of every domain; \['b'\] have 1"):
        clustered_mean([1.0, 2.0, 3.0], ["a", "a", "b"])


def test_quality_is_cut_to_four_digits_and_its_bound_uses_the_standard_error() -> None:
    assert quality(0.1).relative_quality == Decimal("0.9048")  # exp(-0.1) is 0.904837
    assert quality(0.1, 0.01).relative_quality_low == Decimal("0.8872")  # exp(-0.1196) is 0.887275
    assert quality(-1e-9).relative_quality == 1


def test_only_points_of_strictly_rising_quality_stay_on_the_ladder() -> None:
    measured = {250: quality(0.5), 500: quality(0.2), 625: quality(0.2), 750: quality(0.1), 1000: quality(0.0)}
    assert strictly_rising(measured) == [250, 625, 750, 1000]
    assert strictly_rising({500: quality(0.0), 1000: quality(0.0)}) == [1000]


def test_default_budgets_are_the_multiples_of_one_sub_expert_from_a_quarter_up() -> None:
    assert prefix_counts(None, 8) == {250: 2, 375: 3, 500: 4, 625: 5, 750: 6, 875: 7, 1000: 8}
    assert prefix_counts([125], 8) == {125: 1, 1000: 8}


def test_budget_that_no_number_of_sub_experts_gives_is_refused_with_those_that_do() -> None:
    with pytest.raises(RecipeRefused, match=r"\[600\] are no multiples .* possible: \[250, 500, 750, 1000\]"):
        prefix_counts([600, 500], 4)


def test_documents_are_read_from_jsonl_plain_text_and_gzip(tmp_path: Path) -> None:
    lines = json.dumps({"text": "a", "domain": "d", "licence": "l"}) + "\n" + json.dumps({"text": "b"}) + "\n"
    (tmp_path / "t.jsonl").write_text(lines)
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "t.txt").write_text(lines)
    wanted = [Document("a", "d", "l"), Document("b")]
    assert read_documents(tmp_path / "t.jsonl") == read_documents(tmp_path / "t.jsonl.gz") == wanted
    assert read_documents(tmp_path / "t.txt") == [Document(lines)]


def test_plain_text_is_cut_into_documents_at_line_ends_and_nothing_is_lost(tmp_path: Path) -> None:
    text = "".join(f"line {i} of a book\n" for i in range(2000)) + "the end"
    (tmp_path / "book.txt").write_text(text)
    documents = read_documents(tmp_path / "book.txt")
    assert "".join(document.text for document in documents) == text
    assert all(document.text.endswith("\n") for document in documents[:-1])
    assert len(documents) == 7
    assert len(hold_out(documents)[1]) == 1


def test_more_points_than_a_ladder_holds_are_refused() -> None:
    with pytest.raises(RecipeRefused, match="64 sub-experts give 49 points, a ladder holds 32; use --points"):
        prefix_counts(None, 64)
    assert len(prefix_counts([500, 750], 64)) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", b'{"text": "a"}\n{"body": "b"}\n', r"t.jsonl' line 2 must be an object with a string 'text'"),
        ("t.jsonl.gz", b"not gzip", "t.jsonl.gz' cannot be read as UTF-8 text"),
        ("t.txt", b"\xff\xfe", "t.txt' cannot be read as UTF-8 text"),
    ],
)
def test_unreadable_text_is_refused_with_file_and_reason(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextRefused, match=message):
        read_documents(tmp_path / name)


def test_held_out_documents_are_disjoint_and_cover_every_domain() -> None:
    documents = [Document(f"{domain}{i}", domain) for domain in "ab" for i in range(8)]
    kept, held = hold_out(documents)
    assert {d.text for d in kept} | {d.text for d in held} == {d.text for d in documents}
    assert [d.text for d in held] == ["a3", "a7", "b3", "b7"]


def test_text_of_a_compensation_is_bounded_by_memory_that_grows_with_the_model() -> None:
    small = lockstep_sequences(hidden=576, length=256, model_bytes=540_000_000)
    assert lockstep_bytes(576, small * 256) <= 2 * 2**30 < lockstep_bytes(576, (small + 1) * 256)
    large = lockstep_sequences(hidden=2048, length=256, model_bytes=28_000_000_000)
    assert 2 * 2**30 < lockstep_bytes(2048, large * 256) <= 7_000_000_000
    assert lockstep_sequences(hidden=100_000, length=100_000, model_bytes=0) == 1


def test_a_few_sequences_are_spread_over_all_documents_of_every_domain() -> None:
    def letters(text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    documents = [Document(letter * 4, domain) for domain, letter in (("x", "a"), ("x", "b"), ("x", "c"), ("y", "d"))]
    sequences = cut_sequences(documents, letters, 1)
    assert [chr(each.ids[0]) for each in spread(sequences, 3)] == ["a", "b", "c", "d", "d", "d"]
    assert spread(sequences, 100) == spread(sequences, None) == sequences


def test_sequences_are_whole_windows_of_one_document_and_bounded_by_domain() -> None:
    def letters(text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    documents = [Document("abcdefg", "x"), Document("hij", "x"), Document("klm", "y")]
    sequences = cut_sequences(documents, letters, 3)
    assert ["".join(map(chr, s.ids)) for s in sequences] == ["abc", "def", "hij", "klm"]
    assert [s.domain for s in cut_sequences(documents, letters, 3, per_domain=2)] == ["x", "x", "y"]
    with pytest.raises(TextRefused, match="no document has 8 tokens"):
        cut_sequences(documents, letters, 8)
