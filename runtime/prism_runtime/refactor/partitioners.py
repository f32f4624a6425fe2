"""The partition's stages by policy: which tasks there are, what they read, and what each computes."""

from collections.abc import Callable, Sequence
from functools import cached_property

import torch

from prism_runtime.refactor.calibration import Calibration
from prism_runtime.refactor.layer_search import PartitionSettings, partition_layer
from prism_runtime.refactor.paper import PaperSettings, fit_paper
from prism_runtime.refactor.pipeline import Partitioner, PartitionTask, Run
from prism_runtime.refactor.stages import Output, Stage, seed_of


def partitioner_of(run: Run, calibration: Calibration) -> Partitioner:
    """Of the request's policy."""
    made: dict[str, Callable[[Run, Calibration], Partitioner]] = {
        "prism": SwapPartitioner,
        "paper": PaperPartitioner,
        "sorted": SortedPartitioner,
        "random": RandomPartitioner,
    }
    return made[run.request.policy](run, calibration)


class _Expertwise:
    """Tasks of one expert each."""

    def __init__(self, run: Run, calibration: Calibration) -> None:
        self._run, self._calibration = run, calibration

    def tasks(self) -> Sequence[PartitionTask]:
        shape = self._run.shape
        return [
            PartitionTask(layer, range(expert, expert + 1))
            for layer in range(len(shape.moe_layers))
            for expert in range(shape.experts)
        ]


class SortedPartitioner(_Expertwise):
    """Neurons by router-weighted energy, highest first."""

    def prepare(self) -> None:
        _ = self._calibration.saliency

    def stage(self, task: PartitionTask) -> Stage:
        return Stage.of(task.name, {"policy": "sorted"}, self._calibration.saliency_stage)

    def partition(self, task: PartitionTask) -> Output:
        energy = self._calibration.saliency[task.layer].energy[list(task.experts)]
        return Output({"perm": energy.argsort(dim=1, descending=True, stable=True).to(torch.int32)})


class RandomPartitioner(_Expertwise):
    """Neurons at random, sub-experts by energy: what cutting alone gives."""

    def prepare(self) -> None:
        _ = self._calibration.saliency

    def stage(self, task: PartitionTask) -> Stage:
        parameters = {"policy": "random", "seed": self._run.request.seed}
        return Stage.of(task.name, parameters, self._calibration.saliency_stage)

    def partition(self, task: PartitionTask) -> Output:
        (expert,) = task.experts
        energy = self._calibration.saliency[task.layer].energy[expert]
        generator = torch.Generator().manual_seed(seed_of(self._run.request.seed, task.layer, expert))
        groups = torch.randperm(len(energy), generator=generator).view(self._run.shape.sub_experts, -1)
        perm = groups[energy[groups].sum(1).argsort(descending=True, stable=True)].flatten()
        return Output({"perm": perm.to(torch.int32)[None]})


class SwapPartitioner(_Expertwise):
    """The swap search in the metric of the request."""

    @cached_property
    def _settings(self) -> PartitionSettings:
        return PartitionSettings(self._run.shape.sub_experts, seed=self._run.request.seed)

    def prepare(self) -> None:
        self._calibration.ensure_metric()
        self._limits = self._calibration.limits(self._settings)
        _ = self._calibration.experts

    def stage(self, task: PartitionTask) -> Stage:
        settings = self._settings
        parameters = {"policy": "prism", "proposals": settings.proposals, "rows": settings.rows}
        return Stage.of(task.name, parameters, self._calibration.limits_stage(settings))

    def partition(self, task: PartitionTask) -> Output:
        experts, rows = self._calibration.experts[task.layer], self._calibration.rows(task.layer)
        perm = partition_layer(
            experts,
            rows,
            self._calibration.metric(task.layer).form,
            self._settings,
            limits=self._limits,
            layer=task.layer,
            threads=1,
            chosen=task.experts,
        )
        return Output({"perm": perm})


class PaperPartitioner:
    """MoE-Prism's own partition, whole layers at a time; its gate neurons are kept for the evaluation."""

    def __init__(self, run: Run, calibration: Calibration) -> None:
        self._run, self._calibration = run, calibration

    def prepare(self) -> None:
        self._calibration.ensure_rows()
        _ = self._calibration.experts

    def tasks(self) -> Sequence[PartitionTask]:
        shape = self._run.shape
        return [PartitionTask(layer, range(shape.experts)) for layer in range(len(shape.moe_layers))]

    def stage(self, task: PartitionTask) -> Stage:
        parameters = {"policy": "paper", "sub_experts": self._run.shape.sub_experts, "seed": self._run.request.seed}
        return Stage.of(task.name, parameters, self._calibration.rows_stages[task.layer])

    def partition(self, task: PartitionTask) -> Output:
        settings = PaperSettings(self._run.shape.sub_experts, seed=self._run.request.seed)
        experts, rows = self._calibration.experts[task.layer], self._calibration.rows(task.layer)
        fitted = fit_paper(experts, rows, settings, layer=task.layer)
        return Output({"perm": fitted.perm, "gate_neurons": fitted.gate_neurons})
