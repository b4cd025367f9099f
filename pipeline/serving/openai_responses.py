"""Response bodies of the OpenAI API: complete ones and the chunks of a stream.

`wiseline` is our addition to every body: the release that answered, the route, and the reason when it was asked for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.serving.logprobs import SaidToken, Spelling, chat_logprobs, text_logprobs

Kind = Literal["chat", "text"]
PREFIX: Mapping[Kind, str] = {"chat": "chatcmpl-", "text": "cmpl-"}


@dataclass(frozen=True)
class Choice:
    """One finished answer, or one piece of it. `tokens` counts all tokens so far, without the end-of-sequence token;
    `said` are this piece's tokens, where log-probabilities were asked for."""

    index: int
    text: str
    tokens: int
    finish: str | None
    said: tuple[SaidToken, ...] = ()

    def followed_by(self, piece: "Choice") -> "Choice":
        return Choice(self.index, self.text + piece.text, piece.tokens, piece.finish, self.said + piece.said)


@dataclass(frozen=True, kw_only=True)
class Bodies:
    """Every body of one response: they share id, time and the names of model and release."""

    kind: Kind
    model: str
    fingerprint: str
    wiseline: Mapping[str, Any]
    number: str
    created: int
    prompt_tokens: int
    spelling: Spelling | None = None  # writes log-probabilities; None: nobody asked for them
    echoed: Sequence[str] = ()  # per choice, what stands in front of a text completion

    def complete(self, choices: Sequence[Choice], *, about: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The whole answer; `about` says for each of several choices what `wiseline` says for the first one."""
        rows = [self._complete_choice(choice) for choice in choices]
        if len(rows) > 1:
            rows = [{**row, "wiseline": one} for row, one in zip(rows, about, strict=True)]
        return self._body("chat.completion", rows) | {"usage": self._usage(sum(choice.tokens for choice in choices))}

    def opening(self, choices: int) -> list[dict[str, Any]]:
        """What a stream begins with: in chat chunks that only name the role, in text what is echoed."""
        if self.kind == "text":
            pieces = [Choice(index, text, 0, None) for index, text in enumerate(self.echoed)]
            return [self.chunk(piece) for piece in pieces]
        delta = {"role": "assistant", "content": ""}
        return [self._chunk({"index": index, "delta": delta}, Choice(index, "", 0, None)) for index in range(choices)]

    def chunk(self, piece: Choice) -> dict[str, Any]:
        if self.kind == "text":
            return self._chunk({"index": piece.index, "text": piece.text}, piece)
        return self._chunk({"index": piece.index, "delta": {"content": piece.text} if piece.text else {}}, piece)

    def usage_chunk(self, completion_tokens: int) -> dict[str, Any]:
        """The chunk without choices that `stream_options.include_usage` asks for."""
        return self._body("chat.completion.chunk", []) | {"usage": self._usage(completion_tokens)}

    def _chunk(self, said: Mapping[str, Any], piece: Choice) -> dict[str, Any]:
        logprobs = self._logprobs(piece) if piece.said else None
        return self._body("chat.completion.chunk", [{**said, "logprobs": logprobs, "finish_reason": piece.finish}])

    def _complete_choice(self, choice: Choice) -> dict[str, Any]:
        if self.kind == "text":
            echoed = self.echoed[choice.index] if self.echoed else ""
            said: dict[str, Any] = {"text": echoed + choice.text}
        else:
            said = {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
        return {"index": choice.index, **said, "logprobs": self._logprobs(choice), "finish_reason": choice.finish}

    def _logprobs(self, choice: Choice) -> dict[str, Any] | None:
        if self.spelling is None:
            return None
        return (chat_logprobs if self.kind == "chat" else text_logprobs)(choice.said, self.spelling)

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
