"""The tensors of an artifact's sidecar: their names, what a writer puts there, and what a reader insists on.

    mode [P] int32; layers.{l}.perm [E, C] int32; layers.{l}.count [P, K] int32
    with gates also:
    tau [P, L] float32 (logarithms); share [P, L] float32; cap [P] int32
    layers.{l}.gate.weight [E, N, H] bfloat16; .gate.bias, .gate.mean, .gate.deviation [E, N] float32
    layers.{l}.token.weight [H + 3] float32, in every layer or none
    layers.{l}.comp.{p}.A [H + 1, r], .U [r, H], .c [E, N, r] float32, for the points p that are compensated

P operating points in manifest order, L MoE layers, {l} a decoder layer, {p} a position in manifest order. Names beyond
these are ignored.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from prism_api import FULL
from prism_api.manifest import Manifest
from prism_runtime.kernels.contract import CompensationWeights, GatedLayer, GateWeights
from prism_runtime.kernels.plan import BATCH, PREFIX, THRESHOLD, UNCAPPED, PlanTables

GATE_KIND = "logRidge"
"""Value of `gate.kind` in the manifest: linear in x, predicts the logarithm of the norm. Beside it stands `kappa`."""

COMPENSATION = re.compile(r"layers\.(\d+)\.comp\.(\d+)\.(A|U|c)$")


class SidecarRefused(ValueError):
    """The sidecar does not hold what the manifest promises; the message names the tensor."""


@dataclass(frozen=True, slots=True)
class GatedPoint:
    """One operating point that a gate selects for; L values, one a MoE layer.

    log_tau       [L]  thresholds; the point runs in threshold mode unless `share` is given
    share         [L]  share of the cells that runs: the point runs in batch mode
    compensation       one a layer, or None
    cap                most cells of a row and layer, or UNCAPPED
    """

    log_tau: Tensor
    share: Tensor | None = None
    compensation: Sequence[CompensationWeights] | None = None
    cap: int = UNCAPPED


@dataclass(frozen=True, slots=True)
class GatedRecipe:
    """What a fitted recipe adds to prefixes: a gate a layer, and its points by their position in manifest order.

    Positions without an entry stay prefixes. All gates have a token factor or none, and one kappa.
    """

    gates: Sequence[GateWeights]
    points: Mapping[int, GatedPoint]

    def manifest_entry(self, **features: Any) -> dict[str, Any]:
        """The manifest's `gate` for an artifact with this recipe; `features` say more to readers and are not read."""
        return {"kind": GATE_KIND, "kappa": self.gates[0].kappa, **features}


def gated_tensors(layers: Sequence[int], points: int, recipe: GatedRecipe) -> dict[str, Tensor]:
    """Sidecar tensors of a recipe, `mode` included; `layers` are the decoder layers, `points` P.

    The gate's weight is rounded to bfloat16: thresholds must have been fitted with the rounded one.
    """
    shape = (points, len(layers))
    mode = torch.full((points,), PREFIX, dtype=torch.int32)
    tau, share, cap = torch.zeros(shape), torch.ones(shape), torch.full_like(mode, UNCAPPED)
    tensors: dict[str, Tensor] = {"mode": mode, "tau": tau, "share": share, "cap": cap}
    for position, point in recipe.points.items():
        mode[position] = THRESHOLD if point.share is None else BATCH
        tau[position], cap[position] = point.log_tau, point.cap
        if point.share is not None:
            share[position] = point.share
    for index, (layer, gate) in enumerate(zip(layers, recipe.gates, strict=True)):
        tensors[f"layers.{layer}.gate.weight"] = gate.weight.to(torch.bfloat16).contiguous()
        for name in ("bias", "mean", "deviation"):
            tensors[f"layers.{layer}.gate.{name}"] = getattr(gate, name).float().contiguous()
        if gate.token is not None:
            tensors[f"layers.{layer}.token.weight"] = gate.token.float().contiguous()
        for position, point in recipe.points.items():
            if point.compensation is not None:
                one = point.compensation[index]
                for name, tensor in (("A", one.a), ("U", one.u), ("c", one.c)):
                    tensors[f"layers.{layer}.comp.{position}.{name}"] = tensor.float().contiguous()
    return tensors


# -- reading -----------------------------------------------------------------------------------------------------


def verify_sidecar(sidecar: Mapping[str, Tensor], manifest: Manifest) -> None:
    """Raises SidecarRefused unless every tensor that the manifest's shape and points need is there, of its dtype and
    shape, finite and in range, and `full` runs everything."""
    shape = manifest.shape
    for name, dtype, size in _expected(sidecar, manifest):
        found = sidecar.get(name)
        if found is None or found.dtype != dtype or tuple(found.shape) != size:
            have = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise SidecarRefused(f"must hold '{name}' as {dtype} {list(size)}; found {have}")
        if found.is_floating_point() and not found.isfinite().all():
            raise SidecarRefused(f"holds values in '{name}' that are not finite")
    identity = torch.arange(shape.neurons, dtype=torch.int32).expand(shape.experts, -1)
    for layer in shape.moe_layers:
        if not torch.equal(sidecar[f"layers.{layer}.perm"].sort(1).values, identity):
            raise SidecarRefused(f"'layers.{layer}.perm' is not a permutation of {shape.neurons} neurons")
        deviation = sidecar.get(f"layers.{layer}.gate.deviation")
        if deviation is not None and (deviation < 0).any():
            raise SidecarRefused(f"'layers.{layer}.gate.deviation' has negative values")
    try:
        tables = tables_of(sidecar, manifest)
    except ValueError as error:
        raise SidecarRefused(f"is not usable: {error}") from error
    if tables.mode[-1] != PREFIX or not (tables.count[-1] == shape.sub_experts).all():
        raise SidecarRefused(f"makes '{FULL}' run less than all {shape.sub_experts} sub-experts")


def tables_of(sidecar: Mapping[str, Tensor], manifest: Manifest) -> PlanTables:
    """What the operating points mean to the kernels, in ladder order. Raises ValueError for values out of range."""
    order = _ladder_order(manifest)
    count = torch.stack([sidecar[f"layers.{layer}.count"] for layer in manifest.shape.moe_layers], 1)[order]
    mode = sidecar["mode"][order]
    if not (mode != PREFIX).any():
        return PlanTables.prefix(count, manifest.shape.sub_experts)
    tau, share, cap = (sidecar[name][order] for name in ("tau", "share", "cap"))
    return PlanTables(mode, count.contiguous(), tau, share, cap, manifest.shape.sub_experts)


def gates_of(sidecar: Mapping[str, Tensor], manifest: Manifest) -> list[GatedLayer]:
    """Gate and compensation of every MoE layer, in float32; empty if all points are prefixes."""
    if not (sidecar["mode"] != PREFIX).any():
        return []
    positions = _ladder_order(manifest).tolist()
    gates = []
    for layer in manifest.shape.moe_layers:
        prefix = f"layers.{layer}"
        gate = GateWeights(
            weight=sidecar[f"{prefix}.gate.weight"].float(),
            bias=sidecar[f"{prefix}.gate.bias"],
            mean=sidecar[f"{prefix}.gate.mean"],
            deviation=sidecar[f"{prefix}.gate.deviation"],
            token=sidecar.get(f"{prefix}.token.weight"),
            kappa=manifest.gate["kappa"],
        )
        compensation = {
            point: CompensationWeights(*(sidecar[f"{prefix}.comp.{position}.{name}"] for name in ("A", "U", "c")))
            for point, position in enumerate(positions)
            if f"{prefix}.comp.{position}.A" in sidecar
        }
        gates.append(GatedLayer(gate, compensation))
    return gates


def check_gate_entry(manifest: Manifest, sidecar: Mapping[str, Tensor]) -> str | None:
    """What is wrong with the manifest's `gate` for the sidecar's selection modes, or None."""
    if "mode" not in sidecar or not (sidecar["mode"] != PREFIX).any():
        return None
    kind, kappa = manifest.gate.get("kind"), manifest.gate.get("kappa")
    if kind != GATE_KIND:
        return f"has a gate of kind {kind!r} for points with thresholds; this version runs '{GATE_KIND}'"
    number = isinstance(kappa, int | float) and not isinstance(kappa, bool)
    if kappa is not None and not (number and isfinite(kappa) and kappa > 0):
        return f"has gate.kappa {kappa!r}; it must be a number above 0, or null to evaluate every gate output"
    return None


def _ladder_order(manifest: Manifest) -> Tensor:
    names = [point.name for point in manifest.operating_points]
    return torch.tensor([names.index(name) for name in manifest.ladder.names])


def _expected(sidecar: Mapping[str, Tensor], manifest: Manifest) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
    """(name, dtype, shape) of every tensor that this sidecar must hold."""
    shape, points = manifest.shape, len(manifest.operating_points)
    yield "mode", torch.int32, (points,)
    for layer in shape.moe_layers:
        yield f"layers.{layer}.perm", torch.int32, (shape.experts, shape.neurons)
        yield f"layers.{layer}.count", torch.int32, (points, shape.top_k)
    if not (sidecar["mode"] != PREFIX).any():
        return
    per_layer = (points, len(shape.moe_layers))
    yield "tau", torch.float32, per_layer
    yield "share", torch.float32, per_layer
    yield "cap", torch.int32, (points,)
    cells = (shape.experts, shape.sub_experts)
    sensitive = any(name.endswith(".token.weight") for name in sidecar)
    for layer in shape.moe_layers:
        yield f"layers.{layer}.gate.weight", torch.bfloat16, (*cells, shape.hidden)
        for name in ("bias", "mean", "deviation"):
            yield f"layers.{layer}.gate.{name}", torch.float32, cells
        if sensitive:
            yield f"layers.{layer}.token.weight", torch.float32, (shape.hidden + 3,)
    yield from _expected_compensation(sidecar, manifest)


def _expected_compensation(
    sidecar: Mapping[str, Tensor], manifest: Manifest
) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
    """A point that is compensated anywhere must be in every layer, whole, and of one rank."""
    shape = manifest.shape
    ranks: dict[int, int] = {}
    for name in sorted(sidecar):
        if match := COMPENSATION.match(name):
            ranks.setdefault(int(match[2]), sidecar[name].shape[0 if match[3] == "U" else -1])
    for position, rank in ranks.items():
        if position >= len(manifest.operating_points) or sidecar["mode"][position] == PREFIX:
            raise SidecarRefused(f"has a compensation 'comp.{position}' for a point that has no gate")
        for layer in shape.moe_layers:
            prefix = f"layers.{layer}.comp.{position}"
            yield f"{prefix}.A", torch.float32, (shape.hidden + 1, rank)
            yield f"{prefix}.U", torch.float32, (rank, shape.hidden)
            yield f"{prefix}.c", torch.float32, (shape.experts, shape.sub_experts, rank)
