"""Calibration and evaluation text: documents in, token sequences of one length out."""

import gzip
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prism_api.manifest import CalibrationText

PLAIN_DOCUMENT_CHARACTERS = 6000
"""A plain text is cut into documents, so that some of them can be held out; long enough for several sequences each."""


class TextRefused(ValueError):
    """The text file cannot be read as documents, or is too short."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text and where it is from; `domain` groups documents in the evaluation."""

    text: str = field(repr=False)
    domain: str = "text"
    licence: str = "unspecified"


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """`ids` of exactly the asked length, cut from one document."""

    domain: str
    ids: tuple[int, ...] = field(repr=False)


def read_documents(path: Path) -> list[Document]:
    """Documents of a .jsonl file (`text`, and optionally `domain` and `licence`, per line) or of a plain text, which is
    cut at line ends.

    Either may be gzipped (.gz). Raises TextRefused that names the file and line.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = content.decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise TextRefused(f"'{path}' cannot be read as UTF-8 text: {error}") from error
    if ".jsonl" not in path.suffixes:
        return [Document(part) for part in _parts(text)]
    return [_document(line, f"'{path}' line {number}") for number, line in enumerate(text.splitlines(), 1) if line]


def _parts(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = text.find("\n", start + PLAIN_DOCUMENT_CHARACTERS) + 1 or len(text)
        yield text[start:end]
        start = end


def _document(line: str, where: str) -> Document:
    try:
        entry = json.loads(line)
        known = {key: entry[key] for key in ("domain", "licence") if key in entry}
        return Document(entry["text"], **known)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise TextRefused(f"{where} must be an object with a string 'text'; found {line[:40]!r}") from error


def hold_out(documents: Sequence[Document], every: int = 4) -> tuple[list[Document], list[Document]]:
    """(kept, held out) documents: every n-th one of each domain is held out, so that both see every domain."""
    seen: dict[str, int] = {}
    kept: list[Document] = []
    held: list[Document] = []
    for document in documents:
        seen[document.domain] = seen.get(document.domain, 0) + 1
        (held if seen[document.domain] % every == 0 else kept).append(document)
    return kept, held


def cut_sequences(
    documents: Sequence[Document], tokenizer: Any, length: int, per_domain: int | None = None
) -> list[TokenSequence]:
    """Non-overlapping token sequences of `length`, at most `per_domain` from each; a document's rest is left out.

    Raises TextRefused if no document is that long.
    """
    taken: dict[str, int] = {}
    sequences = []
    for document in documents:
        for ids in _windows(tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"], length):
            if per_domain is not None and taken.get(document.domain, 0) >= per_domain:
                break
            taken[document.domain] = taken.get(document.domain, 0) + 1
            sequences.append(TokenSequence(document.domain, ids))
    if not sequences:
        raise TextRefused(f"no document has {length} tokens; give longer text or a smaller sequence length")
    return sequences


def spread(sequences: Sequence[TokenSequence], per_domain: int | None) -> list[TokenSequence]:
    """At most `per_domain` sequences of each domain, evenly over its documents, not from the first ones alone; None is
    all."""
    domains: dict[str, list[TokenSequence]] = {}
    for sequence in sequences:
        domains.setdefault(sequence.domain, []).append(sequence)
    return [
        members[place * len(members) // taken]
        for members in domains.values()
        for taken in [len(members) if per_domain is None else min(per_domain, len(members))]
        for place in range(taken)
    ]


def _windows(ids: list[int], length: int) -> Iterator[tuple[int, ...]]:
    return (tuple(ids[start : start + length]) for start in range(0, len(ids) - length + 1, length))


def provenance(path: Path, documents: Sequence[Document], sequences: Sequence[TokenSequence]) -> list[CalibrationText]:
    """What a manifest says about a text file: one entry per domain, with the digest of the file."""
    digest = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    licences: dict[str, set[str]] = {}
    for document in documents:
        licences.setdefault(document.domain, set()).add(document.licence)
    tokens: dict[str, int] = {}
    for sequence in sequences:
        tokens[sequence.domain] = tokens.get(sequence.domain, 0) + len(sequence.ids)
    return [
        CalibrationText(
            name=f"{path.name}#{domain}", digest=digest, licence="; ".join(sorted(licences[domain])), tokens=count
        )
        for domain, count in tokens.items()
    ]
