"""The searches of `swap.c` in NumPy: what runs where no compiler is, and what the C is tested against, bit for bit.

Every sum follows the order that `swap.c` states, hence `accumulate` and never `sum`, whose order NumPy chooses.
"""

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt

BLOCK, LANES = 256, 16

Values = npt.NDArray[np.floating]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Part = npt.NDArray[np.int32]


class Search(ABC):
    """The search loop, over an objective that the two subclasses hold. rows [blocks, C, BLOCK]."""

    def __init__(self, rows: Values, sub_experts: int) -> None:
        self.rows, self.sub_experts = rows, sub_experts
        self.members: list[npt.NDArray[np.int64]] = []

    @abstractmethod
    def refresh(self) -> float:
        """The objective, from the members alone."""

    @abstractmethod
    def propose(self, groups: tuple[int, int], pair: tuple[int, int], block: int, delta: float) -> float:
        """`delta` plus what exchanging the pair adds in one block; remembered for `take`."""

    @abstractmethod
    def take(self, groups: tuple[int, int]) -> None:
        """The last proposal becomes the state."""

    def run(
        self,
        part: Part,
        pairs: Part,
        slack: Doubles,
        screen: bool,
        rotate_every: int,
        refresh_every: int,
        deltas: Doubles,
    ) -> tuple[float, float]:
        """Turns `part` into the best state seen, fills `deltas`; objectives of the start and of the result."""
        start, current, accepted = part.copy(), part.copy(), 0
        self._place(current)
        size = len(self.members[0])
        total = first = best = self.refresh()
        for k, (one, draw) in enumerate(pairs.tolist()):
            group = int(current[one])
            place = draw if draw < group * size else draw + size
            other = int(self.members[place // size][place % size])
            groups, delta = (group, place // size), 0.0
            for step in range(len(self.rows)):
                block = (k // rotate_every + step) % len(self.rows)
                delta = self.propose(groups, (one, other), block, delta)
                if screen and not delta < slack[k]:
                    break
            deltas[k] = delta
            if not delta < slack[k]:
                continue
            self.take(groups)
            self.members[groups[0]][self.members[groups[0]] == one] = other
            self.members[groups[1]][self.members[groups[1]] == other] = one
            current[one], current[other] = groups[1], groups[0]
            accepted += 1
            total = total + delta if accepted % refresh_every else self.refresh()
            if total < best:
                best, part[:] = total, current
        self._place(part)
        last = self.refresh()
        if not last < first:
            part[:], last = start, first
        return first, last

    def _place(self, part: Part) -> None:
        self.members = [np.flatnonzero(part == group) for group in range(self.sub_experts)]


class EnergySearch(Search):
    """Sum over rows, sub-experts and limits of weight * min(b_n' G_nn b_n, limit). All of it float32."""

    def __init__(self, rows: Values, gram: Floats, limit: Floats, weight: Floats, sub_experts: int) -> None:
        super().__init__(rows, sub_experts)
        self.gram, self.limit, self.weight = gram, limit, weight
        self.energy = np.zeros((sub_experts, len(rows), BLOCK), np.float32)
        self.cost = np.zeros((sub_experts, len(rows)))
        self.after, self.after_cost = np.zeros((2, len(rows), BLOCK), np.float32), np.zeros((2, len(rows)))

    def refresh(self) -> float:
        objective = 0.0
        for group, members in enumerate(self.members):
            gram = self.gram[np.ix_(members, members)]
            for block, rows in enumerate(self.rows[:, members]):
                products = np.stack([_neuron_sum(weights[:, None] * rows) for weights in gram])
                energy = _neuron_sum(rows * products)
                self.energy[group, block] = np.where(energy > 0, energy, np.float32(0))
                self.cost[group, block] = self._cost(self.energy[group, block])
                objective += float(self.cost[group, block])
        return objective

    def propose(self, groups: tuple[int, int], pair: tuple[int, int], block: int, delta: float) -> float:
        two = np.float32(2)
        for side, (leaves, enters) in enumerate((pair, pair[::-1])):
            group, members = groups[side], self.members[groups[side]]
            rows, out, into = self.rows[block][members], self.rows[block][leaves], self.rows[block][enters]
            left = _neuron_sum(self.gram[leaves, members][:, None] * rows)
            joined = _neuron_sum(self.gram[enters, members][:, None] * rows)
            lost = out * (two * left - self.gram[leaves, leaves] * out)
            cross = two * (joined - self.gram[leaves, enters] * out)
            energy = (self.energy[group, block] - lost) + into * (cross + self.gram[enters, enters] * into)
            self.after[side, block] = np.where(energy > 0, energy, np.float32(0))
            self.after_cost[side, block] = self._cost(self.after[side, block])
            delta += float(self.after_cost[side, block] - self.cost[group, block])
        return delta

    def take(self, groups: tuple[int, int]) -> None:
        for side, group in enumerate(groups):
            self.energy[group], self.cost[group] = self.after[side], self.after_cost[side]

    def _cost(self, energy: Floats) -> float:
        cost = np.zeros(BLOCK, np.float32)
        for limit, weight in zip(self.limit, self.weight, strict=True):
            cost += weight * np.where(energy < limit, energy, limit)
        return _row_sum(cost)


class MassSearch(Search):
    """Sum over rows of the `off` smallest of the sub-experts' sums of rows. All of it float64."""

    def __init__(self, rows: Values, off: int, sub_experts: int) -> None:
        super().__init__(rows, sub_experts)
        self.off = off
        self.mass = np.zeros((len(rows), sub_experts, BLOCK))
        self.after = np.zeros_like(self.mass)
        self.cost, self.after_cost = np.zeros(len(rows)), np.zeros(len(rows))

    def refresh(self) -> float:
        objective = 0.0
        for block, rows in enumerate(self.rows):
            for group, members in enumerate(self.members):
                self.mass[block, group] = _neuron_sum(rows[members])
            self.cost[block] = self._cost(self.mass[block])
            objective += float(self.cost[block])
        return objective

    def propose(self, groups: tuple[int, int], pair: tuple[int, int], block: int, delta: float) -> float:
        moved = self.rows[block, pair[1]] - self.rows[block, pair[0]]
        self.after[block] = self.mass[block]
        self.after[block, groups[0]] += moved
        self.after[block, groups[1]] -= moved
        self.after_cost[block] = self._cost(self.after[block])
        return delta + float(self.after_cost[block] - self.cost[block])

    def take(self, groups: tuple[int, int]) -> None:
        self.mass[:], self.cost[:] = self.after, self.after_cost

    def _cost(self, mass: Doubles) -> float:
        return _row_sum(_neuron_sum(np.sort(mass, axis=0)[: self.off]))


def _neuron_sum(terms: Values) -> Values:
    """[neurons, rows] -> [rows], one neuron after the other."""
    return np.add.accumulate(terms, axis=0)[-1]


def _row_sum(values: Values) -> float:
    """[BLOCK] -> sum, in interleaved lanes."""
    lanes = np.add.accumulate(values.astype(np.float64).reshape(-1, LANES), axis=0)[-1]
    return float(np.add.accumulate(lanes)[-1])
