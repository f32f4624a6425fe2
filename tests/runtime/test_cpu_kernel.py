"""The compiled CPU kernel against the definition and the reference."""

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_runtime import native
from prism_runtime.kernels import cpu_moe
from prism_runtime.kernels.contract import ExpertWeights
from prism_runtime.kernels.plan import PADDING, PlanTables, PlanTensor
from prism_runtime.kernels.reference import sub_expert_moe as reference
from tests.runtime.kernel_layers import at_threshold_and_full, by_definition, close, layers, silu_and_multiply

compiled_layers = layers(dtypes=(torch.float32, torch.bfloat16), widths=(16, 48, 96))


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    assert cpu_moe.available(), "no C compiler: install gcc"


@settings(max_examples=100, deadline=None)
@given(compiled_layers)
def test_any_subset_of_sub_experts_gives_the_sum_of_their_outputs(layer):
    assert close(cpu_moe.run_kept(*layer), by_definition(*layer))


@pytest.fixture(scope="module")
def for_each_level(tmp_path_factory):
    folder, compiler = tmp_path_factory.mktemp("levels"), native.find_compiler()
    libraries = {}
    for level in native.levels():
        output = folder / f"{level.name}.so"
        flags = (*native.FLAGS, *level.flags, *cpu_moe.FLAGS)
        native.run_compiler([compiler, *flags, "-o", str(output), str(cpu_moe.SOURCE)])
        libraries[level.name] = cpu_moe.typed(ctypes.CDLL(str(output)))
    return libraries


@settings(max_examples=50, deadline=None)
@given(layer=compiled_layers)
def test_every_level_of_processor_gives_the_sum_of_the_outputs(layer, for_each_level):
    """All that this processor has; a machine for images may have fewer."""
    for name, library in for_each_level.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu_moe, "_library", lambda library=library: library)
            assert close(cpu_moe.run_kept(*layer), by_definition(*layer)), name


@settings(max_examples=50, deadline=None)
@given(compiled_layers, st.data())
def test_a_row_gives_the_same_bits_in_any_company(layer, data):
    hidden, ids, router, keep, weights = layer
    together = cpu_moe.run_kept(*layer)
    chosen = data.draw(st.lists(st.integers(0, len(hidden) - 1), min_size=1, unique=True))
    alone = cpu_moe.run_kept(hidden[chosen], ids[chosen], router[chosen], keep[chosen], weights)
    assert torch.equal(together[chosen], alone)


def test_threads_share_the_experts_and_change_no_bit():
    generator = torch.Generator().manual_seed(0)
    weights = ExpertWeights(
        torch.randn(8, 4, 128, 128, generator=generator),
        torch.randn(8, 4, 64, 128, generator=generator),
        *(None, None, silu_and_multiply),
    )
    hidden = torch.randn(24, 128, generator=generator)
    router, ids = torch.rand(24, 8, generator=generator).topk(2)
    keep = torch.rand(24, 2, 4, generator=generator) < 0.8
    outputs = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            outputs.append(cpu_moe.run_kept(hidden, ids, router, keep, weights))
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert close(outputs[0], by_definition(hidden, ids, router, keep, weights))


def test_a_forward_of_other_rows_than_the_plan_has_is_refused():
    plan = PlanTensor(PlanTables.uniform([1], 1, 4), classes=1)
    plan.attach_rows([0, 0])
    weights = ExpertWeights(torch.zeros(2, 4, 16, 16), torch.zeros(2, 4, 8, 16), None, None, silu_and_multiply)
    with pytest.raises(ValueError, match="the plan has 2 rows attached, the forward has 1"):
        cpu_moe.sub_expert_moe(torch.zeros(1, 16), torch.tensor([[1]]), torch.ones(1, 1), 0, plan, weights)


@settings(max_examples=50, deadline=None)
@given(layers(), st.data())
def test_rows_of_different_budgets_share_a_forward_as_in_the_reference(layer, data):
    """Layers that the C does not take (half precision, odd widths) among them: they run the reference."""
    hidden, ids, router, keep, weights = layer
    sub_experts, top_k = keep.shape[2], keep.shape[1]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    count = torch.randint(0, sub_experts + 1, (3, 1, top_k), generator=generator, dtype=torch.int32)
    count[..., 0].clamp_(min=1)
    row_class = data.draw(st.lists(st.sampled_from([PADDING, 0, 1]), min_size=len(hidden), max_size=len(hidden)))
    outputs, counters = [], []
    for kernel in (reference, cpu_moe.sub_expert_moe):
        plan = PlanTensor(PlanTables.prefix(count, sub_experts), classes=2)
        plan.write([0, 2])
        plan.attach_rows(row_class)
        outputs.append(kernel(hidden, ids, router, 0, plan, weights))
        counters.append((int(plan.ran), int(plan.routed)))
    assert close(outputs[1], outputs[0].float())
    assert counters[0] == counters[1]


@settings(max_examples=50, deadline=None)
@given(compiled_layers, st.integers(0, 2**20))
def test_rows_at_a_threshold_run_what_the_reference_runs(layer, seed):
    expected = at_threshold_and_full(layer, seed, reference)
    assert close(at_threshold_and_full(layer, seed, cpu_moe.sub_expert_moe), expected.float())


@settings(max_examples=5, deadline=None)
@given(compiled_layers)
def test_without_a_compiler_the_reference_runs(layer):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_moe, "_library", lambda: None)
        expected = at_threshold_and_full(layer, 1, reference)
        assert torch.equal(at_threshold_and_full(layer, 1, cpu_moe.sub_expert_moe), expected)
