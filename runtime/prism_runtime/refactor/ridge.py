"""Ridge regression from sums over rows, so that rows need not be held."""

import torch
from torch import Tensor


class RidgeSums:
    """Weighted sums of features [R, F] and targets [R, Y] in float64."""

    def __init__(self, features: int, targets: int) -> None:
        self.gram = torch.zeros(features, features, dtype=torch.float64)
        self._moment = torch.zeros(features, targets, dtype=torch.float64)

    def add(self, features: Tensor, targets: Tensor, row_weights: Tensor | None = None) -> None:
        """Products are taken in the rows' own type; weights [R] multiply squared errors."""
        weighted = features if row_weights is None else features * row_weights[:, None]
        self.gram += (weighted.t() @ features).double()
        self._moment += (weighted.t() @ targets).double()

    def solve(self, penalty: float, blocks: tuple[int, ...] = ()) -> Tensor:
        """[F, Y] float32. The penalty is relative to the mean diagonal of each block of features.

        blocks  sizes of consecutive groups of features that are scaled alike; none: one group
        """
        diagonal = self.gram.diagonal()
        scale = torch.cat([part.mean().expand(len(part)) for part in diagonal.split(list(blocks) or [len(diagonal)])])
        # A feature that never occurred has no scale; one keeps the system solvable and its coefficient zero.
        added = penalty * torch.where(scale > 0, scale, torch.ones_like(scale))
        return torch.linalg.solve(self.gram + added.diag(), self._moment).float()


def with_ones(x: Tensor) -> Tensor:
    """[R, F] -> [R, F + 1]: a last column of ones."""
    return torch.cat((x, x.new_ones(len(x), 1)), 1)
