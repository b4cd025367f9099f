"""Response bodies of the OpenAI API: complete ones and the chunks of a stream.

`wiseline` is our addition to every body: the release that answered, the route, and the reason when it was asked for.
"""

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["chat", "text"]
PREFIX: Mapping[Kind, str] = {"chat": "chatcmpl-", "text": "cmpl-"}


@dataclass(frozen=True)
class Choice:
    """One finished answer, or one piece of it. `tokens` counts all tokens so far, without the end-of-sequence token."""

    index: int
    text: str
    tokens: int
    finish: str | None


@dataclass(frozen=True, kw_only=True)
class Bodies:
    """Every body of one response: they share id, time and the names of model and release."""

    kind: Kind
    model: str
    fingerprint: str
    wiseline: Mapping[str, Any]
    prompt_tokens: int
    created: int = field(default_factory=lambda: int(time.time()))
    number: str = field(default_factory=lambda: uuid.uuid4().hex)

    def complete(self, choices: Sequence[Choice], *, about: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The whole answer; `about` says for each of several prompts what `wiseline` says for the first one."""
        rows = [self._complete_choice(choice) for choice in choices]
        if len(rows) > 1:
            rows = [{**row, "wiseline": one} for row, one in zip(rows, about, strict=True)]
        return self._body("chat.completion", rows) | {"usage": self._usage(sum(choice.tokens for choice in choices))}

    def opening(self) -> list[dict[str, Any]]:
        """Chat streams begin with a chunk that only names the role."""
        if self.kind == "text":
            return []
        delta = {"role": "assistant", "content": ""}
        row = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
        return [self._body("chat.completion.chunk", [row])]

    def chunk(self, piece: Choice) -> dict[str, Any]:
        if self.kind == "text":
            row = {"index": piece.index, "text": piece.text, "logprobs": None, "finish_reason": piece.finish}
        else:
            delta = {"content": piece.text} if piece.text else {}
            row = {"index": piece.index, "delta": delta, "logprobs": None, "finish_reason": piece.finish}
        return self._body("chat.completion.chunk", [row])

    def usage_chunk(self, completion_tokens: int) -> dict[str, Any]:
        """The chunk without choices that `stream_options.include_usage` asks for."""
        return self._body("chat.completion.chunk", []) | {"usage": self._usage(completion_tokens)}

    def _complete_choice(self, choice: Choice) -> dict[str, Any]:
        if self.kind == "text":
            said: dict[str, Any] = {"text": choice.text}
        else:
            said = {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
        return {"index": choice.index, **said, "logprobs": None, "finish_reason": choice.finish}

    def _usage(self, completion_tokens: int) -> dict[str, int]:
        total = self.prompt_tokens + completion_tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}

    def _body(self, chat_object: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": PREFIX[self.kind] + self.number,
            "object": chat_object if self.kind == "chat" else "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
            "wiseline": self.wiseline,
        }
