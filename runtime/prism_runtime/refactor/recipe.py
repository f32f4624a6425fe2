"""From a checkpoint and text to an elastic artifact: in one process, in shards, or after a kill where it was."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from prism_api.manifest import Calibration as Calibrated
from prism_api.manifest import Manifest, SourceModel
from prism_runtime.refactor.artifact import (
    digest_of_weights,
    list_files,
    write_checkpoint,
    write_manifest,
)
from prism_runtime.refactor.calibration import Calibration
from prism_runtime.refactor.gated import GatedPoints
from prism_runtime.refactor.memory import memory_needed
from prism_runtime.refactor.partitioners import partitioners_of
from prism_runtime.refactor.pipeline import (
    SEQUENCE_LENGTH,
    SEQUENCES_PER_DOMAIN,
    Run,
    partition_pass,
    partition_stages,
    perms_of,
)
from prism_runtime.refactor.prefixes import PrefixPoints
from prism_runtime.refactor.progress import Reporter
from prism_runtime.refactor.request import RecipeRefused, RefactorRequest, same_request, tools
from prism_runtime.refactor.stages import Shard, WorkFolder
from prism_runtime.refactor.text import read_documents


def refactor_model(
    request: RefactorRequest,
    out: Path,
    *,
    work: Path | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> Manifest:
    """Make the artifact that `request` describes in the new directory `out`.

    work    folder of finished stages; a run with the same request goes on from what is there. None takes `out` with
            `.work` added, and removes it unless it is killed
    resume  refuse to start from the beginning

    `out` appears complete or not at all. Raises RecipeRefused, TextRefused, UnsupportedModel, CheckpointRefused or
    WorkFolderRefused.
    """
    _require_new(out)
    folder = work or out.with_name(f"{out.name}.work")
    if resume:
        RefactorRequest.read(folder)
    try:
        manifest = _Recipe(request, folder, reporter or Reporter()).finish(out)
    except ValueError:
        if work is None:  # refused, not interrupted: no later run can use what is there
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if work is None:
        shutil.rmtree(folder)
    return manifest


def run_shard(request: RefactorRequest, work: Path, shard: Shard, reporter: Reporter | None = None) -> "ShardProgress":
    """Run one process's share of the next pass into the folder `work`."""
    return _Recipe(request, work, reporter or Reporter()).run_shard(shard)


def merge_shards(works: Sequence[Path], out: Path, reporter: Reporter | None = None) -> Manifest:
    """Make the artifact of which every shard has done its share: the bytes that one process would write.

    Stages that are left are run, into the first folder. Raises WorkFolderRefused if the folders belong to different
    runs, or a share is missing.
    """
    _require_new(out)
    request = same_request(works)
    recipe = _Recipe(request, works[0], reporter or Reporter(), works[1:])
    recipe.require_partition()
    return recipe.finish(out)


@dataclass(frozen=True, slots=True)
class ShardProgress:
    """Done: `tasks`, the share of pass `pass_` of `passes`, which makes `what`. Passes that follow wait for the other
    shards; once none of them is of the partition, `merge` could do them too."""

    tasks: int
    pass_: int
    passes: int
    what: str
    mergeable: bool


class _Recipe:
    """The stages of one request, by its policy."""

    def __init__(self, request: RefactorRequest, folder: Path, reporter: Reporter, others: Sequence[Path] = ()) -> None:
        request.require_same(folder)
        domains = {document.domain for document in read_documents(request.calibration)}
        tokens = len(domains) * SEQUENCES_PER_DOMAIN * SEQUENCE_LENGTH
        whole = request.policy in ("prism", "paper")
        compensated = request.policy == "prism" and request.compensation != "none"
        needed = memory_needed(request.model, whole_experts=whole, compensated=compensated, tokens=tokens)
        reporter.state_memory(needed)
        self._run = Run(request, WorkFolder(folder, others), reporter)
        request.write(folder)
        self._calibration = Calibration(self._run)
        self._partitioners = partitioners_of(self._run, self._calibration)
        stages = partition_stages(self._partitioners[-1])
        self._passes = [partition_pass(self._run, each) for each in self._partitioners]
        self._points: GatedPoints | PrefixPoints
        if request.policy == "prism":
            self._points = GatedPoints(self._run, self._calibration, stages)
            self._passes += self._points.passes(self._perms)
        else:
            self._points = PrefixPoints(self._run, self._calibration, stages)

    def run_shard(self, shard: Shard) -> ShardProgress:
        """Run the share of every pass whose predecessor is whole; returns what is done."""
        for number, each in enumerate(self._passes):
            done = each.run(shard)
            last = number + 1 == len(self._passes)
            if last or not self._run.work.has(each.stages):
                break
        mergeable = number + 1 >= len(self._partitioners)
        return ShardProgress(done, number + 1, len(self._passes), each.what, mergeable)

    def _perms(self) -> list[Tensor]:
        return perms_of(self._run, self._partitioners[-1])

    def require_partition(self) -> None:
        for partitioner in self._partitioners:
            self._run.work.require(partition_stages(partitioner))

    def finish(self, out: Path) -> Manifest:
        request, run = self._run.request, self._run
        perms = self._perms()
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
            target = Path(scratch) / "artifact"
            target.mkdir()
            write_checkpoint(request.model, target, dict(zip(run.shape.moe_layers, perms, strict=True)))
            finished = self._points.finish(perms, target)
            manifest = Manifest(
                tools=tools(),
                source=SourceModel(
                    name=request.model.resolve().name,
                    architecture=type(run.model).__name__,
                    licence=request.licence,
                    digest=digest_of_weights(request.model),
                ),
                shape=run.shape,
                files=list_files(target),
                calibration=Calibrated(
                    texts=run.texts.provenance, sequence_length=run.texts.length, seeds=[request.seed]
                ),
                partition={"policy": request.policy, "metric": request.metric, "passes": len(self._partitioners)},
                gate=finished.gate,
                operating_points=finished.points,
            )
            write_manifest(target, manifest)
            shutil.move(target, out)
        return manifest


def _require_new(out: Path) -> None:
    if out.exists():
        raise RecipeRefused(f"'{out}' exists already; give a new directory for --out, or remove it")
