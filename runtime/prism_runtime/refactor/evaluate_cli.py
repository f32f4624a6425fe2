"""The command `prism-runtime evaluate`. Heavy imports wait until it runs."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Measure every operating point of an artifact on text, beside what it must beat: plain top-k with and without
renormalised weights, random sub-experts, static choices, and oracles that no gate can pass. All costs are counted.
The figure to read is KL, in nats per token, to the full model at the same realised budget."""

EXAMPLES = """\
examples:
  prism-runtime evaluate ./olmoe-elastic --text held-out.jsonl.gz
  prism-runtime evaluate ./olmoe-elastic --text a.jsonl b.txt --calibration text.jsonl.gz --html report.html
      with static baselines, which take their averages from the calibration text, and a page of pictures
  prism-runtime evaluate ./olmoe-elastic --text a.jsonl --steps 8,32 --json
      also the weight bytes that decode steps of 8 and of 32 tokens read, by selection
  prism-runtime evaluate ./seed-0 --text a.jsonl b.jsonl --seeds ./seed-1 ./seed-2 --record
      also which points keep their order and cost whatever the seed and text; --record writes it to the manifest"""


def add_parser(commands: Any) -> None:
    """Add the command; it sets `run`, a function of the parsed arguments that returns the exit status."""
    evaluate = commands.add_parser(
        "evaluate",
        help="measure the quality of an artifact's operating points on text",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluate.add_argument("artifact", type=Path, metavar="ARTIFACT", help="folder made by 'prism-runtime refactor'")
    evaluate.add_argument(
        "--text", type=Path, nargs="+", required=True, metavar="FILE", help=".jsonl or plain text, or .gz"
    )
    evaluate.add_argument("--calibration", type=Path, metavar="FILE", help="text for the static baselines (none)")
    evaluate.add_argument("--sequences", type=int, metavar="N", help="most sequences a domain (all)")
    evaluate.add_argument("--no-baselines", action="store_true", help="the artifact's own points only")
    evaluate.add_argument(
        "--steps", type=_sizes, default=(), metavar="8,32", help="decode batches to count weight bytes of (none)"
    )
    evaluate.add_argument(
        "--seeds",
        type=Path,
        nargs="+",
        default=(),
        metavar="ARTIFACT",
        help="artifacts of the same model with other --seed: tells which points are stable",
    )
    evaluate.add_argument(
        "--record",
        action="store_true",
        help="with --seeds: write into the manifest which points are stable. Its digest changes, so make the "
        "PrismModel afterwards",
    )
    evaluate.add_argument("--json", action="store_true", help="one JSON object on standard output instead of a table")
    evaluate.add_argument("--html", type=Path, metavar="FILE", help="also write a self-contained page with pictures")
    evaluate.set_defaults(run=run)


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be integers separated by commas; found '{text}'") from None
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"a step has at least 1 token; found '{text}'")
    return sizes


def run(arguments: argparse.Namespace) -> int:
    from prism_runtime.refactor.assessment import AssessmentOptions, assess_artifact
    from prism_runtime.refactor.progress import Reporter
    from prism_runtime.refactor.report import page, table
    from prism_runtime.refactor.stability import Stability, record

    if arguments.record and not arguments.seeds:
        print("prism-runtime: --record writes what --seeds tells: give artifacts with other seeds", file=sys.stderr)
        return 2
    options = AssessmentOptions(
        sequences=arguments.sequences,
        calibration=arguments.calibration,
        baselines=not arguments.no_baselines,
        step_tokens=arguments.steps,
        others=arguments.seeds,
    )
    try:
        assessment = assess_artifact(arguments.artifact, arguments.text, options, Reporter())
        if arguments.record:
            record(arguments.artifact, Stability(**assessment["stability"]))
        if arguments.html is not None:
            arguments.html.write_text(page(assessment))
    except (ValueError, OSError) as error:
        print(f"prism-runtime: {error}", file=sys.stderr)
        return 2
    print(json.dumps(assessment, indent=1) if arguments.json else table(assessment))
    return 0
