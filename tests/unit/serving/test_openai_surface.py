"""What the openai client can ask for, over HTTP in process: every body is held against the client's own types."""

import json
import math
from collections.abc import Callable
from typing import Any

import openai
import pytest
import torch
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from tests.tiny_world import publish_release
from tests.unit.serving.conftest import Endpoint

EDITED = "The capital of France is"
TEXT: dict[str, Any] = {"model": "wiseline", "prompt": EDITED, "max_tokens": 12}
CHAT: dict[str, Any] = {"model": "wiseline", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 12}
PATHS = {"/v1/completions": Completion, "/v1/chat/completions": ChatCompletion}


def client(endpoint: Endpoint) -> openai.OpenAI:
    return openai.OpenAI(api_key="none", base_url="http://testserver/v1", http_client=endpoint.client, max_retries=0)


def ask(endpoint: Endpoint, fields: dict[str, Any]) -> Any:
    path = "/v1/chat/completions" if "messages" in fields else "/v1/completions"
    response = endpoint.client.post(path, json=fields)
    assert response.status_code == 200, response.text
    return strictly(PATHS[path], response.json())


def stream(endpoint: Endpoint, fields: dict[str, Any]) -> list[Any]:
    path = "/v1/chat/completions" if "messages" in fields else "/v1/completions"
    response = endpoint.client.post(path, json={**fields, "stream": True})
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert events.pop() == "[DONE]"
    bodies = [json.loads(event) for event in events]
    if "messages" in fields:
        return [strictly(ChatCompletionChunk, body) for body in bodies]
    return [strictly(Completion, unfinished(body)) for body in bodies]


def unfinished(body: dict[str, Any]) -> dict[str, Any]:
    """OpenAI streams text pieces with finish_reason null, which its client reads and its type does not name."""
    for choice in body["choices"]:
        assert choice["finish_reason"] in (None, "stop", "length")
        choice["finish_reason"] = choice["finish_reason"] or "stop"
    return body


def strictly(kind: type[BaseModel], body: dict[str, Any]) -> Any:
    """The body as the client's type: no field missing, none of another type, and none that is not OpenAI's but ours."""
    parsed = kind.model_validate(body, strict=True)
    assert extras(parsed) <= {"wiseline"}
    return parsed


def extras(model: object) -> set[str]:
    if isinstance(model, list):
        return set().union(*map(extras, model))
    if not isinstance(model, BaseModel):
        return set()
    inner = [extras(getattr(model, name)) for name in type(model).model_fields]
    return set(model.model_extra or {}).union(*inner)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 3, "temperature": 1.0, "seed": 1},
        {"logprobs": True, "top_logprobs": 3},
        {"logprobs": True, "n": 2},
        {"stop": ["e"]},
        {"max_tokens": 1},
    ],
)
def test_chat_bodies_are_the_clients_types(endpoint: Endpoint, fields: dict[str, Any]) -> None:
    publish_release(endpoint.store, endpoint.base, prompts=[EDITED], seed=1)
    endpoint.follower.follow()
    whole = ask(endpoint, {**CHAT, **fields})
    chunks = stream(endpoint, {**CHAT, **fields, "stream_options": {"include_usage": True}})
    for choice in whole.choices:
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].index == choice.index]
        assert mine[0].delta.role == "assistant"
        assert "".join(piece.delta.content or "" for piece in mine) == choice.message.content
        assert [piece.finish_reason for piece in mine if piece.finish_reason] == [choice.finish_reason]
        said = [token for piece in mine if piece.logprobs for token in piece.logprobs.content]
        assert said == (choice.logprobs.content if choice.logprobs else [])
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"prompt": [EDITED, "Who leads"], "n": 2, "temperature": 1.0, "seed": 1},
        {"logprobs": 0},
        {"logprobs": 3, "n": 2, "best_of": 2},
        {"echo": True},
        {"stop": "e", "logprobs": 2},
    ],
)
def test_text_bodies_are_the_clients_types(endpoint: Endpoint, fields: dict[str, Any]) -> None:
    whole = ask(endpoint, {**TEXT, **fields})
    chunks = stream(endpoint, {**TEXT, **fields, "stream_options": {"include_usage": True}})
    for choice in whole.choices:
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].index == choice.index]
        assert "".join(piece.text for piece in mine) == choice.text
        lists = [piece.logprobs for piece in mine if piece.logprobs]
        assert [token for one in lists for token in one.tokens] == (choice.logprobs.tokens if choice.logprobs else [])
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_each_of_several_answers_has_a_seed_of_its_own_and_all_are_repeated(endpoint: Endpoint) -> None:
    fields = {**TEXT, "prompt": [EDITED, "Who leads"], "temperature": 1.5}
    several = [choice.text for choice in ask(endpoint, {**fields, "n": 3, "seed": 7}).choices]
    assert several == [choice.text for choice in ask(endpoint, {**fields, "n": 3, "seed": 7}).choices]
    assert len(set(several)) == 6
    alone = [choice.text for choice in ask(endpoint, {**fields, "seed": 7}).choices]
    assert alone == [several[0], several[3]]


def test_a_prompt_is_counted_once_for_all_its_answers(endpoint: Endpoint) -> None:
    one, several = ask(endpoint, TEXT).usage, ask(endpoint, {**TEXT, "n": 3}).usage
    assert several.prompt_tokens == one.prompt_tokens == len(endpoint.base.tokenizer(EDITED)["input_ids"])
    assert several.completion_tokens == 3 * one.completion_tokens
    response = endpoint.client.post("/v1/completions", json={**TEXT, "n": 3})
    assert response.headers["x-wiseline-route"] == "main"


def test_more_answers_than_a_batch_holds_are_refused(start: Callable[..., Endpoint]) -> None:
    with pytest.raises(openai.BadRequestError, match="at most 4 answers, not 5"):
        client(start(max_batch_requests=4)).completions.create(**TEXT, n=5)


def test_top_k_one_is_greedy_at_any_temperature(endpoint: Endpoint) -> None:
    greedy = ask(endpoint, TEXT).choices[0].text
    assert ask(endpoint, {**TEXT, "temperature": 2.0, "top_k": 1, "seed": 3}).choices[0].text == greedy
    assert ask(endpoint, {**TEXT, "temperature": 2.0, "seed": 3}).choices[0].text != greedy


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_logprobs_are_the_models_own(endpoint: Endpoint, temperature: float) -> None:
    """Against one plain forward of the model over prompt and answer, whatever the answer was sampled with."""
    base = endpoint.base
    fields = {**CHAT, "logprobs": True, "top_logprobs": 4, "temperature": temperature, "top_k": 5, "seed": 2}
    said = ask(endpoint, fields).choices[0].logprobs.content
    assert len(said) == 12
    prompt = base.tokenizer.apply_chat_template(CHAT["messages"], add_generation_prompt=True, return_dict=False)
    ids = list(prompt)
    for token in said:
        with torch.no_grad():
            expected_V = base.model(torch.tensor([ids])).logits[0, -1].float().log_softmax(dim=-1)
        likeliest = expected_V.topk(4)
        assert [one.logprob for one in token.top_logprobs] == pytest.approx(likeliest.values.tolist(), abs=1e-4)
        chosen = [
            place for place, value in enumerate(expected_V.tolist()) if math.isclose(value, token.logprob, abs_tol=1e-4)
        ]
        spelled = [place for place in chosen if base.tokenizer.decode([place]).encode() == bytes(token.bytes)]
        partly = [place for place in chosen if "\ufffd" in base.tokenizer.decode([place])]
        ids.append((spelled or partly)[0])
    assert bytes(byte for token in said for byte in token.bytes).decode(errors="replace").lstrip() == (
        ask(endpoint, fields).choices[0].message.content
    )


def test_text_logprobs_are_chats_in_lists(endpoint: Endpoint) -> None:
    choice = ask(endpoint, {**TEXT, "logprobs": 2}).choices[0]
    logprobs = choice.logprobs
    assert len(logprobs.tokens) == 12
    for token, logprob, top, offset in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, logprobs.text_offset, strict=True
    ):
        assert max(top.values()) == pytest.approx(logprob)  # greedy
        if "bytes:" not in token:  # this model writes bytes that are no text; a token behind them begins with them
            assert choice.text[offset:].lstrip("\ufffd").startswith(token)


def test_tokens_of_a_stop_string_are_left_out(endpoint: Endpoint) -> None:
    whole = ask(endpoint, {**TEXT, "max_tokens": 30, "logprobs": 0}).choices[0]
    stop = whole.text[8:11]
    cut = ask(endpoint, {**TEXT, "max_tokens": 30, "logprobs": 0, "stop": [stop]}).choices[0]
    assert cut.text == whole.text[: whole.text.find(stop)]
    assert all(offset < len(cut.text) for offset in cut.logprobs.text_offset)
    assert cut.logprobs.tokens == whole.logprobs.tokens[: len(cut.logprobs.tokens)]
    following = whole.logprobs.text_offset[len(cut.logprobs.tokens)]
    assert following >= len(cut.text)


def test_echo_puts_the_prompt_in_front(endpoint: Endpoint) -> None:
    assert ask(endpoint, {**TEXT, "echo": True}).choices[0].text == EDITED + ask(endpoint, TEXT).choices[0].text


def test_several_turns_are_read(endpoint: Endpoint) -> None:
    turns = [*CHAT["messages"], {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Who leads?"}]
    longer, last = ask(endpoint, {**CHAT, "messages": turns}), ask(endpoint, {**CHAT, "messages": turns[-1:]})
    assert longer.usage.prompt_tokens > last.usage.prompt_tokens
    assert longer.choices[0].message.content != last.choices[0].message.content


def test_a_model_is_found_by_our_name_and_its_own(endpoint: Endpoint) -> None:
    strictly(Model, endpoint.client.get("/v1/models/wiseline").json())
    for name in ("wiseline", endpoint.config.model.path):
        found = client(endpoint).models.retrieve(name)
        assert (found.id, found.wiseline["release"]) == ("wiseline", 0)  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError) as missing:
        client(endpoint).models.retrieve("gpt-4")
    assert missing.value.code == "model_not_found"
