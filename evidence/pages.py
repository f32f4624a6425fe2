"""Pages of docs/ whose tables are written from the files of evidence: between two marks that name the program."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

BEGIN, END = "<!-- {}: written by python -m {} -->", "<!-- {}: end -->"


def filled(page: str, program: str, blocks: Mapping[str, Sequence[str]]) -> str:
    """The page with the lines between each block's marks replaced. Raises ValueError for a mark that is not there."""
    for name, lines in blocks.items():
        begin, end = BEGIN.format(name, program), END.format(name)
        if begin not in page or end not in page:
            raise ValueError(f"the page has no block '{name}': it needs the lines '{begin}' and '{end}'")
        before, rest = page.split(begin, 1)
        page = before + begin + "\n" + "\n".join(lines) + "\n" + end + rest.split(end, 1)[1]
    return page


def command(
    program: str,
    description: str | None,
    path: Path,
    blocks: Callable[[], Mapping[str, Sequence[str]]],
    argv: Sequence[str] | None,
) -> int:
    """What `python -m PROGRAM [--check]` does."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {program}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the page is not up to date")
    arguments = parser.parse_args(argv)
    found = path.read_text()
    wanted = filled(found, program, blocks())
    if not arguments.check:
        path.write_text(wanted)
    elif found != wanted:
        print(f"{path.name} does not hold the figures of evidence/: run python -m {program}")
        return 1
    return 0
