"""Prompts of an exact length: runs of token ids from the embedded model's held-out text."""

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer

MODEL = Path(__file__).parents[1] / "model"
HELD_OUT = MODEL / "evaluation.jsonl.gz"
TOKENIZER = MODEL / "artifact" / "tokenizer.json"


class PromptError(RuntimeError):
    """No prompts can be made; the message names the file and the command that makes it."""


def held_out_tokens(text: Path = HELD_OUT, tokenizer: Path = TOKENIZER) -> list[int]:
    """All held-out text as token ids. Raises PromptError if the artifact is not there."""
    if not tokenizer.exists():
        raise PromptError(
            f"{tokenizer.name} was not found in {tokenizer.parent.name}/; prompts are token ids and need it; "
            "check out examples/model/artifact, or make it with 'prism-runtime refactor'"
        )
    encode = Tokenizer.from_file(str(tokenizer)).encode
    return [token for line in _texts(text) for token in encode(line).ids]


def _texts(path: Path) -> Iterator[str]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def prompt(tokens: Sequence[int], index: int, length: int) -> list[int]:
    """The `index`-th prompt: `length` tokens in a row, from a place of its own for every index, always the same."""
    start = index * 7919 % max(1, len(tokens) - length)  # a prime stride spreads neighbours over all domains
    return list(tokens[start : start + length])
