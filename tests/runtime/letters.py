"""A tiny checkpoint whose tokenizer knows letters, and random text for it."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.runtime.models import tiny_model

LETTERS = "abcdefghijklmnopqrstuvwxyz .,"


def write_source(folder: Path) -> Path:
    """Write the checkpoint `folder`/tiny, and `folder`/text.jsonl with two domains; returns the checkpoint."""
    directory = folder / "tiny"
    tiny_model("qwen3_moe").save_pretrained(directory)
    vocabulary = {letter: i for i, letter in enumerate(LETTERS)}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=letters, unk_token=" ").save_pretrained(directory)
    generator = torch.Generator().manual_seed(0)
    with (folder / "text.jsonl").open("w") as file:
        for i in range(24):
            picks = torch.randint(0, len(LETTERS), (300,), generator=generator).tolist()
            text = "".join(LETTERS[i] for i in picks)
            file.write(json.dumps({"text": text, "domain": f"d{i % 2}", "licence": "none"}) + "\n")
    return directory
