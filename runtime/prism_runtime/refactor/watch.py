"""A method that is looked over the shoulder: what its choices do to each layer's output, and for whom it runs what."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prism_runtime.refactor.baselines import OracleGate
from prism_runtime.refactor.method import Choice, Method, Slots


@dataclass(frozen=True, slots=True)
class Observation:
    """What was seen of one method, for each of L MoE layers.

    error      [L]  ||y - y_hat|| / ||y|| of the layer's routed output, root mean square over tokens
    captured   [L]  share of the sub-experts' energy that the kept ones hold, None without an oracle
    capturable [L]  the same if as many sub-experts had been picked by their true energy
    usage           domain -> [L, N], share of its routed slots in which sub-expert n ran
    """

    error: list[float]
    captured: list[float] | None
    capturable: list[float] | None
    usage: dict[str, list[list[float]]]


class Watch:
    """Chooses as `method` does and keeps sums; on the dense trajectory everything runs all the same.

    domains  domain of each sequence of the batch to come; set it before every forward
    oracle   knows the sub-experts' true norms on the partition that is watched
    """

    def __init__(
        self, method: Method, layers: int, sub_experts: int, *, dense: bool, oracle: OracleGate | None = None
    ) -> None:
        self.name = method.name
        self.domains: Sequence[str] = ()
        self._method, self._oracle, self._dense = method, oracle, dense
        self._sub_experts = sub_experts
        self._lost, self._whole = torch.zeros(layers), torch.zeros(layers)
        self._energy = torch.zeros(3, layers)  # kept, best of the same number, all
        self._ran: dict[str, Tensor] = {}
        self._slots: dict[str, Tensor] = {}

    def choose(self, slots: Slots) -> Choice:
        choice = self._method.choose(slots)
        everything = torch.ones_like(choice.keep)
        whole = _routed_output(slots, everything, slots.router_weights)
        point = _routed_output(slots, choice.keep, choice.router_weights)
        if choice.added is not None:
            point = point + choice.added
        self._lost[slots.layer] += (whole - point).square().sum()
        self._whole[slots.layer] += whole.square().sum()
        ran = choice.keep.unflatten(-1, (self._sub_experts, -1)).float().mean(-1)  # [T, K, N]
        self._count_usage(slots.layer, ran)
        if self._oracle is not None:
            self._count_energy(slots, ran)
        if not self._dense:
            return choice
        return Choice(everything, slots.router_weights, None, torch.zeros_like(choice.extra))

    def observation(self) -> Observation:
        kept, best, everything = self._energy
        return Observation(
            error=(self._lost / self._whole.clamp_min(1e-30)).sqrt().tolist(),
            captured=None if self._oracle is None else (kept / everything).tolist(),
            capturable=None if self._oracle is None else (best / everything).tolist(),
            usage={domain: (ran / self._slots[domain][:, None]).tolist() for domain, ran in self._ran.items()},
        )

    def _count_usage(self, layer: int, ran: Tensor) -> None:
        layers = len(self._lost)
        by_sequence = ran.unflatten(0, (len(self.domains), -1)).sum((1, 2))  # [B, N]
        for domain, sums in zip(self.domains, by_sequence, strict=True):
            self._ran.setdefault(domain, torch.zeros(layers, self._sub_experts))[layer] += sums
            slots = len(ran) // len(self.domains) * ran.shape[1]
            self._slots.setdefault(domain, torch.zeros(layers))[layer] += slots

    def _count_energy(self, slots: Slots, ran: Tensor) -> None:
        assert self._oracle is not None
        energy = (2 * self._oracle.log_scores(slots)).exp()
        kept = round(float(ran.sum()))
        best = energy.flatten().topk(kept).values.sum()
        self._energy[:, slots.layer] += torch.stack(((energy * ran).sum(), best, energy.sum()))


def _routed_output(slots: Slots, keep: Tensor, router_weights: Tensor) -> Tensor:
    """[T, H]: sum over the routed experts' kept neurons, without the down projection's bias."""
    output = torch.zeros_like(slots.x)
    weighted = slots.activations * keep * router_weights[..., None]
    for expert in slots.expert_ids.unique().tolist():
        token, rank = (slots.expert_ids == expert).nonzero(as_tuple=True)
        output.index_add_(0, token, weighted[token, rank] @ slots.down[expert])
    return output
