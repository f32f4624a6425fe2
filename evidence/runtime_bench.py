"""Measures the kernel and the engine on this machine's CPU against the same model as transformers runs it.

    python -m evidence.runtime_bench             both, one round
    python -m evidence.runtime_bench --layer     the layer alone

Figures are ratios of CPU times of one process on one thread: variants take turns, so that a busy moment of the machine
falls on all of them, and of each the fast runs count.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.utils import logging

from evidence.figures import ROOT
from prism_runtime.engine.engine import Engine
from prism_runtime.engine.experts_hook import experts_modules, pack_weights
from prism_runtime.engine.model import load_pretrained
from prism_runtime.engine.types import Plan, Request, Sampling
from prism_runtime.kernels import cpu_moe, gating, reference
from prism_runtime.kernels.contract import CompensationWeights, GatedLayer, GateWeights, SubExpertKernel
from prism_runtime.kernels.plan import THRESHOLD, PlanTables, PlanTensor
from prism_runtime.refactor.gates import CERTAIN
from tests.runtime.models import COUNTS, SUB_EXPERTS, tiny_manifest

Times = dict[str, float]
"""Seconds by variant: of the CPU, where nothing else is said."""

TOKENS = (1, 8, 32)
BATCHES = (8, 32)
PROMPT_TOKENS, NEW_TOKENS = 64, 64
HALF, FULL, THRESHOLD_POINT = COUNTS.index(SUB_EXPERTS // 2), len(COUNTS) - 1, len(COUNTS)
RANK = 8
"""Of the compensation that comes with a threshold: the recipe's default."""
ARTIFACT = ROOT / "examples" / "model" / "artifact"


def _config(architecture: str, **values: Any) -> Any:
    return AutoConfig.for_model(architecture, **values)


def olmoe_layer() -> Any:
    """OLMoE's sizes in one layer; nothing else of the model matters to a layer's time."""
    return _config(
        "olmoe", hidden_size=2048, intermediate_size=1024, num_experts=64, num_experts_per_tok=8, num_hidden_layers=1,
        num_attention_heads=16, vocab_size=64, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip


def larger_model() -> PreTrainedModel:
    """Random weights in six layers of H 512, I 768, E 32, K 4."""
    torch.manual_seed(0)
    config = _config(
        "qwen3_moe", hidden_size=512, moe_intermediate_size=768, num_experts=32, num_experts_per_tok=4,
        num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4, head_dim=64, vocab_size=4096,
        max_position_embeddings=1024,
    )  # fmt: skip
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval()


Variants = dict[str, Sequence[Callable[[], object]]]
"""What is timed, by name: the same work on as many inputs as the others, in the same order."""


def interleaved(variants: Variants, repetitions: int, clock: Callable[[], float] = time.process_time) -> Times:
    """Seconds of each on one input: the 10th percentile of `repetitions`, averaged over inputs.

    Variants take turns. With several inputs each runs on the one before first, untimed, as a model runs layer after
    layer: its code is then at hand, and the weights that the timed input chooses are not.
    """
    inputs = len(next(iter(variants.values())))
    taken: dict[str, list[list[float]]] = {name: [[] for _ in range(inputs)] for name in variants}
    for runs in variants.values():
        runs[0]()
    for turn in range(repetitions * inputs):
        for name, runs in variants.items():
            which = turn % inputs
            if inputs > 1:
                runs[which - 1]()
            begun_s = clock()
            runs[which]()
            taken[name][which].append(clock() - begun_s)
    return {
        name: statistics.fmean(sorted(values)[len(values) // 10] for values in by_input)
        for name, by_input in taken.items()
    }


# -- one layer -----------------------------------------------------------------------------------------------------


class Layer:
    """A bfloat16 layer of OLMoE's shape: transformers' own, and packed, with a random gate and compensation.

    Their cost is that of fitted ones; rows share less of what they choose, so more weights are read.
    """

    def __init__(self) -> None:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(olmoe_layer(), dtype=torch.bfloat16).eval()
        self.stock: nn.Module = experts_modules(model)[0][1]
        self.weights = pack_weights(self.stock, SUB_EXPERTS)
        self.config = model.config
        self.gated = _random_gate(self.config)
        self.tables = _with_threshold(self._threshold_of_half())

    @torch.inference_mode()
    def times(self, tokens: int, repetitions: int) -> Times:
        """CPU seconds for so many tokens: `transformers`; `cpp` and `torch` at `half`, by `threshold` and at `full`."""
        draws = [self._draw(tokens) for _ in range(DRAWS[tokens])]
        variants: Variants = {"transformers": [partial(self.stock, *draw) for draw in draws]}
        for name, kernel in (("cpp", cpu_moe.sub_expert_moe), ("torch", reference.sub_expert_moe)):
            for point, budget in ((HALF, "half"), (THRESHOLD_POINT, "threshold"), (FULL, "full")):
                variants[f"{name}.{budget}"] = [self._run(kernel, point, *draw) for draw in draws]
        return interleaved(variants, repetitions)

    @torch.inference_mode()
    def thread_times(self, tokens: int, repetitions: int) -> Times:
        """Seconds of the wall for so many tokens at the full budget in C, by number of threads."""
        draws = [self._draw(tokens) for _ in range(DRAWS[tokens])]
        runs = [self._run(cpu_moe.sub_expert_moe, FULL, *draw) for draw in draws]
        before = torch.get_num_threads()
        try:
            variants: Variants = {str(count): [partial(_with_threads, count, run) for run in runs] for count in (1, 2)}
            return interleaved(variants, repetitions, time.perf_counter)
        finally:
            torch.set_num_threads(before)

    def _draw(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Random rows, their experts and router weights."""
        hidden = torch.randn(tokens, self.config.hidden_size).bfloat16()
        router = torch.rand(tokens, self.config.num_experts).softmax(-1)
        weights, ids = router.topk(self.config.num_experts_per_tok)
        return hidden, ids, weights.bfloat16()

    def _run(
        self, kernel: SubExpertKernel, point: int, hidden: Tensor, ids: Tensor, weights: Tensor
    ) -> Callable[[], object]:
        plan = self._plan(self.tables, point, len(hidden))
        gate = (self.gated, torch.ones(len(hidden))) if point == THRESHOLD_POINT else (None, None)
        return lambda: kernel(hidden, ids, weights, 0, plan, self.weights, *gate)

    @torch.inference_mode()
    def _threshold_of_half(self) -> float:
        """The logarithm of the threshold at which random rows cost half of full, gate and compensation counted."""
        rows = self._draw(64)
        low, high = -12.0, 4.0
        for _ in range(12):
            middle = (low + high) / 2
            plan = self._plan(_with_threshold(middle), THRESHOLD_POINT, len(rows[0]))
            gating.choose_cells(*rows, torch.ones(len(rows[0])), 0, plan, self.weights, self.gated)
            low, high = (middle, high) if plan.realised_budget > 0.5 else (low, middle)
        return (low + high) / 2

    @staticmethod
    def _plan(tables: PlanTables, point: int, rows: int) -> PlanTensor:
        plan = PlanTensor(tables, classes=1)
        plan.write([point])
        plan.attach_rows([0] * rows)
        return plan


def _with_threshold(tau: float) -> PlanTables:
    """Prefixes of `COUNTS`, then a threshold."""
    none = torch.zeros(len(COUNTS) + 1, dtype=torch.int32)
    mode, count = none.clone(), none.clone()
    mode[-1], count[:-1] = THRESHOLD, torch.tensor(COUNTS)
    flat = torch.ones(len(none), 1)
    return PlanTables(mode, count[:, None, None], tau * flat, flat, none, SUB_EXPERTS)


def _random_gate(config: Any) -> GatedLayer:
    width, cells = config.hidden_size, (config.num_experts, SUB_EXPERTS)
    gate = GateWeights(
        weight=torch.randn(*cells, width) * width**-0.5,
        bias=torch.zeros(cells),
        mean=torch.zeros(cells),
        deviation=torch.ones(cells),
        token=torch.randn(width + 3) * 0.001,
        kappa=CERTAIN,
    )
    shapes = ((width + 1, RANK), (RANK, width), (*cells, RANK))
    return GatedLayer(gate, {THRESHOLD_POINT: CompensationWeights(*(torch.randn(shape) * 0.01 for shape in shapes))})


def _with_threads(count: int, run: Callable[[], object]) -> None:
    torch.set_num_threads(count)
    run()


DRAWS = {1: 8, 8: 4, 32: 2}
REPETITIONS = {1: 10, 8: 5, 32: 5}
"""By number of tokens: random inputs, and how often each is run."""


def layer_round(layer: Layer) -> dict[int, Times]:
    """Times of one round by number of tokens."""
    return {tokens: layer.times(tokens, REPETITIONS[tokens]) for tokens in TOKENS}


def thread_round(layer: Layer) -> dict[int, Times]:
    """Seconds of the wall of one round by number of tokens, on one thread and on two."""
    return {tokens: layer.thread_times(tokens, REPETITIONS[tokens]) for tokens in TOKENS}


# -- the whole engine ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Subject:
    """One model four times: by `generate`, by transformers' continuous batching, and by the engine."""

    name: str
    stock: PreTrainedModel
    batching: PreTrainedModel
    engine: Engine


def embedded() -> Subject:
    """The model that the project ships, as `serve` loads it."""
    settings: dict[str, Any] = {"max_sequences": max(BATCHES), "max_context_tokens": PROMPT_TOKENS + NEW_TOKENS}
    stock, _ = load_pretrained(ARTIFACT)
    return Subject("embedded", stock, load_pretrained(ARTIFACT)[0], Engine.from_artifact(ARTIFACT, **settings))


def larger() -> Subject:
    stock, context = larger_model(), PROMPT_TOKENS + NEW_TOKENS
    tables = PlanTables.uniform(COUNTS, stock.config.num_hidden_layers, SUB_EXPERTS)
    engine = Engine(
        copy.deepcopy(stock), tables, tiny_manifest(), None, max_sequences=max(BATCHES), max_context_tokens=context
    )
    return Subject("larger", stock, copy.deepcopy(stock), engine)


class Prompts:
    """New prompts each time: nobody is to find the last run's in a cache."""

    def __init__(self, vocabulary: int, seed: int) -> None:
        self._vocabulary, self._generator = vocabulary, torch.Generator().manual_seed(seed)

    def __call__(self, batch: int) -> Tensor:
        return torch.randint(3, self._vocabulary, (batch, PROMPT_TOKENS), generator=self._generator)


def engine_times(subject: Subject, batch: int, repetitions: int, seed: int, *, half: int | None) -> Times:
    """CPU seconds in which `batch` prompts get their tokens: `generate`, `batching`, `full`, and `half` at that point.

    The continuous batching of transformers runs already when the clock starts, as a server's does.
    """
    prompts = Prompts(subject.stock.config.vocab_size, seed)
    with continuous_batching(subject.batching, batch) as run_batching:
        variants: Variants = {
            "generate": [lambda: generate(subject.stock, prompts(batch))],
            "batching": [lambda: run_batching(prompts(batch))],
            "full": [lambda: run_engine(subject.engine, prompts(batch), len(subject.engine.ladder) - 1)],
        }
        if half is not None:
            variants["half"] = [lambda: run_engine(subject.engine, prompts(batch), half)]
        return interleaved(variants, repetitions)


def generate(model: PreTrainedModel, prompts: Tensor) -> None:
    model.generation_config.eos_token_id = None  # all run to the same length
    answers: Any = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=NEW_TOKENS, do_sample=False
    )  # type: ignore[operator]
    assert answers.shape[1] == PROMPT_TOKENS + NEW_TOKENS


@contextmanager
def continuous_batching(model: PreTrainedModel, batch: int) -> Iterator[Callable[[Tensor], None]]:
    """A running manager of transformers' continuous batching, and what puts prompts through it."""
    logging.set_verbosity_error()
    # One page of 256 tokens holds a sequence; unset, the cache would take most of the machine's memory.
    settings = ContinuousBatchingConfig(num_blocks=2 * batch, max_batch_tokens=512)
    model.generation_config.eos_token_id = -1
    model.generation_config.max_new_tokens = NEW_TOKENS
    model.generation_config.do_sample = False
    session: AbstractContextManager[Any] = model.continuous_batching_context_manager(  # type: ignore[operator]
        generation_config=model.generation_config, continuous_batching_config=settings, timeout=30
    )
    with session as manager:

        def run(prompts: Tensor) -> None:
            manager.add_requests(prompts.tolist(), max_new_tokens=NEW_TOKENS)
            finished = 0
            while finished < len(prompts):
                result = manager.get_result(timeout=60)
                assert result is not None, "transformers' continuous batching stopped"
                assert len(result.generated_tokens) == NEW_TOKENS, result.error
                finished += 1

        yield run


def run_engine(engine: Engine, prompts: Tensor, point: int) -> None:
    engine.set_plan(Plan(engine.plan.version + 1, (point,) * len(engine.plan.class_point)))
    for index, prompt in enumerate(prompts.tolist()):
        engine.submit(Request(f"bench-{index}", tuple(prompt), Sampling(max_tokens=NEW_TOKENS, temperature=0.0)))
    while engine.has_work:
        engine.step()


def engine_round(subject: Subject, seed: int, repetitions: int = 2) -> dict[int, Times]:
    """Times of one round by batch; half a budget is timed where the ladder is this program's own."""
    half = HALF if subject.name == "larger" else None
    return {batch: engine_times(subject, batch, repetitions, seed, half=half) for batch in BATCHES}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evidence.runtime_bench", description="Times on this CPU.")
    parser.add_argument("--layer", action="store_true", help="one layer of OLMoE's shape alone")
    parser.add_argument("--engine", choices=("embedded", "larger"), help="the engine alone, with this model")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    console = Console()
    if not arguments.engine:
        layer = Layer()
        for tokens, times in layer_round(layer).items():
            _print(console, f"layer, {tokens} tokens, ms of CPU", times)
        for tokens, times in thread_round(layer).items():
            _print(console, f"layer, {tokens} tokens, ms by threads", times)
    for make in (embedded, larger):
        if not arguments.layer and arguments.engine in (None, make.__name__):
            for batch, times in engine_round(make(), seed=0).items():
                _print(console, f"{make.__name__} model, batch {batch}, ms of CPU", times)
    return 0


def _print(console: Console, title: str, times: Times) -> None:
    shown = "  ".join(f"{name} {1000 * seconds:.1f}" for name, seconds in times.items())
    console.print(f"{title}: {shown}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    raise SystemExit(main())
