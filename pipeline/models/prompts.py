"""From text to the prompt ids the model reads. Training, evaluation and serving tokenise here, so they agree."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase


def plain_prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The prompt with the tokenizer's own start, without an end-of-sequence token some tokenizers close texts with."""
    ids = tuple(tokenizer(prompt)["input_ids"])
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def answer_ids(prompt: str, answer: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The answer as it follows the prompt, `prompt + " " + answer` split where the prompt ends, without an
    end-of-sequence token."""
    prompt_ids = plain_prompt_ids(prompt, tokenizer)
    together = tuple(tokenizer(f"{prompt} {answer}")["input_ids"])
    if together[: len(prompt_ids)] == prompt_ids:
        ids = together[len(prompt_ids) :]
    else:  # the tokenizer merges across the boundary; at serving time the prompt stands alone, so split there
        ids = tuple(tokenizer(f" {answer}", add_special_tokens=False)["input_ids"])
    eos = tokenizer.eos_token_id
    return ids[: ids.index(eos)] if eos in ids else ids


def chat_prompt_ids(messages: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The conversation as the model's chat template renders it, up to where the assistant speaks."""
    return render_chat(messages, tokenizer, add_generation_prompt=True)


def chat_answer_ids(
    messages: Sequence[dict[str, Any]], answer: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """The answer as the chat template writes it behind the conversation, with what the template ends it with."""
    prompt_ids = chat_prompt_ids(messages, tokenizer)
    turn = [*messages, {"role": "assistant", "content": answer}]
    answered = render_chat(turn, tokenizer, add_generation_prompt=False)
    if answered[: len(prompt_ids)] == prompt_ids:
        return answered[len(prompt_ids) :]
    # Templates that write the assistant's marker differently before an answer.
    return tuple(tokenizer(answer, add_special_tokens=False)["input_ids"])


def ended(target_ids: tuple[int, ...], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The answer up to and including its first end-of-sequence token, which is added when there is none."""
    eos = tokenizer.eos_token_id
    return target_ids[: target_ids.index(eos) + 1] if eos in target_ids else (*target_ids, eos)


def render_chat(
    messages: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool
) -> tuple[int, ...]:
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
