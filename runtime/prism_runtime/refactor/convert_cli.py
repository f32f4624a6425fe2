"""The command `prism-runtime convert-dense`. Heavy imports wait until it runs."""

import argparse
import sys
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command to what `ArgumentParser.add_subparsers` returned; it sets `run`."""
    convert = commands.add_parser(
        "convert-dense",
        help="turn a dense Llama-class checkpoint into a mixture with one expert a layer",
        description="Writes a Mixtral checkpoint with one expert a layer that computes the same function, bit for bit; "
        "'prism-runtime refactor' then makes it elastic. Memory: one weight file of the source.",
    )
    convert.add_argument("source", type=Path, metavar="SOURCE", help="directory of a Llama or Mistral checkpoint")
    convert.add_argument("out", type=Path, metavar="OUT", help="new directory for the converted checkpoint")
    convert.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from prism_runtime.refactor.convert_dense import convert_dense

    def advance(done: int, of: int) -> None:
        print(f"\rconverted {done} of {of} weight files", end="" if done < of else "\n", file=sys.stderr, flush=True)

    try:
        convert_dense(arguments.source, arguments.out, advance)
    except (ValueError, OSError) as error:
        print(f"prism-runtime: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.out}: next, prism-runtime refactor {arguments.out} --calibration TEXT --out ARTIFACT")
    return 0
