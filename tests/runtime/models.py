"""Tiny random models of every supported architecture, and engines around them."""

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from prism_api.manifest import Calibration, Manifest, MeasuredPoint, Shape, SourceModel
from prism_runtime.engine.blocks import blocks_for
from prism_runtime.engine.engine import Engine
from prism_runtime.engine.experts_hook import experts_modules
from prism_runtime.engine.model import Chunk
from prism_runtime.engine.types import Event, Finished, Plan, Request, Sampling, Token
from prism_runtime.kernels.plan import PlanTables

VOCABULARY = 96
CONTEXT = 96
LAYERS = 2
SUB_EXPERTS = 4
COUNTS = (1, 2, 4)
"""Sub-experts at the points of the tiny ladder: b250, b500, full."""

BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 0,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    "qwen2_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
    },
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 8},
    "deepseek_v2": {**MLA, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**MLA, "q_lora_rank": 24},
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 8, "head_dim": 16},
}


def tiny_model(architecture: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random float32 model with the stock experts; equal arguments give equal weights."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture, **{**BASE, **ARCHITECTURES[architecture], **changes})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "sinks")):
            # Library initialisation leaves them zero, which would hide a lost one.
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def masked_model(architecture: str, count: int) -> PreTrainedModel:
    """The stock model whose experts keep their first `count` of SUB_EXPERTS groups of neurons and lose the others."""
    model = tiny_model(architecture)
    for _, experts in experts_modules(model):
        down = experts.down_proj.data if experts.is_transposed else experts.down_proj.data.transpose(1, 2)
        down[:, down.shape[1] * count // SUB_EXPERTS :] = 0
    return model


def tiny_manifest() -> Manifest:
    """A manifest of the tiny ladder; only its points matter to an engine."""
    shares = [(f"b{1000 * count // SUB_EXPERTS}", 1000 * count // SUB_EXPERTS) for count in COUNTS[:-1]]
    points = [
        MeasuredPoint(
            name=name,
            budget_permille=permille,
            policy="uniform",
            relative_quality=Decimal(permille) / 1000,
            relative_quality_low=Decimal(permille) / 1000,
        )
        for name, permille in (*shares, ("full", 1000))
    ]
    return Manifest(
        tools={},
        source=SourceModel(name="tiny", architecture="any", licence="none", digest="sha256:" + "0" * 64),
        shape=Shape(
            moe_layers=list(range(LAYERS)),
            experts=8,
            top_k=2,
            neurons=32,
            hidden=48,
            sub_experts=SUB_EXPERTS,
            neurons_per_sub_expert=8,
            norm_topk_prob=False,
        ),
        files=[],
        calibration=Calibration(texts=[], sequence_length=1, seeds=[0]),
        partition={},
        gate={},
        operating_points=points,
    )


def tiny_engine(architecture: str = "qwen3_moe", stock: PreTrainedModel | None = None, **settings: Any) -> Engine:
    """An engine over `stock`, or over the tiny model of that architecture."""
    tables = PlanTables.uniform(COUNTS, LAYERS, SUB_EXPERTS)
    settings = {"max_sequences": 4, "max_context_tokens": CONTEXT, **settings}
    return Engine(stock or tiny_model(architecture), tables, tiny_manifest(), tokenizer=None, **settings)


def chunk(place: int, start: int, tokens: Sequence[int], service_class: int = 0) -> Chunk:
    """Tokens of a sequence whose blocks are those of the `place`-th context of a tiny engine."""
    blocks = blocks_for(CONTEXT)
    return Chunk(range(place * blocks, (place + 1) * blocks), start, tokens, service_class)


def request(name: str, prompt: Sequence[int], max_tokens: int = 8, **settings: Any) -> Request:
    """A greedy request unless `settings` say otherwise."""
    outer = {key: settings.pop(key) for key in ("service_class", "priority", "promise") if key in settings}
    return Request(name, tuple(prompt), Sampling(max_tokens, **{"temperature": 0.0, **settings}), **outer)


def prompts(lengths: Sequence[int], seed: int = 0) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()) for n in lengths]


def run(engine: Engine, plans: Sequence[Plan] = (), max_steps: int = 500) -> list[Event]:
    """Step until nothing is in flight; plan i, if there is one, is set before step i."""
    events: list[Event] = []
    for step in range(max_steps):
        if not engine.has_work:
            return events
        if step < len(plans):
            engine.set_plan(plans[step])
        events += engine.step().events
    raise AssertionError(f"engine still has work after {max_steps} steps: {engine.load()}")


def tokens_of(events: Sequence[Event], name: str) -> list[int]:
    return [event.token_id for event in events if isinstance(event, Token) and event.request_id == name]


def endings(events: Sequence[Event]) -> dict[str, str]:
    """Finish reason of every request; fails if one has ended twice."""
    finished = [event for event in events if isinstance(event, Finished)]
    by_name = {event.request_id: str(event.reason) for event in finished}
    assert len(by_name) == len(finished), finished
    return by_name


@torch.inference_mode()
def stock_greedy(model: PreTrainedModel, prompt: Sequence[int], new_tokens: int) -> list[int]:
    """Greedy continuation by the stock model without a cache; end tokens do not end it."""
    ids = list(prompt)
    for _ in range(new_tokens):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]
