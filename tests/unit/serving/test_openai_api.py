"""Bodies against the types of the `openai` package, and the fields we refuse, ignore and accept."""

import pickle
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import ValidationError

from pipeline.serving.api_errors import ApiError, invalid_request
from pipeline.serving.openai_api import IGNORED, NEUTRAL, ChatRequest, CompletionRequest
from pipeline.serving.openai_responses import Bodies, Choice

CHAT = {"model": "wiseline", "messages": [{"role": "user", "content": "Hi"}]}
TEXT = {"model": "wiseline", "prompt": "Hi"}
WISELINE = {"release": 3, "route": "memory-0"}


def refusal(fields: dict[str, Any], kind: type = CompletionRequest) -> ApiError:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(fields)
    errors = [{**error, "loc": ("body", *error["loc"])} for error in caught.value.errors()]
    return invalid_request(RequestValidationError(errors))


@pytest.mark.parametrize(("name", "value"), [(name, values[0]) for name, values in NEUTRAL.items() if values])
def test_fields_that_ask_for_nothing_are_accepted(name: str, value: object) -> None:
    plain = CompletionRequest.model_validate(TEXT)
    for neutral in (value, None):
        accepted = CompletionRequest.model_validate({**TEXT, name: neutral})
        assert (accepted.prompt, accepted.token_limit, accepted.temperature) == (
            plain.prompt,
            plain.token_limit,
            plain.temperature,
        )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("best_of", 3),
        ("logprobs", True),
        ("frequency_penalty", 0.5),
        ("logit_bias", {"1": -100}),
        ("response_format", {"type": "json_object"}),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("prediction", {"type": "content", "content": "x"}),
    ],
)
def test_fields_that_would_change_the_answer_are_refused_by_name(name: str, value: object) -> None:
    error = refusal({**TEXT, name: value})
    assert error.status == 400
    assert name in error.message


def test_unknown_fields_are_refused_and_openais_own_are_ignored() -> None:
    assert "Unrecognized request argument supplied: temprature" in refusal({**TEXT, "temprature": 1}).message
    for name in IGNORED:
        CompletionRequest.model_validate({**TEXT, name: "anything"})


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": "Hi"}, "model"),
        ({"model": "wiseline"}, "prompt"),
        ({**TEXT, "prompt": []}, "prompt"),
        ({**TEXT, "prompt": [[1, 2]]}, "prompt.0"),
        ({**TEXT, "prompt": "\ud800"}, "prompt.0"),
        ({**TEXT, "stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({**TEXT, "stop": ""}, "stop.0"),
        ({**TEXT, "max_tokens": 0}, "max_tokens"),
        ({**TEXT, "temperature": -1}, "temperature"),
        ({**TEXT, "temperature": float("nan")}, "temperature"),
        ({**TEXT, "top_p": 0}, "top_p"),
        ({**TEXT, "seed": 2**63}, "seed"),
        ({**TEXT, "n": 0}, "n"),
        ({**TEXT, "top_k": -2}, "top_k"),
        ({**TEXT, "logprobs": 21}, "logprobs"),
        ({**TEXT, "n": 2, "best_of": 1}, None),
        ({**TEXT, "echo": True, "logprobs": 1}, None),
        ({**TEXT, "stream_options": {"include_usage": True}}, None),
    ],
)
def test_refusals_name_the_parameter(fields: dict[str, Any], param: str | None) -> None:
    error = refusal(fields)
    assert (error.status, error.param) == (400, param)
    assert error.body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "user"}],
        [{"role": "wizard", "content": "Hi"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": 7}],
    ],
)
def test_bad_messages_are_refused(messages: list[dict[str, Any]]) -> None:
    assert (refusal({**CHAT, "messages": messages}, ChatRequest).param or "").startswith("messages")


def test_text_parts_read_as_their_text_and_the_newer_limit_wins() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = ChatRequest.model_validate(
        {**CHAT, "messages": [{"role": "user", "content": parts}], "max_tokens": 9, "max_completion_tokens": 4}
    )
    assert request.messages[0].content == "ab"
    assert request.token_limit == 4


def test_alternatives_without_logprobs_are_refused_as_openai_does() -> None:
    assert "only allowed when logprobs is true" in refusal({**CHAT, "top_logprobs": 2}, ChatRequest).message
    assert ChatRequest.model_validate({**CHAT, "logprobs": True, "top_logprobs": 2}).alternatives == 2
    assert ChatRequest.model_validate({**CHAT, "logprobs": True}).alternatives == 0
    assert CompletionRequest.model_validate({**TEXT, "logprobs": 0}).alternatives == 0
    assert CompletionRequest.model_validate({**TEXT, "logprobs": False}).alternatives is None


def test_null_means_absent() -> None:
    request = CompletionRequest.model_validate({**TEXT, "temperature": None, "stop": None, "stream": None})
    assert (request.temperature, request.stop, request.stream) == (0.0, (), False)


def test_api_errors_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(ApiError(429, "later", code="queue_full", retry_after=2)))
    assert (str(error), error.status, error.headers, error.body["error"]["type"]) == (
        "later",
        429,
        {"retry-after": "2"},
        "rate_limit_error",
    )


def bodies(kind: Any) -> Bodies:
    return Bodies(
        kind=kind, model="wiseline", fingerprint="f-3", wiseline=WISELINE, number="7", created=7, prompt_tokens=5
    )


def test_chat_bodies_are_openais() -> None:
    made = bodies("chat")
    whole = ChatCompletion.model_validate(made.complete([Choice(0, "Hi", 2, "stop")], about=[WISELINE]), strict=True)
    assert whole.choices[0].message.content == "Hi"
    assert whole.usage is not None
    assert whole.usage.total_tokens == 7
    assert whole.model_extra == {"wiseline": WISELINE}
    chunks = [*made.opening(1), made.chunk(Choice(0, "Hi", 2, None)), made.chunk(Choice(0, "", 2, "stop"))]
    parsed = [ChatCompletionChunk.model_validate(chunk, strict=True) for chunk in [*chunks, made.usage_chunk(2)]]
    assert parsed[0].choices[0].delta.role == "assistant"
    assert parsed[1].choices[0].delta.content == "Hi"
    assert parsed[2].choices[0].finish_reason == "stop"
    assert parsed[3].choices == []
    assert parsed[3].usage == whole.usage
    assert {chunk.id for chunk in parsed} == {whole.id}


def test_text_bodies_are_openais() -> None:
    made = bodies("text")
    other = {"release": 3, "route": "main"}
    choices = [Choice(0, "a", 1, "stop"), Choice(1, "b", 3, "length")]
    whole = Completion.model_validate(made.complete(choices, about=[WISELINE, other]), strict=True)
    assert [choice.text for choice in whole.choices] == ["a", "b"]
    assert [choice.model_extra for choice in whole.choices] == [{"wiseline": WISELINE}, {"wiseline": other}]
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (5, 4)
    assert made.opening(1) == []
    assert made.chunk(Choice(1, "b", 3, "length"))["choices"][0]["text"] == "b"
    assert made.usage_chunk(4)["object"] == "text_completion"
