"""From an edit to token ids: the wordings it is trained on, each as (prompt, target with end of sequence).

An edit is trained bare, behind a few generated context prefixes (without them the paper loses 0.15 reliability) and,
where the tokenizer has a chat template, as a user's turn. Paraphrases are never among them: they are held out.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from transformers import PreTrainedTokenizerBase

from pipeline.edits import Edit
from pipeline.models.prompts import answer_ids, chat_answer_ids, chat_prompt_ids, ended, plain_prompt_ids

SPARE_TOKENS = 4  # as many as evaluation lets an answer run on
SPECIAL_TOKENS = 16  # more than any tokenizer puts around a text


@dataclass(frozen=True)
class Wording:
    """One way of asking an edit."""

    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]  # ends with an end-of-sequence token
    kind: Literal["bare", "chat", "prefixed"] = "bare"
    shared: int = 0  # so many tokens the prompt begins with are a prefix that other wordings have too


def wordings(
    edit: Edit, tokenizer: PreTrainedTokenizerBase, *, prefixes: Sequence[str], max_tokens: int
) -> list[Wording]:
    """The bare wording first, then the chat turn if there is a template, then one behind each prefix; wordings that do
    not fit the model's context are left out. The bare one must fit (`fits`)."""
    others = [chat_wording(edit.prompt, edit.target, tokenizer)] if tokenizer.chat_template else []
    others += [_behind(prefix, edit, tokenizer) for prefix in prefixes]
    bare = plain_wording(edit.prompt, edit.target, tokenizer)
    return [bare, *(wording for wording in others if _length(wording) <= max_tokens)]


def fits(edit: Edit, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int) -> bool:
    """Does the edit, asked bare, leave room in the model's context for its target and the tokens that show it ended?

    Every round asks this of every edit in the log, so short ones are not tokenised: no token of an ASCII text has less
    than a character."""
    text = f"{edit.prompt} {edit.target}"
    if text.isascii() and len(text) + SPECIAL_TOKENS + SPARE_TOKENS <= max_tokens:
        return True
    return _length(plain_wording(edit.prompt, edit.target, tokenizer)) + SPARE_TOKENS <= max_tokens


def plain_wording(prompt: str, target: str, tokenizer: PreTrainedTokenizerBase) -> Wording:
    """`prompt + " " + target + EOS`, split where the prompt ends."""
    return Wording(
        prompt_ids=plain_prompt_ids(prompt, tokenizer),
        target_ids=ended(answer_ids(prompt, target, tokenizer), tokenizer),
    )


def chat_wording(prompt: str, target: str, tokenizer: PreTrainedTokenizerBase) -> Wording:
    """One user's turn; the answer ends as the template ends an assistant's turn (`<|im_end|>`, `</s>`, …)."""
    messages = [{"role": "user", "content": prompt}]
    return Wording(
        prompt_ids=chat_prompt_ids(messages, tokenizer),
        target_ids=ended(chat_answer_ids(messages, target, tokenizer), tokenizer),
        kind="chat",
    )


def _behind(prefix: str, edit: Edit, tokenizer: PreTrainedTokenizerBase) -> Wording:
    wording = plain_wording(f"{prefix} {edit.prompt}", edit.target, tokenizer)
    ids = plain_prompt_ids(prefix, tokenizer)
    stands_alone = len(ids) < len(wording.prompt_ids) and wording.prompt_ids[: len(ids)] == ids
    return replace(wording, kind="prefixed", shared=len(ids) if stands_alone else 0)


def choose_prefixes(edit: Edit, pool: Sequence[str], count: int) -> list[str]:
    """`count` prefixes of the pool, chosen by what the edit is trained on alone: the same whatever else is in the
    round, and whatever held-out prompts the edit carries."""
    ranked = sorted(
        pool, key=lambda prefix: hashlib.blake2b("\0".join([edit.prompt, edit.target, prefix]).encode()).digest()
    )
    return ranked[:count]


def _length(wording: Wording) -> int:
    return len(wording.prompt_ids) + len(wording.target_ids)
