"""The commands `prism-runtime refactor` and `prism-runtime evaluate`. Heavy imports wait until one of them runs."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

CommandParsers = Any
"""What `ArgumentParser.add_subparsers` returns; argparse keeps its type private."""


def add_parser(commands: CommandParsers) -> None:
    """Add both commands; each sets `run`, a function of the parsed arguments that returns the exit status."""
    refactor = commands.add_parser("refactor", help="make an elastic artifact of a mixture-of-experts checkpoint")
    refactor.add_argument("model", type=Path, metavar="MODEL", help="directory of a Hugging Face checkpoint")
    refactor.add_argument(
        "--calibration", type=Path, required=True, metavar="FILE", help="text to calibrate on (.jsonl or plain, or .gz)"
    )
    refactor.add_argument("--out", type=Path, required=True, metavar="DIR", help="new directory for the artifact")
    refactor.add_argument(
        "--evaluation",
        type=Path,
        metavar="FILE",
        help="text to measure quality on; by default every fourth calibration document is kept for it",
    )
    refactor.add_argument("--sub-experts", type=int, default=8, metavar="N", help="sub-experts an expert (default 8)")
    refactor.add_argument(
        "--points",
        type=_permilles,
        metavar="875,750,...",
        help="budgets in per-mille, multiples of 1000/N (default: all from 250); 'full' is always there",
    )
    refactor.add_argument("--licence", default="unspecified", help="licence of the model, for the manifest")
    refactor.set_defaults(run=run_refactor)

    evaluate = commands.add_parser("evaluate", help="measure the quality of an artifact's operating points on text")
    evaluate.add_argument("artifact", type=Path, metavar="ARTIFACT")
    evaluate.add_argument("--text", type=Path, required=True, metavar="FILE", help=".jsonl or plain text, or .gz")
    evaluate.add_argument("--sequences", type=int, metavar="N", help="most sequences of 256 tokens a domain (all)")
    evaluate.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    evaluate.set_defaults(run=run_evaluate)


def _permilles(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be integers separated by commas; found '{text}'") from None


def run_refactor(arguments: argparse.Namespace) -> int:
    from prism_runtime.refactor.recipe import refactor_model

    try:
        manifest = refactor_model(
            arguments.model,
            arguments.calibration,
            arguments.out,
            evaluation=arguments.evaluation,
            sub_experts=arguments.sub_experts,
            points_permille=arguments.points,
            licence=arguments.licence,
        )
    except (ValueError, OSError) as error:
        return _refuse(error)
    for point in manifest.operating_points:
        print(f"{point.name:8} relative quality {point.relative_quality}, at least {point.relative_quality_low}")
    return 0


def run_evaluate(arguments: argparse.Namespace) -> int:
    from prism_runtime.refactor.recipe import evaluate_artifact

    try:
        quality = evaluate_artifact(arguments.artifact, arguments.text, arguments.sequences)
    except (ValueError, OSError) as error:
        return _refuse(error)
    rows = {
        name: {
            "relativeQuality": str(measured.relative_quality),
            "relativeQualityLow": str(measured.relative_quality_low),
            "kl": measured.kl.to_wire(),
            "klByDomain": measured.by_domain,
            "sameTop1": measured.same_top1,
            "realisedPermille": measured.realised_permille,
        }
        for name, measured in quality.items()
    }
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return 0
    print("point            KL, nats     p99 same top-1 realised  quality      low  worst domain, its KL")
    for name, measured in quality.items():
        worst = max(measured.by_domain, key=measured.by_domain.__getitem__)
        print(
            f"{name:8} {measured.kl.mean:8.4f} ± {measured.kl.standard_error:.4f} {measured.kl.p99:7.3f} "
            f"{measured.same_top1:10.3f} {measured.realised_permille:8} {measured.relative_quality:>8} "
            f"{measured.relative_quality_low:>8}  {worst} {measured.by_domain[worst]:.4f}"
        )
    return 0


def _refuse(error: Exception) -> int:
    """ValueErrors of this package are about the user's files and arguments; they need no traceback."""
    print(f"prism-runtime: {error}", file=sys.stderr)
    return 2
