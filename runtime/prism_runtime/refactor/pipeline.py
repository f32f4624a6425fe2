"""The stages of a refactoring, from text to measured points, and which of them a shard may run.

    saliency ──► partition (layer, expert) ──► quality (point)
    one pass     what shards divide            what is left to merge

A stage's name holds what it depends on, so any process may run any stage at any time, also twice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prism_api.manifest import CalibrationText, Divergence, Shape
from prism_runtime.engine.experts_hook import experts_modules, fused_projections
from prism_runtime.engine.model import load_pretrained
from prism_runtime.kernels.plan import PlanTables
from prism_runtime.refactor.calibrate import calibrate
from prism_runtime.refactor.evaluate import PointQuality, evaluate_points, require_spread
from prism_runtime.refactor.partition import Partition, Saliency
from prism_runtime.refactor.progress import Advance, Reporter
from prism_runtime.refactor.request import RecipeRefused, RefactorRequest
from prism_runtime.refactor.stages import Output, Shard, Stage, WorkFolder, seed_of
from prism_runtime.refactor.text import TokenSequence, cut_sequences, hold_out, provenance, read_documents
from prism_runtime.refactor.trace import PackedModel

SEQUENCE_LENGTH = 256
SEQUENCES_PER_DOMAIN = 64
"""Gives a standard error of 1 % of the KL at half budget on the embedded model, in minutes on one core."""
WHOLE = Shard(0, 1)


class Texts:
    """Token sequences to calibrate on and to measure quality on, disjoint by document."""

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
        self.length = length
        self.calibration: Sequence[TokenSequence] = cut_sequences(documents, tokenizer, length, SEQUENCES_PER_DOMAIN)
        self.evaluation: Sequence[TokenSequence] = cut_sequences(held, tokenizer, length, SEQUENCES_PER_DOMAIN)
        require_spread([each.domain for each in self.evaluation])  # minutes before the evaluation would find out
        self.provenance: list[CalibrationText] = provenance(request.calibration, documents, self.calibration)


class Pipeline:
    """One request's stages over one work folder. The model is loaded at once, and held as float32."""

    def __init__(self, request: RefactorRequest, work: WorkFolder, reporter: Reporter) -> None:
        """Raises RecipeRefused, TextRefused or UnsupportedModel before anything is computed."""
        torch.set_num_threads(request.threads)
        self._request, self._work, self._reporter = request, work, reporter
        self._root = request.identity()
        self._model, tokenizer = load_pretrained(request.model)
        self.shape = shape_of(self._model, request.sub_experts)
        self.architecture = type(self._model).__name__
        length = min(SEQUENCE_LENGTH, self._model.config.get_text_config().max_position_embeddings)
        self.texts = Texts(request, tokenizer, length)

    # -- saliency: one pass over the calibration text ------------------------------------------------------------

    @cached_property
    def saliency(self) -> list[Saliency]:
        """Of every MoE layer."""
        made = self._work.run(self._saliency_stage, self._measure_saliency).tensors
        return [Saliency(*(made[f"{layer}.{name}"] for name in Saliency.__slots__)) for layer in self.shape.moe_layers]

    @property
    def _saliency_stage(self) -> Stage:
        return Stage.of("saliency", {}, self._root)

    def _measure_saliency(self) -> Output:
        with self._reporter.bar("calibrate", len(self.texts.calibration), "sequences") as advance:
            measured = calibrate(self._model, self.texts.calibration, advance)
        return Output(
            {
                f"{layer}.{name}": getattr(saliency, name)
                for layer, saliency in zip(self.shape.moe_layers, measured, strict=True)
                for name in Saliency.__slots__
            }
        )

    # -- partition: one task for each (layer, expert) ------------------------------------------------------------

    def partition_tasks(self) -> list[tuple[int, int]]:
        """(index of the MoE layer, expert) in the order that shards divide."""
        return [(layer, expert) for layer in range(len(self.shape.moe_layers)) for expert in range(self.shape.experts)]

    def partition_stage(self, layer: int, expert: int) -> Stage:
        return Stage.of(f"partition-{layer}-{expert}", {}, self._saliency_stage)

    def run_partition(self, shard: Shard = WHOLE) -> int:
        """Run the shard's share of the partition tasks; returns their number."""
        tasks = self.partition_tasks()
        share = shard.share(len(tasks))
        with self._reporter.bar("partition", len(share), "experts") as advance:
            for task in share:
                self._perm(*tasks[task])
                advance(1)
        return len(share)

    def require_partition(self) -> None:
        """Raises WorkFolderRefused unless shards have made every partition."""
        self._work.require([self.partition_stage(*task) for task in self.partition_tasks()])

    def partitions(self) -> dict[int, Partition]:
        """By decoder layer. Runs what is missing."""
        self.run_partition()
        perms = [
            torch.stack([self._perm(layer, expert) for expert in range(self.shape.experts)])
            for layer in range(len(self.shape.moe_layers))
        ]
        return {
            decoder_layer: Partition.of(perm, saliency, self.shape.sub_experts)
            for decoder_layer, perm, saliency in zip(self.shape.moe_layers, perms, self.saliency, strict=True)
        }

    def _perm(self, layer: int, expert: int) -> Tensor:
        stage = self.partition_stage(layer, expert)
        return self._work.run(stage, partial(self._partition_expert, layer, expert)).tensors["perm"]

    def _partition_expert(self, layer: int, expert: int) -> Output:
        energy = self.saliency[layer].energy[expert]
        if self._request.policy == "sorted":
            perm = energy.argsort(descending=True, stable=True)
        else:
            generator = torch.Generator().manual_seed(seed_of(self._request.seed, layer, expert))
            groups = torch.randperm(len(energy), generator=generator).view(self.shape.sub_experts, -1)
            perm = groups[energy[groups].sum(1).argsort(descending=True, stable=True)].flatten()
        return Output({"perm": perm.to(torch.int32)})

    # -- quality: one task for each point ------------------------------------------------------------------------

    def quality(self, checkpoint: Path, counts: Mapping[int, Tensor]) -> dict[int, PointQuality]:
        """By per-mille, of prefix counts [L, K] on the permuted `checkpoint`: what is shipped, read back from disk."""
        partition = [self.partition_stage(*task) for task in self.partition_tasks()]
        stages = {
            permille: Stage.of(f"quality-{permille}", {"counts": count.tolist()}, self._root, *partition)
            for permille, count in counts.items()
        }
        done = {permille: self._work.find(stage) for permille, stage in stages.items()}
        if missing := [permille for permille, output in done.items() if output is None]:
            tables = PlanTables.prefix(torch.stack(list(counts.values())), self.shape.sub_experts)
            packed = PackedModel(load_pretrained(checkpoint)[0], tables)
            total = len(missing) * len(self.texts.evaluation)
            with self._reporter.bar("evaluate", total, "sequences") as advance:
                for permille in missing:
                    point, full = list(counts).index(permille), len(counts) - 1
                    task = partial(self._evaluate, packed, point, full, advance)
                    done[permille] = self._work.run(stages[permille], task)
        return {permille: _quality_of(output.facts) for permille, output in done.items() if output is not None}

    def _evaluate(self, packed: PackedModel, point: int, full: int, advance: Advance) -> Output:
        quality = evaluate_points(packed, self.texts.evaluation, [point], full, advance)[point]
        return Output(facts=asdict(quality) | {"kl": quality.kl.to_wire()})


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


def _quality_of(facts: Mapping[str, Any]) -> PointQuality:
    return PointQuality(**{**facts, "kl": Divergence.model_validate(facts["kl"])})
