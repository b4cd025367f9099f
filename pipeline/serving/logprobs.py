"""Log-probabilities as OpenAI's two APIs write them: a list of tokens for chat, parallel lists for text completions."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")  # sentencepiece's byte fallback
REPLACEMENT = "\ufffd"  # what decoding makes of bytes that are no whole character


@dataclass(frozen=True)
class SaidToken:
    """A token of an answer. Logarithms are natural; `offset` counts the characters of the answer before it."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the likeliest tokens, best first
    offset: int


class Spelling:
    """How one tokenizer's tokens are written. Not for two threads at once: fast tokenizers are not."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def text(self, token_id: int) -> str:
        """The token's text; `bytes:\\xe2\\x82`, as OpenAI writes it, where it is a part of a character."""
        text = self._decoded(token_id)
        data = self.bytes(token_id)
        if REPLACEMENT in text and data is not None:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
        return text

    def bytes(self, token_id: int) -> list[int] | None:
        """The token's UTF-8 bytes; None where the tokenizer does not say what a part of a character is made of."""
        text = self._decoded(token_id)
        if REPLACEMENT not in text:
            return list(text.encode())
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        assert isinstance(piece, str)
        if fallback := BYTE_PIECE.fullmatch(piece):
            return [int(fallback[1], 16)]
        if all(character in BYTE_OF for character in piece):
            return [BYTE_OF[character] for character in piece]
        return None

    def _decoded(self, token_id: int) -> str:
        """As behind another token, where sentencepiece keeps the blank before a word."""
        before, both = self._decode([self._anchor]), self._decode([self._anchor, token_id])
        return both[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    @cached_property
    def _anchor(self) -> int:
        return int(self._tokenizer.encode("a", add_special_tokens=False)[-1])


def chat_logprobs(tokens: Sequence[SaidToken], spelling: Spelling) -> dict[str, Any]:
    def row(token_id: int, logprob: float) -> dict[str, Any]:
        return {"token": spelling.text(token_id), "bytes": spelling.bytes(token_id), "logprob": logprob}

    content = [
        row(said.token_id, said.logprob) | {"top_logprobs": [row(*alternative) for alternative in said.top]}
        for said in tokens
    ]
    return {"content": content, "refusal": None}


def text_logprobs(tokens: Sequence[SaidToken], spelling: Spelling) -> dict[str, Any]:
    """OpenAI's lists. Like there, the chosen token is among `top_logprobs` also when it is not among the likeliest."""
    return {
        "tokens": [spelling.text(said.token_id) for said in tokens],
        "token_logprobs": [said.logprob for said in tokens],
        "top_logprobs": [_alternatives(said, spelling) for said in tokens],
        "text_offset": [said.offset for said in tokens],
    }


def _alternatives(said: SaidToken, spelling: Spelling) -> dict[str, float]:
    named = {spelling.text(token_id): logprob for token_id, logprob in reversed(said.top)}  # of one text, the likeliest
    if said.top:
        named.setdefault(spelling.text(said.token_id), said.logprob)
    return dict(sorted(named.items(), key=lambda item: -item[1]))


def _byte_of() -> Mapping[str, int]:
    """GPT-2's printable stand-ins for bytes (`bytes_to_unicode`): printable Latin-1 as itself, the others from 256."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTE_OF = _byte_of()
