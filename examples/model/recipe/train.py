"""Trains the embedded model: a small Qwen3-MoE language model, from scratch, on a CPU.

    python train.py CORPUS OUT

CORPUS is what make_corpus.py wrote. The run that made the model took 52 minutes on two cores; train.log is its
log, with a running mean of the loss.
Batches and weights follow from the seed, but sums depend on the machine, so another run gives another, similar model.
"""

import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

SHARES = {"scripture": 0.12, "fiction": 0.14, "dictionary": 0.18, "python": 0.19, "go": 0.18, "dbdocs": 0.19}
"""Share of the training windows by domain; small domains are seen more often than their size says."""

VOCABULARY = 4096
EXPERTS, TOP_K, NEURONS = 16, 4, 128
WINDOW, BATCH = 512, 8
TOKENS = 14.17e6
LEARNING_RATE, WARM_UP_STEPS = 2.5e-3, 100
LOAD_BALANCE = 0.01
SEED = 0

CONFIG = Qwen3MoeConfig(
    vocab_size=VOCABULARY,
    hidden_size=192,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    num_experts=EXPERTS,
    num_experts_per_tok=TOP_K,
    moe_intermediate_size=NEURONS,
    intermediate_size=NEURONS * TOP_K,
    norm_topk_prob=True,
    tie_word_embeddings=True,
    max_position_embeddings=1024,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=1,
)


def documents(corpus: Path, domain: str, side: str) -> list[str]:
    return (corpus / f"{domain}.{side}.txt").read_text(encoding="utf8").split("\0")


def train_tokenizer(corpus: Path) -> Tokenizer:
    """Byte-level BPE on every third training document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for domain in SHARES for text in documents(corpus, domain, "train")[::3])
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, corpus: Path, side: str) -> dict[str, np.ndarray]:
    """Token stream of each domain, every document ended by <|end|>."""
    streams = {}
    for domain in SHARES:
        encodings = tokenizer.encode_batch(documents(corpus, domain, side))
        streams[domain] = np.array([token for e in encodings for token in (*e.ids, 0)], dtype=np.uint16)
    return streams


class Windows:
    """Random training windows, domains drawn by their shares."""

    def __init__(self, streams: dict[str, np.ndarray]) -> None:
        self._streams = list(streams.values())
        self._random = np.random.default_rng(SEED)

    def next(self) -> Tensor:
        shares = np.array(list(SHARES.values()))
        picks = self._random.choice(len(self._streams), BATCH, p=shares / shares.sum())
        windows = []
        for pick in picks:
            stream = self._streams[pick]
            start = self._random.integers(len(stream) - WINDOW)
            windows.append(stream[start : start + WINDOW])
        return torch.from_numpy(np.stack(windows).astype(np.int64))


def load_balance_loss(router_logits: tuple[Tensor, ...]) -> Tensor:
    """Switch-style, per layer: the library's own pools the layers, which lets one layer's collapse hide in another."""
    losses = []
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)
        chosen = probabilities.topk(TOP_K, -1).indices.flatten()
        load = torch.bincount(chosen, minlength=EXPERTS) / len(chosen)
        losses.append(EXPERTS * (load * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: Qwen3MoeForCausalLM, streams: dict[str, np.ndarray], sequences: int) -> dict[str, float]:
    model.eval()
    losses = {}
    for domain, stream in streams.items():
        count = min(sequences, len(stream) // WINDOW)
        ids = torch.from_numpy(stream[: count * WINDOW].reshape(count, WINDOW).astype(np.int64))
        with torch.autocast("cpu", torch.bfloat16):
            losses[domain] = round(next_token_loss(model(input_ids=ids).logits, ids).item(), 4)
    model.train()
    return losses


def learning_rate(step: int, progress: float) -> float:
    """Linear warm-up, then a cosine from the peak to 2 % of it."""
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return LEARNING_RATE * min(1.0, (step + 1) / WARM_UP_STEPS) * (0.02 + 0.98 * cosine)


def train(model: Qwen3MoeForCausalLM, windows: Windows, valid: dict[str, np.ndarray]) -> None:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    begun_s, seen, step = time.monotonic(), 0, 0
    while seen < TOKENS:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, seen / TOKENS)
        ids = windows.next()
        with torch.autocast("cpu", torch.bfloat16):
            output = model(input_ids=ids, output_router_logits=True)
            loss = next_token_loss(output.logits, ids)
            total = loss + LOAD_BALANCE * load_balance_loss(output.router_logits)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen += ids.numel()
        step += 1
        if step % 100 == 0:
            record = {"step": step, "tokens": seen, "t": round(time.monotonic() - begun_s, 1), "loss": loss.item()}
            if step % 500 == 0:
                record["valid"] = held_out_loss(model, valid, sequences=12)
            print(json.dumps(record), flush=True)


def main(corpus: Path, out: Path) -> None:
    torch.set_num_threads(2)
    torch.manual_seed(SEED)
    tokenizer = train_tokenizer(corpus)
    valid = encode(tokenizer, corpus, "valid")
    model = Qwen3MoeForCausalLM(CONFIG)
    train(model, Windows(encode(tokenizer, corpus, "train")), valid)
    perplexity = {domain: round(math.exp(loss), 2) for domain, loss in held_out_loss(model, valid, 60).items()}
    print("final held-out perplexity", perplexity)
    model.to(torch.bfloat16).save_pretrained(out)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>", model_max_length=1024
    ).save_pretrained(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
