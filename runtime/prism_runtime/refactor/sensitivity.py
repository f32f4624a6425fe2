"""How much an output error of one size matters at one token: a linear fit to the size of the gradient there."""

import torch
from torch import Tensor

from prism_runtime.kernels.selection import RMS_FLOOR
from prism_runtime.refactor.masked import LayerRows
from prism_runtime.refactor.metric import ordinary
from prism_runtime.refactor.ridge import RidgeSums

PENALTY = 1e-3
FLOOR = 0.03
"""Of the mean: a gradient that happens to be zero must not dominate the fit of logarithms."""


def fit_token_factor(rows: LayerRows, power: Tensor) -> Tensor:
    """[H + 3]: weights of [x, R, log R, 1] that predict log(R^2 |G|^2), less its mean.

    power [T] is the mean of |G|^2, G the gradient at the layer's output, R the residual's rms. The logarithm of the
    factor is then `kernels.selection.log_token_factor`.
    """
    rms = rows.rms.clamp(min=RMS_FLOOR)
    scaled = rms.square() * power
    target = (scaled + FLOOR * scaled.mean()).log()
    features = torch.cat((rows.x, rms[:, None], rms.log()[:, None], torch.ones(len(rms), 1)), 1).double()
    kept = ordinary(rms)
    sums = RidgeSums(features.shape[1], 1)
    sums.add(features[kept], target[kept, None].double())
    weight = sums.solve(PENALTY)[:, 0]
    weight[-1] -= (features[kept] @ weight.double()).mean().float()
    return weight
