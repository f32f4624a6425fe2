"""What all policies share: the run that stages belong to, the tasks that shards divide, and the partition they give."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prism_api.manifest import CalibrationText, MeasuredPoint, Shape
from prism_runtime.engine.experts_hook import experts_modules, fused_projections
from prism_runtime.engine.model import load_pretrained
from prism_runtime.refactor.evaluate import require_spread
from prism_runtime.refactor.progress import Reporter
from prism_runtime.refactor.request import RecipeRefused, RefactorRequest
from prism_runtime.refactor.stages import Output, Shard, Stage, WorkFolder
from prism_runtime.refactor.text import TokenSequence, cut_sequences, hold_out, provenance, read_documents, spread

SEQUENCE_LENGTH = 256
SEQUENCES_PER_DOMAIN = 64
"""Gives a standard error of 1 % of the KL at half budget on the embedded model, in minutes on one core."""
SEQUENCES_FOR_THRESHOLDS = 24
"""Of every domain; put the realised budget of six domains within about 1 % of the asked one."""
WHOLE = Shard(0, 1)


class Texts:
    """Token sequences to calibrate on, to choose thresholds on and to measure quality on, disjoint by document."""

    def __init__(self, request: RefactorRequest, tokenizer: Any, length: int) -> None:
        documents = read_documents(request.calibration)
        if request.evaluation is None:
            found = len(documents)
            documents, held = hold_out(documents)
            if not held:
                raise RecipeRefused(
                    f"'{request.calibration}' has {found} documents, too few to hold one out for the evaluation; "
                    f"give longer text, or --evaluation FILE"
                )
        else:
            held = read_documents(request.evaluation)
        self.held: Sequence[TokenSequence] = ()
        if request.policy == "prism":
            documents, for_thresholds = hold_out(documents)
            self.held = spread(cut_sequences(for_thresholds, tokenizer, length), SEQUENCES_FOR_THRESHOLDS)
        self.length = length
        calibration, evaluation = (cut_sequences(each, tokenizer, length) for each in (documents, held))
        self.calibration: Sequence[TokenSequence] = spread(calibration, SEQUENCES_PER_DOMAIN)
        self.evaluation: Sequence[TokenSequence] = spread(evaluation, SEQUENCES_PER_DOMAIN)
        require_spread([each.domain for each in self.evaluation])  # minutes before the evaluation would find out
        self.provenance: list[CalibrationText] = provenance(request.calibration, documents, self.calibration)


class Run:
    """One request over one work folder. The model is loaded at once, and held as float32."""

    def __init__(self, request: RefactorRequest, work: WorkFolder, reporter: Reporter) -> None:
        """Raises RecipeRefused, TextRefused or UnsupportedModel before anything is computed."""
        torch.set_num_threads(request.threads)
        self.request, self.work, self.reporter = request, work, reporter
        self.root = request.identity()
        self.model: PreTrainedModel
        self.model, tokenizer = load_pretrained(request.model)
        self.shape = shape_of(self.model, request.sub_experts)
        if request.rank > self.shape.hidden:
            raise RecipeRefused(f"--rank is at most the model's hidden width {self.shape.hidden}; found {request.rank}")
        length = min(SEQUENCE_LENGTH, self.model.config.get_text_config().max_position_embeddings)
        self.texts = Texts(request, tokenizer, length)


@dataclass(frozen=True, slots=True)
class PartitionTask:
    """Experts of one MoE layer, counted over MoE layers, that are partitioned together."""

    layer: int
    experts: range

    @property
    def name(self) -> str:
        first, last = self.experts[0], self.experts[-1]
        return f"partition-{self.layer}-{first}" + ("" if first == last else f"-{last}")


@dataclass(frozen=True, slots=True)
class Finished:
    """Points in manifest order, and the manifest's entry of what selects for them."""

    points: list[MeasuredPoint]
    gate: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Pass:
    """Tasks that shards divide, none of which reads another; the next pass reads all of them.

    what    the tasks make, in a word
    stages  of all tasks
    run     runs the share of a shard that is not done; returns how many tasks are in the share
    """

    what: str
    stages: Sequence[Stage]
    run: Callable[[Shard], int]


class Partitioner(Protocol):
    """How neurons become sub-experts."""

    def prepare(self) -> None:
        """Run the stages that every task reads."""

    def tasks(self) -> Sequence[PartitionTask]:
        """In the order that shards divide."""

    def stage(self, task: PartitionTask) -> Stage: ...

    def partition(self, task: PartitionTask) -> Output:
        """`perm` int32, one row of C for each expert of the task. Called from several threads."""


def run_partition(run: Run, partitioner: Partitioner, shard: Shard) -> int:
    """Run the shard's share of the partition tasks that are not done; returns how many are in the share."""
    tasks = partitioner.tasks()
    share = [tasks[index] for index in shard.share(len(tasks))]
    partitioner.prepare()
    with (
        run.reporter.bar("partition", len(share), "tasks") as advance,
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
    ):
        try:
            for _ in pool.map(partial(_perm, run, partitioner), share):
                advance(1)
        finally:
            pool.shutdown(cancel_futures=True)
    return len(share)


def partition_pass(run: Run, partitioner: Partitioner) -> Pass:
    """One task is what the partitioner says: an expert, or a layer."""
    return Pass("partition", partition_stages(partitioner), partial(run_partition, run, partitioner))


def perms_of(run: Run, partitioner: Partitioner) -> list[Tensor]:
    """[E, C] int32 of every MoE layer. Runs the tasks that are not done."""
    run_partition(run, partitioner, WHOLE)
    return [
        torch.cat([_perm(run, partitioner, task) for task in partitioner.tasks() if task.layer == layer])
        for layer in range(len(run.shape.moe_layers))
    ]


def partition_stages(partitioner: Partitioner) -> list[Stage]:
    return [partitioner.stage(task) for task in partitioner.tasks()]


def shape_of(model: PreTrainedModel, sub_experts: int) -> Shape:
    """What a manifest says about the model's MoE layers. Raises RecipeRefused if they cannot be cut evenly."""
    modules = experts_modules(model)
    experts, neurons, hidden = fused_projections(modules[0][1])[0].shape
    if neurons % sub_experts:
        raise RecipeRefused(f"{neurons} neurons an expert cannot be cut into {sub_experts} equal sub-experts")
    return Shape(
        moe_layers=[layer for layer, _ in modules],
        experts=experts,
        top_k=model.config.get_text_config().num_experts_per_tok,
        neurons=neurons,
        hidden=hidden,
        sub_experts=sub_experts,
        neurons_per_sub_expert=neurons // sub_experts,
        norm_topk_prob=_normalises_top_k(model),
    )


def _normalises_top_k(model: PreTrainedModel) -> bool:
    """Whether router weights sum to one; Mixtral and GPT-OSS always normalise and have no switch for it."""
    config = model.config.get_text_config()
    return bool(getattr(config, "norm_topk_prob", config.model_type in ("mixtral", "gpt_oss")))


def _perm(run: Run, partitioner: Partitioner, task: PartitionTask) -> Tensor:
    return run.work.run(partitioner.stage(task), partial(partitioner.partition, task)).tensors["perm"]
