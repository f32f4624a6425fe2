"""Builds the six-domain corpus that the embedded model was trained on, from distribution packages only.

    python make_corpus.py PACKAGES CORPUS

PACKAGES holds unpacked Debian 12 packages (apt-get download X && dpkg-deb -x X.deb PACKAGES/X): r-cran-janeaustenr,
wordnet-base, sqlite3-doc, postgresql-doc-15 and golang-1.19-src; the program `bible` (packages bible-kjv and
bible-kjv-text) must be on the path, and the Python files are those of the running interpreter.
Writes CORPUS/<domain>.train.txt and .valid.txt, documents separated by NUL; 5 % are held out by the hash of their key.
"""

import hashlib
import html
import os
import re
import struct
import subprocess
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

Keyed = Iterator[tuple[str, str]]
"""(key, text) of each document; the key alone decides the side it is on."""

HELD_OUT_PERCENT = 5
LINES_A_PAGE = 40
"""Dictionary entries are one line each; a page of them is a document."""

CHARSXP = b"\x00\x04\x00\x09"
"""Header of a string in R's serialisation: flags, then a big-endian length and the bytes."""

SKIPPED_PYTHON = r"site-packages|/test/|/tests/|idlelib|lib2to3|encodings/|pydoc_data|config-|__pycache__"
SKIPPED_GO = r"_test\.go|testdata|/z[a-z]*_|vendor|tables\.go|opGen|rewrite[A-Z0-9]|syscall|cmd/"
SKIPPED_HTML = r"requirements|search|backlink|bookindex|syntax/|changes|release-|matrix|keyword|doclist|/c3ref/.*list"


def scripture(_: Path) -> Keyed:
    """One document a chapter, verse numbers kept."""
    command = ["bible", "-l9999", "-f", "gen1:1-rev22:21"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    chapters: dict[tuple[str, str], list[str]] = {}
    for line in printed.splitlines():
        if match := re.match(r"(\S+?)(\d+):(\d+) (.*)", line):
            chapters.setdefault((match[1], match[2]), []).append(f"{match[3]} {match[4]}")
    for (book, chapter), verses in chapters.items():
        yield f"{book} {chapter}", f"{book} {chapter}\n" + "\n".join(verses) + "\n"


def fiction(packages: Path) -> Keyed:
    """Six novels from the lazy-load database of an R package: per novel a length and a zlib stream."""
    package = packages / "r-cran-janeaustenr/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    database, position, novel = package.read_bytes(), 0, 0
    while position < len(database):
        stream = zlib.decompressobj()
        serialised = stream.decompress(database[position + 4 :])
        position = len(database) - len(stream.unused_data)
        novel += 1
        for part, text in enumerate(_chunks("\n".join(_r_strings(serialised)), 8000)):
            yield f"{novel}-{part}", text


def _r_strings(serialised: bytes) -> Iterator[str]:
    position = serialised.find(CHARSXP)
    while position >= 0:
        (length,) = struct.unpack(">i", serialised[position + 4 : position + 8])
        end = position + 8 + max(length, 0)
        if length >= 0:
            yield serialised[position + 8 : end].decode("utf8", "replace")
        position = serialised.find(CHARSXP, end)


def _chunks(text: str, size: int) -> Iterator[str]:
    """Contiguous pieces that end on an empty line after `size` characters, or on any line after twice as many."""
    lines: list[str] = []
    length = 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        length += len(line)
        if (length >= size and not line.strip()) or length >= 2 * size:
            yield "".join(lines)
            lines, length = [], 0
    if lines:
        yield "".join(lines)


def dictionary(packages: Path) -> Keyed:
    for part_of_speech in ("noun", "verb", "adj", "adv"):
        data = packages / f"wordnet-base/usr/share/wordnet/data.{part_of_speech}"
        for line in data.read_text(encoding="latin-1").splitlines():
            if line.startswith("  "):  # the licence, at the top of each file
                continue
            fields, gloss = line.split(" | ", 1)
            parts = fields.split()
            count = int(parts[3], 16)
            words = [re.sub(r"\(.*?\)$", "", word).replace("_", " ") for word in parts[4 : 4 + 2 * count : 2]]
            yield parts[0] + part_of_speech, f"{', '.join(words)} ({part_of_speech}): {gloss.strip()}\n"


def python(_: Path) -> Keyed:
    yield from _files(Path(sysconfig.get_paths()["stdlib"]), ".py", SKIPPED_PYTHON)


def go(packages: Path) -> Keyed:
    for key, text in _files(packages / "golang-1.19-src/usr/share/go-1.19/src", ".go", SKIPPED_GO):
        yield key, re.sub(r"^// Copyright.*\n(//.*\n)*\n?", "", text)


def dbdocs(packages: Path) -> Keyed:
    documentation = ("sqlite3-doc/usr/share/doc/sqlite3", "postgresql-doc-15/usr/share/doc/postgresql-doc-15/html")
    for root in documentation:
        for key, page in _files(packages / root, ".html", SKIPPED_HTML):
            text = _text_of(page)
            if len(text) > 400:
                yield key, text + "\n"


def _text_of(page: str) -> str:
    page = re.sub(r"(?is)<(script|style|head|svg).*?</\1>", "", page)
    page = re.sub(r'(?is)<div class="(navheader|navfooter|nosearch)".*?</div>', "", page)
    page = re.sub(r"(?i)</(p|h\d|li|pre|tr|dt|dd|div)>|<br>", "\n", page)
    text = html.unescape(re.sub(r"<[^>]*>", "", page)).replace("\xa0", " ")
    return re.sub(r"[ \t]+\n", "\n", re.sub(r"\n\s*\n+", "\n\n", text)).strip()


def _files(root: Path, suffix: str, skipped: str) -> Keyed:
    """UTF-8 files of 400 to 120,000 characters, in an order that does not depend on the file system."""
    for folder, folders, names in os.walk(root):
        folders.sort()
        for path in (Path(folder) / name for name in sorted(names) if name.endswith(suffix)):
            if re.search(skipped, str(path)):
                continue
            try:
                text = path.read_text(encoding="utf8")
            except UnicodeDecodeError:
                continue
            if 400 < len(text) < 120_000:
                yield str(path.relative_to(root)), text


DOMAINS: dict[str, Callable[[Path], Keyed]] = {
    "scripture": scripture,
    "fiction": fiction,
    "dictionary": dictionary,
    "python": python,
    "go": go,
    "dbdocs": dbdocs,
}


def held_out(key: str) -> bool:
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def main(packages: Path, corpus: Path) -> None:
    corpus.mkdir(parents=True, exist_ok=True)
    for domain, documents in DOMAINS.items():
        sides: dict[str, list[str]] = {"train": [], "valid": []}
        seen: set[str] = set()
        for key, text in documents(packages):
            if text not in seen:
                seen.add(text)
                sides["valid" if held_out(domain + key) else "train"].append(text)
        for side, texts in sides.items():
            if domain == "dictionary":
                texts = ["".join(texts[i : i + LINES_A_PAGE]) for i in range(0, len(texts), LINES_A_PAGE)]
            (corpus / f"{domain}.{side}.txt").write_text("\0".join(texts), encoding="utf8")
            print(f"{domain:11} {side} {sum(map(len, texts)) / 1e6:.2f} M characters, {len(texts)} documents")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
