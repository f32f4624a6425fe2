"""Text and token ids: the one place that knows which library made the artifact's tokenizer."""

from collections.abc import Sequence
from typing import Any


class TextCodec:
    """Wraps the engine's tokenizer, a `tokenizers.Tokenizer` or a transformers fast tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a prompt, with the special tokens the model was trained to see first."""
        encoded = self._tokenizer.encode(text, add_special_tokens=True)
        return tuple(getattr(encoded, "ids", encoded))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        """Ids of a conversation: by the model's own chat template, else its contents, separated by blank lines.

        Without a template roles are not written: a model that has never seen a conversation would only continue them.
        """
        if getattr(self._tokenizer, "chat_template", None):
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
            encoded = self._tokenizer.encode(text, add_special_tokens=False)
            return tuple(getattr(encoded, "ids", encoded))
        return self.encode("\n\n".join(message["content"] for message in messages))
