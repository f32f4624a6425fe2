"""Text as tokens come: never half a character, never a stop string, nothing lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism_runtime.server.detokenize import Detokenizer, StopStrings
from prism_runtime.server.tokenizer import TextCodec
from tests.runtime.serving.engine import byte_tokenizer

CODEC = TextCodec(byte_tokenizer())


def pieces_of(ids: bytes) -> list[str]:
    detokenizer = Detokenizer(CODEC)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


@given(st.text())
def test_pieces_join_to_the_text_and_hold_only_whole_characters(text: str) -> None:
    pieces = pieces_of(text.encode())
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@given(st.binary(max_size=200))
def test_pieces_of_any_bytes_join_to_what_all_of_them_decode_to(ids: bytes) -> None:
    assert "".join(pieces_of(ids)) == CODEC.decode(list(ids), skip_special_tokens=True)


def test_character_is_sent_with_the_token_that_completes_it() -> None:
    assert pieces_of("a€b".encode()) == ["a", "", "", "€", "b", ""]


def test_bytes_that_never_become_a_character_do_not_stall_the_answer() -> None:
    pieces = pieces_of(b"\xff" * 100)
    assert "".join(pieces) == "\ufffd" * 100
    assert all(pieces[1:])


@given(st.text("abc", max_size=40), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4), st.data())
def test_stop_strings_cut_at_the_first_that_is_complete_whatever_the_pieces(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    whole = StopStrings(stops)
    expected = "".join(whole.push(character) for character in text)
    expected += "" if whole.stopped else whole.flush()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    stopper, sent = StopStrings(stops), ""
    for part in parts:
        sent += stopper.push(part)
        assert not any(stop in sent for stop in stops)
        if stopper.stopped:
            break
    sent += "" if stopper.stopped else stopper.flush()
    assert stopper.stopped == any(stop in text for stop in stops)
    if not stopper.stopped:
        assert sent == text
    else:
        assert text.startswith(sent)
        assert len(sent) <= len(expected)


@pytest.mark.parametrize(
    ("stops", "pieces", "sent"),
    [
        (["END"], ["abE", "N", "Dcd"], ["ab", "", ""]),
        (["END"], ["abE", "X"], ["ab", "EX"]),
        (["aab"], ["aa", "ab"], ["", "a"]),
        ([], ["a", "b"], ["a", "b"]),
    ],
)
def test_text_that_may_begin_a_stop_string_waits_for_the_next_piece(
    stops: list[str], pieces: list[str], sent: list[str]
) -> None:
    stopper = StopStrings(stops)
    assert [stopper.push(piece) for piece in pieces] == sent
