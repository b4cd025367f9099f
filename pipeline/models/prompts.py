"""From text to the prompt ids the model reads. Training, evaluation and serving tokenise here, so they agree."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase


def plain_prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The prompt with the tokenizer's own start, without an end-of-sequence token some tokenizers close texts with."""
    ids = tuple(tokenizer(prompt)["input_ids"])
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def chat_prompt_ids(messages: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The conversation as the model's chat template renders it, up to where the assistant speaks."""
    return render_chat(messages, tokenizer, add_generation_prompt=True)


def render_chat(
    messages: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool
) -> tuple[int, ...]:
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
