"""The adapter to transformers' attention interface: lets decode read the paged cache where it lies.

Layers keep their own attention for prompts, and altogether where the compiled kernel cannot be used: on other devices
than the CPU, in other types, or in models whose attention is more than a softmax of scaled products under a mask:
DeepSeek's caches hold latents that the layer expands itself.
"""

import sys
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prism_runtime.engine.cache import PagedCache
from prism_runtime.kernels import cpu_attention

IMPLEMENTATION = "prism_paged"
PLAIN = ("gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
"""Model types whose attention is known to be what the kernel computes (GPT-OSS with sinks, which it knows)."""


def bind_cache(model: PreTrainedModel, cache: PagedCache) -> None:
    """Let the layers of `model` read `cache` in place; without effect where they cannot."""
    config = model.config.get_text_config()
    on_cpu = model.device.type == "cpu" and model.dtype in cpu_attention.DTYPES
    if config.model_type not in PLAIN or not on_cpu or not cpu_attention.available():
        return
    named = ("k_proj", "v_proj", "layer_idx", "scaling")
    layers = {int(module.layer_idx): module for module in model.modules() if all(hasattr(module, n) for n in named)}
    original = config._attn_implementation
    for module in layers.values():
        module.prism_cache, module.prism_original = cache, original
    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attention)
    model.set_attn_implementation(IMPLEMENTATION)
    cache.read_in_place = frozenset(layers)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **settings: Any
) -> tuple[Tensor, Tensor | None]:
    cache: PagedCache = module.prism_cache
    if cache.reads_in_place(module.layer_idx):
        mask, sinks = attention_mask, settings.get("s_aux")
        return cache.attend(module.layer_idx, query, mask, settings["scaling"], sinks), None
    eager = sys.modules[type(module).__module__].eager_attention_forward
    own = ALL_ATTENTION_FUNCTIONS.get_interface(module.prism_original, eager)
    attended: tuple[Tensor, Tensor | None] = own(module, query, key, value, attention_mask, **settings)
    return attended
