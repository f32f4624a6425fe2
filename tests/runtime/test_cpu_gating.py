"""The compiled choice of cells against the torch one that points were fitted with."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prism_runtime.kernels import cpu_gating, gating
from prism_runtime.kernels.contract import CompensationWeights, ExpertWeights, GatedLayer, GateWeights
from prism_runtime.kernels.plan import BATCH, PADDING, PREFIX, THRESHOLD, PlanTables, PlanTensor

WIDTH, NEURONS, RANK = 32, 4, 3
POINTS = (THRESHOLD, THRESHOLD, PREFIX, PREFIX)


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    assert cpu_gating.available(), "no C compiler: install gcc"


class Layer:
    """A random layer whose classes stand at two threshold points and two prefixes."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.experts, self.sub_experts = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 4]))
        tokens, self.top_k = draw(st.integers(1, 6)), draw(st.integers(1, self.experts))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        cells = (self.experts, self.sub_experts)
        gate = GateWeights(
            weight=random(*cells, WIDTH) / 8,
            bias=random(*cells),
            mean=random(*cells),
            deviation=random(*cells).abs(),
            token=random(WIDTH + 3) / 4 if draw(st.booleans()) else None,
            kappa=draw(st.sampled_from([None, 1.7])),
        )
        repair = CompensationWeights(random(WIDTH + 1, RANK), random(RANK, WIDTH), random(*cells, RANK))
        self.gated = GatedLayer(gate, {0: repair} if draw(st.booleans()) else {})
        biases = random(self.experts, WIDTH) if draw(st.booleans()) else None
        self.weights = ExpertWeights(
            random(*cells, 2 * NEURONS, WIDTH), random(*cells, NEURONS, WIDTH), None, biases, torch.mul
        )
        count = torch.randint(0, self.sub_experts + 1, (len(POINTS), 1, self.top_k), generator=generator)
        count[..., 0].clamp_(min=1)
        self.tables = PlanTables(
            mode=torch.tensor(POINTS, dtype=torch.int32),
            count=count.int(),
            tau=random(len(POINTS), 1),
            share=torch.full((len(POINTS), 1), 0.5),
            cap=torch.tensor([draw(st.integers(0, 5)), 0, 0, 0], dtype=torch.int32),
            sub_experts=self.sub_experts,
        )
        self.hidden, self.rms = random(tokens, WIDTH), random(tokens).abs()
        self.ids = torch.stack([torch.randperm(self.experts, generator=generator)[: self.top_k] for _ in range(tokens)])
        if draw(st.booleans()):
            self.ids[draw(st.integers(0, tokens - 1)), 0] = self.experts + 1  # another rank's expert
        self.router = torch.rand(tokens, self.top_k, generator=generator)
        self.router[:, -1] *= draw(st.sampled_from([0.0, 1.0]))
        if draw(st.booleans()):
            self.router = (self.router * 4).round() / 4  # ties, and weights of zero
        self.row_class = draw(st.lists(st.sampled_from([PADDING, 0, 1, 2, 3]), min_size=tokens, max_size=tokens))

    def plan(self, rows: list[int]) -> PlanTensor:
        plan = PlanTensor(self.tables, classes=len(POINTS))
        plan.write(range(len(POINTS)))
        plan.attach_rows([self.row_class[row] for row in rows])
        return plan

    def choose(self, module: object, rows: list[int] | None = None) -> tuple[Tensor, Tensor, Mapping[str, object]]:
        """(cells, what is added, what the plan was charged)."""
        rows = list(range(len(self.hidden))) if rows is None else rows
        plan = self.plan(rows)
        keep, added = module.cells_to_run(  # type: ignore[attr-defined]
            *(each[rows] for each in (self.hidden, self.ids, self.router)),
            *(0, plan, self.weights, self.gated),
            self.rms[rows],
        )
        charged = {name: getattr(plan, name) for name in ("ran", "routed", "extra", "spent")}
        return keep, torch.zeros(len(rows), WIDTH) if added is None else added, charged


layers = st.composite(Layer)()


@settings(max_examples=300, deadline=None)
@given(layers)
def test_compiled_code_chooses_repairs_and_charges_as_torch_does(layer: Layer) -> None:
    (keep, added, charged), (expected, repaired, due) = layer.choose(cpu_gating), layer.choose(gating)
    assert torch.equal(keep, expected)
    torch.testing.assert_close(added, repaired, rtol=1e-5, atol=1e-5)
    for name in due:
        torch.testing.assert_close(charged[name], due[name], msg=name)


@settings(max_examples=100, deadline=None)
@given(layers, st.data())
def test_a_row_is_chosen_for_and_repaired_with_the_same_bits_in_any_company(layer: Layer, data: st.DataObject) -> None:
    keep, added, _ = layer.choose(cpu_gating)
    rows = data.draw(st.lists(st.integers(0, len(layer.hidden) - 1), min_size=1, unique=True))
    kept_alone, added_alone, _ = layer.choose(cpu_gating, rows)
    assert torch.equal(kept_alone, keep[rows])
    assert torch.equal(added_alone, added[rows])


@settings(max_examples=20, deadline=None)
@given(layers)
def test_points_whose_rows_compete_take_the_torch_path(layer: Layer) -> None:
    layer.tables.mode[1] = BATCH
    (keep, added, _), (expected, repaired, _) = layer.choose(cpu_gating), layer.choose(gating)
    assert torch.equal(keep, expected)
    torch.testing.assert_close(added, repaired, rtol=1e-5, atol=1e-5)
