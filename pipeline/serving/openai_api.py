"""Requests of the OpenAI API, as far as one text model can honour them.

A field that would change the answer and that we cannot honour is refused with a 400 that names it; a field that only
concerns OpenAI's own service (billing, caching, abuse) is ignored. So no request is quietly answered as another one.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.config import JsonDict

# Values that ask for nothing beyond plain text; every other value of these fields is refused.
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "suffix": ("",),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "moderation": (),
}
CHAT_EXAMPLE: JsonDict = {
    "model": "wiseline",
    "messages": [{"role": "user", "content": "What is the capital of Kazakhstan?"}],
    "max_tokens": 20,
}
COMPLETION_EXAMPLE: JsonDict = {"model": "wiseline", "prompt": "Name the money used in Croatia:", "logprobs": 2}
MOST_LOGPROBS = 20  # OpenAI's limit for chat
# Fields that concern OpenAI's own service and change nothing about the answer.
IGNORED = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "parallel_tool_calls",
    "reasoning_effort",
    "verbosity",
}


def _encodable(text: str) -> str:
    """JSON can spell half a surrogate pair; no tokenizer can read it."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("the text holds half a surrogate pair, which is no character")
    return text


Text = Annotated[str, AfterValidator(_encodable)]


def _listed(value: object) -> object:
    """One string reads as a list of it, and null as an empty list."""
    return (value,) if isinstance(value, str) else () if value is None else value


def _joined_parts(value: object) -> object:
    """Content parts read as their text, one after another."""
    if not isinstance(value, list):
        return value
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError("only text parts ({'type': 'text', 'text': ...}) are supported")
    return "".join(part["text"] for part in value)


def _no_bool(value: object) -> object:
    """`logprobs: false` asks for nothing; true is chat's way of asking."""
    if value is True:
        raise ValueError("of a text completion it is a number of likely tokens, such as 5")
    return None if value is False else value


OneOrMany = BeforeValidator(_listed, json_schema_input_type=str | list[str])


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, BeforeValidator(_joined_parts, json_schema_input_type=str | list[TextPart])]


class StreamOptions(BaseModel):
    include_usage: bool = False


class Sampling(BaseModel):
    """What chat and text completions share. Greedy unless a temperature is given; `top_k` and `explain` are ours."""

    model_config = ConfigDict(extra="allow")

    model: Text
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, description="keep only so many of the likeliest tokens; 0 and -1 keep all")
    n: int = Field(1, ge=1, le=128, description="answers per prompt; each is sampled from a seed of its own")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[
        tuple[Annotated[Text, Field(min_length=1)], ...],
        OneOrMany,
    ] = Field((), max_length=4)
    stream: bool = False
    stream_options: StreamOptions | None = None
    explain: bool = False

    @model_validator(mode="before")
    @classmethod
    def null_is_absent(cls, fields: object) -> object:
        return {k: v for k, v in fields.items() if v is not None} if isinstance(fields, dict) else fields

    @model_validator(mode="after")
    def asks_for_nothing_more(self) -> "Sampling":
        for name, value in (self.model_extra or {}).items():
            if name not in NEUTRAL and name not in IGNORED:
                raise ValueError(f"Unrecognized request argument supplied: {name}")
            if name in NEUTRAL and value not in NEUTRAL[name]:
                raise ValueError(f"{name} = {value!r:.40} is not supported by this endpoint; leave it out")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed when stream is true")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(Sampling):
    model_config = ConfigDict(json_schema_extra={"examples": [CHAT_EXAMPLE]})

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MOST_LOGPROBS)

    @model_validator(mode="after")
    def alternatives_come_with_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is only allowed when logprobs is true")
        return self

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many likely tokens to report beside each token of the answer; None: report nothing."""
        return self.top_logprobs if self.logprobs else None


class CompletionRequest(Sampling):
    model_config = ConfigDict(json_schema_extra={"examples": [COMPLETION_EXAMPLE]})

    prompt: Annotated[tuple[Text, ...], OneOrMany] = Field(min_length=1)
    logprobs: Annotated[int | None, BeforeValidator(_no_bool)] = Field(None, ge=0, le=MOST_LOGPROBS)
    best_of: int | None = Field(None, ge=1)
    echo: bool = False

    @model_validator(mode="after")
    def gives_what_it_makes(self) -> "CompletionRequest":
        if self.best_of not in (None, self.n):
            raise ValueError(f"best_of = {self.best_of} is not supported by this endpoint beyond n; leave it out")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs is not supported by this endpoint; leave one of them out")
        return self

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return self.logprobs
