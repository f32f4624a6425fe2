"""The sub-expert gate: a ridge regression of the logarithm of a sub-expert's output norm on the experts' input.

The logarithm is what a threshold compares, and its error does not grow with the norm. Norms are those of a metric
[H, H] (see `metric.py`), which makes one unit mean the same in every layer.
"""

from typing import Literal

import torch
from torch import Tensor

from prism_runtime.kernels.contract import GateWeights
from prism_runtime.refactor.masked import Experts, LayerRows
from prism_runtime.refactor.metric import ordinary
from prism_runtime.refactor.ridge import RidgeSums, with_ones

GateKind = Literal["ridge", "pca", "prior"]
"""How a gate predicts: from all of the experts' input, from its leading components, or alike for every token."""

COMPONENTS = 64
"""Of gate "pca". They are folded into the gate's weight, so it costs what "ridge" costs: it needs fewer rows."""
CERTAIN = 1.7
"""A kappa for gates whose deviation is zero: any will do, no output is ever computed."""
PENALTY = 1e-3
STRONGER_PENALTIES = (1e-2, 1e-1, 1.0)
ROWS_PER_FEATURE = 20
"""With fewer rows, the penalty is chosen on rows that the fit has not seen; with more, it hardly matters."""
ENERGY_FLOOR = 1e-4
"""Of the mean energy: the logarithm of a vanishing norm must not dominate the fit."""


class EnergyForm:
    """Energies o' F o of one expert's sub-experts, o = h W their outputs before the router weight."""

    def __init__(self, down: Tensor, metric: Tensor, sub_experts: int) -> None:
        """down [C, H], metric [H, H] positive semidefinite."""
        cut = down.view(sub_experts, -1, down.shape[1])
        gram = cut @ metric @ cut.transpose(1, 2)
        scale = gram.diagonal(dim1=1, dim2=2).mean(-1).clamp(min=torch.finfo(gram.dtype).tiny)
        jitter = 1e-6 * scale[:, None, None] * torch.eye(gram.shape[1])
        self._factor = torch.linalg.cholesky(gram + jitter)

    def energies(self, activations: Tensor) -> Tensor:
        """[R, C] -> [R, N]."""
        sub_experts, width, _ = self._factor.shape
        cut = activations.view(-1, sub_experts, width).transpose(0, 1)
        return torch.bmm(cut, self._factor).square().sum(-1).t()


def fit_gate(
    experts: Experts,
    rows: LayerRows,
    metric: Tensor,
    sub_experts: int,
    token: Tensor | None,
    kappa: float | None,
    kind: GateKind = "ridge",
) -> GateWeights:
    """The gate of one layer; experts are permuted. Weights are rounded to bfloat16, as artifacts store them.

    The bias is raised so that the mean of the predicted energies is the mean energy: a mean of logarithms lies below.
    """
    count, neurons, hidden = experts.down.shape
    weight = torch.zeros(count, sub_experts, hidden)
    bias, mean, deviation = (torch.zeros(count, sub_experts) for _ in range(3))
    rows = rows.select(ordinary(rows.rms))
    components = _leading(rows.x) if kind == "pca" else None
    for expert in range(count):
        x = rows.x[rows.routed(expert)[0]]
        form = EnergyForm(experts.down[expert], metric, sub_experts)
        if not len(x):
            # Never seen: weights alone say which sub-expert weighs more.
            bias[expert] = mean[expert] = 0.5 * form.energies(torch.eye(neurons)).sum(0).clamp(min=1e-30).log()
            continue
        energy = form.energies(experts.activations(x, expert))
        average = energy.mean(0).clamp(min=1e-30)
        if kind == "prior":
            bias[expert] = mean[expert] = 0.5 * average.log()
            continue
        target = 0.5 * (energy + ENERGY_FLOOR * average).log()
        if components is None:
            solved = _regress(with_ones(x), target)
        else:
            solved = _regress(with_ones(x @ components), target)
            solved = torch.cat((components @ solved[:-1], solved[-1:]))
        weight[expert] = solved[:-1].t().bfloat16().float()
        prediction = x @ weight[expert].t() + solved[-1]
        correction = 0.5 * (average / (2 * prediction).exp().mean(0)).log()
        bias[expert] = solved[-1] + correction
        prediction += correction
        mean[expert] = prediction.mean(0)
        deviation[expert] = prediction.std(0, correction=0)
    return GateWeights(weight, bias, mean, deviation, token, kappa_of(kind, kappa))


def kappa_of(kind: GateKind, kappa: float | None) -> float | None:
    """The kappa of a gate for which `kappa` was asked."""
    return CERTAIN if kappa is None and kind == "prior" else kappa


def _leading(x: Tensor) -> Tensor:
    """[H, q]: directions in which the rows vary most about zero, by falling size."""
    _, vectors = torch.linalg.eigh((x.t() @ x).double())
    return vectors[:, -COMPONENTS:].flip(1).float()


def _regress(features: Tensor, target: Tensor) -> Tensor:
    """[F, N] ridge coefficients."""

    def fitted(rows: slice, penalty: float) -> Tensor:
        sums = RidgeSums(features.shape[1], target.shape[1])
        sums.add(features[rows], target[rows])
        return sums.solve(penalty)

    def held_error(penalty: float) -> float:
        unseen = slice(1, None, 2)
        return float((features[unseen] @ fitted(slice(0, None, 2), penalty) - target[unseen]).square().sum())

    penalty = PENALTY
    if 1 < len(features) < ROWS_PER_FEATURE * features.shape[1]:
        penalty = min((PENALTY, *STRONGER_PENALTIES), key=held_error)
    return fitted(slice(None), penalty)
