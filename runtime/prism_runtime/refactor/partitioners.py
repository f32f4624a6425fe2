"""The partition's stages by policy: which tasks there are, what they read, and what each computes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from prism_runtime.refactor.calibration import Calibration
from prism_runtime.refactor.elastic import ElasticMethod
from prism_runtime.refactor.fit import CENTRE_BUDGET, centre, fit_gates, partition_settings, token_factors
from prism_runtime.refactor.layer_search import Limits, partition_layer
from prism_runtime.refactor.paper import PaperSettings, fit_paper
from prism_runtime.refactor.partition import by_energy
from prism_runtime.refactor.pipeline import Partitioner, PartitionTask, Run, partition_stages, perms_of
from prism_runtime.refactor.stages import Output, Stage, seed_of
from prism_runtime.refactor.thresholds import calibrate_thresholds, everything


def partitioners_of(run: Run, calibration: Calibration) -> list[Partitioner]:
    """The passes of the request's policy; the last one gives the partition."""
    if run.request.policy == "prism":
        first = SwapPartitioner(run, calibration)
        return [first, CentredPartitioner(run, calibration, first)] if calibration.settings.centred else [first]
    made: dict[str, Callable[[Run, Calibration], Partitioner]] = {
        "paper": PaperPartitioner,
        "sorted": SortedPartitioner,
        "random": RandomPartitioner,
    }
    return [made[run.request.policy](run, calibration)]


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
        return Output({"perm": by_energy(energy)})


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


def _searched(
    calibration: Calibration,
    task: PartitionTask,
    *,
    limits: Limits,
    factor: Tensor | None = None,
    means: Tensor | None = None,
    start: Tensor | None = None,
) -> Output:
    """The swap search for one task's experts; arguments as of `partition_layer`."""
    layer = task.layer
    perm = partition_layer(
        calibration.experts[layer],
        calibration.ordinary[layer],
        calibration.forms[layer],
        partition_settings(calibration.settings),
        limits=limits,
        layer=layer,
        factor=factor,
        means=means,
        start=start,
        threads=1,
        chosen=task.experts,
    )
    return Output({"perm": perm})


class SwapPartitioner(_Expertwise):
    """The swap search: the first of two passes, or the only one."""

    def prepare(self) -> None:
        self._calibration.ensure_metric()
        _ = self._calibration.masked, self._calibration.limits

    def stage(self, task: PartitionTask) -> Stage:
        return Stage.of(task.name, {"policy": "prism"}, self._calibration.limits_stage)

    def partition(self, task: PartitionTask) -> Output:
        return _searched(self._calibration, task, limits=self._calibration.limits)


class CentredPartitioner(_Expertwise):
    """The second pass of the swap search: from the first one's result, on what compensation will leave to lose."""

    def __init__(self, run: Run, calibration: Calibration, first: SwapPartitioner) -> None:
        super().__init__(run, calibration)
        self._first = first
        settings = calibration.settings
        parameters = {
            "gate": settings.gate,
            "token_factor": settings.token_factor,
            "kappa": settings.kappa,
            "allocation": settings.allocation,
            "budget": CENTRE_BUDGET,
        }
        self._centre_stage = Stage.of("centre", parameters, *partition_stages(first))

    def prepare(self) -> None:
        self._first.prepare()
        self._perms = perms_of(self._run, self._first)
        centre_output = self._run.work.run(self._centre_stage, self._measure_centre)
        self._means = [centre_output.tensors[f"{layer}.means"] for layer in range(len(self._perms))]
        self._factors = [centre_output.tensors[f"{layer}.factor"] for layer in range(len(self._perms))]
        facts = centre_output.facts
        self._limits = Limits(tuple(facts["energy"]), tuple(facts["weights"]))

    def stage(self, task: PartitionTask) -> Stage:
        return Stage.of(f"centred-{task.name}", {"policy": "prism"}, self._centre_stage)

    def partition(self, task: PartitionTask) -> Output:
        layer = task.layer
        return _searched(
            self._calibration,
            task,
            limits=self._limits,
            factor=self._factors[layer],
            means=self._means[layer],
            start=self._perms[layer],
        )

    def _measure_centre(self) -> Output:
        calibration, settings = self._calibration, self._calibration.settings
        self._run.reporter.say("measure what half a budget drops")
        calibration.masked.permute(self._perms)
        tokens = [calibration.token_factor(layer) for layer in range(len(self._perms))]
        gates = fit_gates(calibration.masked, calibration.rows, calibration.forms, tokens, settings)
        every = ElasticMethod(gates, everything(len(gates)))
        by_layer = settings.allocation == "layer"
        held = self._run.texts.held
        bare = calibrate_thresholds(calibration.masked, held, every, CENTRE_BUDGET, by_layer=by_layer)
        found = centre(
            calibration.masked, calibration.ordinary, calibration.forms, bare, self._perms, settings.sub_experts
        )
        tensors = {f"{layer}.means": means for layer, means in enumerate(found.means)}
        for layer, (rows, gate) in enumerate(zip(calibration.ordinary, gates, strict=True)):
            tensors[f"{layer}.factor"] = token_factors(rows, gate)
        return Output(tensors, {"energy": found.limits.energy, "weights": found.limits.weights})


class PaperPartitioner:
    """MoE-Prism's own partition, whole layers at a time; its gate neurons are kept for the evaluation."""

    def __init__(self, run: Run, calibration: Calibration) -> None:
        self._run, self._calibration = run, calibration

    def prepare(self) -> None:
        self._calibration.ensure_rows()
        _ = self._calibration.masked

    def tasks(self) -> Sequence[PartitionTask]:
        shape = self._run.shape
        return [PartitionTask(layer, range(shape.experts)) for layer in range(len(shape.moe_layers))]

    def stage(self, task: PartitionTask) -> Stage:
        parameters = {"policy": "paper", "sub_experts": self._run.shape.sub_experts, "seed": self._run.request.seed}
        return Stage.of(task.name, parameters, self._calibration.rows_stages[task.layer])

    def partition(self, task: PartitionTask) -> Output:
        settings = PaperSettings(self._run.shape.sub_experts, seed=self._run.request.seed)
        experts, rows = self._calibration.experts[task.layer], self._calibration.ordinary[task.layer]
        fitted = fit_paper(experts, rows, settings, layer=task.layer)
        return Output({"perm": fitted.perm, "gate_neurons": fitted.gate_neurons})
