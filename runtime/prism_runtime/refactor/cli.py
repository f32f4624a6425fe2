"""The commands `prism-runtime refactor` and `merge`. Heavy imports wait until one of them runs."""

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prism_api.manifest import Manifest

CommandParsers = Any
"""What `ArgumentParser.add_subparsers` returns; argparse keeps its type private."""

REFACTOR = """\
Cut every expert of a mixture-of-experts checkpoint into sub-experts, measure what each activation budget costs in
quality, and write an elastic artifact: a checkpoint that stock libraries load, a sidecar of tensors, and a manifest.

Every step is kept in a work folder as soon as it is done. A command that was killed goes on where it was if it is
started again, and writes the same bytes."""

REFACTOR_EXAMPLES = """\
examples:
  prism-runtime refactor ./olmoe --calibration text.jsonl.gz --out ./olmoe-elastic
      text.jsonl: one object a line with "text" and, if known, "domain" and "licence"; plain text works too

  prism-runtime refactor ./olmoe --calibration text.jsonl.gz --work ./work --shard 0/4
  prism-runtime merge ./work --out ./olmoe-elastic
      four processes, on one shared folder or on one each (docs/refactor-job.md: as a Kubernetes Job)"""

MERGE = """\
Make one artifact of the work folders that 'prism-runtime refactor --shard' has filled. Its bytes are those of a single
process. Model and texts are read again from where the shards found them; whatever shards do not do is done here."""


def add_parser(commands: CommandParsers) -> None:
    """Add the commands; each sets `run`, a function of the parsed arguments that returns the exit status."""
    _add_refactor(commands)
    merge = commands.add_parser(
        "merge", help="make one artifact of what shards did", description=MERGE, formatter_class=_Described
    )
    merge.add_argument("work", type=Path, nargs="+", metavar="WORK", help="work folder of one or more shards")
    merge.add_argument("--out", type=Path, required=True, metavar="DIR", help="new directory for the artifact")
    merge.set_defaults(run=run_merge)


class _Described(argparse.RawDescriptionHelpFormatter):
    """Descriptions keep their line breaks."""


def _add_refactor(commands: CommandParsers) -> None:
    refactor = commands.add_parser(
        "refactor",
        help="make an elastic artifact of a mixture-of-experts checkpoint",
        description=REFACTOR,
        epilog=REFACTOR_EXAMPLES,
        formatter_class=_Described,
    )
    refactor.add_argument("model", type=Path, metavar="MODEL", help="directory of a Hugging Face checkpoint")
    files = refactor.add_argument_group("files")
    files.add_argument(
        "--calibration", type=Path, required=True, metavar="FILE", help="text to calibrate on (.jsonl or plain, or .gz)"
    )
    files.add_argument("--out", type=Path, metavar="DIR", help="new directory for the artifact; with --shard not used")
    files.add_argument(
        "--evaluation",
        type=Path,
        metavar="FILE",
        help="text to measure quality on; by default every fourth calibration document is kept for it",
    )
    files.add_argument("--licence", default="unspecified", help="licence of the model, for the manifest")
    recipe = refactor.add_argument_group("recipe")
    recipe.add_argument(
        "--policy",
        choices=("prism", "paper", "sorted", "random"),
        default="prism",
        help="prism: swap-search partition, and a gate that picks sub-experts for every token. The others are "
        "baselines that run a prefix, as long as the router's rank deserves: of MoE-Prism's published partition, of "
        "neurons sorted by energy, or of random ones (default %(default)s)",
    )
    recipe.add_argument("--sub-experts", type=int, default=8, metavar="N", help="sub-experts an expert (default 8)")
    recipe.add_argument(
        "--points",
        type=_permilles,
        metavar="875,750,...",
        help="budgets in per-mille, for prefixes multiples of 1000/N. One whose quality is not below that of every "
        "larger one is left out. Default: every 50 from 250 that is on the convex hull and distinct; for prefixes all "
        "from 250. 'full' is always there",
    )
    prism = refactor.add_argument_group("ingredients of policy prism")
    prism.add_argument(
        "--metric",
        choices=("fisher", "identity"),
        default="fisher",
        help="norm of an output error: fisher weighs directions by what they do to predictions and needs a backward "
        "pass; identity is for models too large for one (default %(default)s)",
    )
    prism.add_argument(
        "--compensation",
        choices=("lockstep", "dense", "none"),
        default="lockstep",
        help="low-rank repair of what is dropped, fitted along the sparse model or the full one (default %(default)s)",
    )
    prism.add_argument(
        "--rank",
        type=int,
        default=8,
        metavar="R",
        help="of the compensation: it costs 2R/3 neurons a token and layer, and a wider model wants more of it "
        "(default %(default)s; 32 for SmolLM2-135M, which is 576 wide)",
    )
    prism.add_argument(
        "--gate",
        default="ridge",
        metavar="KIND",
        help="what predicts a sub-expert's output norm: ridge, a regression on all of the experts' input; pca, on its "
        "64 leading components, for calibration text with few rows an expert; prior, the mean over the calibration "
        "text, the same for every token, which costs nothing (default %(default)s)",
    )
    prism.add_argument(
        "--allocation",
        choices=("single", "layer", "dp"),
        default="single",
        help="single: one threshold for all layers; layer: one for each, at equal budgets; dp: one for each, at "
        "budgets that a knapsack over the measured loss of every layer alone gives (default %(default)s)",
    )
    prism.add_argument(
        "--without",
        action="append",
        choices=("token-factor", "second-pass", "adaptive-gate"),
        default=[],
        help="leave an ingredient out, to see what it is worth; may be repeated",
    )
    recipe.add_argument("--seed", type=int, default=0, metavar="S", help="of everything random (default 0)")
    recipe.add_argument(
        "--threads",
        type=int,
        default=1,
        metavar="N",
        help="CPU threads; sums in another order are other bytes, so shards must agree (default 1)",
    )
    running = refactor.add_argument_group("stopping, resuming and sharing the work")
    running.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        help="folder of finished steps, kept in the end (default: OUT.work, removed once the artifact is there)",
    )
    running.add_argument(
        "--resume", action="store_true", help="go on with what --work holds, and refuse if it holds nothing"
    )
    running.add_argument(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="do the I-th of N shares (counted from 0) of the next pass into --work, and no artifact. Passes, each of "
        "which reads all of the one before: the partition by expert, twice; gates by layer; points by budget, as all "
        "layers of a point are fitted one after the other. 'merge' does what is left after the partition",
    )
    refactor.set_defaults(run=run_refactor)


def _permilles(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be integers separated by commas; found '{text}'") from None


def _shard(text: str) -> tuple[int, int]:
    if (found := re.fullmatch(r"(\d+)/(\d+)", text)) is None or int(found[1]) >= int(found[2]):
        raise argparse.ArgumentTypeError(f"must be I/N with 0 <= I < N, such as 0/4; found '{text}'")
    return int(found[1]), int(found[2])


def run_refactor(arguments: argparse.Namespace) -> int:
    from prism_runtime.refactor.recipe import refactor_model, run_shard
    from prism_runtime.refactor.request import RecipeRefused, RefactorRequest
    from prism_runtime.refactor.stages import Shard

    try:
        request = RefactorRequest(
            model=arguments.model,
            calibration=arguments.calibration,
            evaluation=arguments.evaluation,
            policy=arguments.policy,
            sub_experts=arguments.sub_experts,
            points_permille=arguments.points and tuple(arguments.points),
            metric=arguments.metric,
            compensation=arguments.compensation,
            rank=arguments.rank,
            gate=arguments.gate,
            allocation=arguments.allocation,
            without=tuple(arguments.without),
            licence=arguments.licence,
            seed=arguments.seed,
            threads=arguments.threads,
        )
        if arguments.shard is None:
            if arguments.out is None:
                raise RecipeRefused("the artifact needs a directory: give --out DIR (or --shard I/N for a share)")
            return _print_points(refactor_model(request, arguments.out, work=arguments.work, resume=arguments.resume))
        if arguments.work is None:
            raise RecipeRefused("a shard leaves its share in a folder: give --work DIR")
        if arguments.resume:
            RefactorRequest.read(arguments.work)
        done = run_shard(request, arguments.work, Shard(*arguments.shard))
    except (ValueError, OSError) as error:
        return _refuse(error)
    index, count = arguments.shard
    print(
        f"shard {index} of {count}: {done.tasks} tasks of pass {done.pass_} of {done.passes} ({done.what}) are in "
        f"'{arguments.work}'"
    )
    if done.pass_ < done.passes:
        print(
            "The next pass reads the work of all shards: start this command again when they have finished"
            + (", or let 'prism-runtime merge' do the rest in one process." if done.mergeable else ".")
        )
    return 0


def run_merge(arguments: argparse.Namespace) -> int:
    from prism_runtime.refactor.recipe import merge_shards

    try:
        return _print_points(merge_shards(arguments.work, arguments.out))
    except (ValueError, OSError) as error:
        return _refuse(error)


def _print_points(manifest: "Manifest") -> int:
    for point in manifest.operating_points:
        print(f"{point.name:8} relative quality {point.relative_quality}, at least {point.relative_quality_low}")
    return 0


def _refuse(error: Exception) -> int:
    """ValueErrors of this package are about the user's files and arguments; they need no traceback."""
    print(f"prism-runtime: {error}", file=sys.stderr)
    return 2
