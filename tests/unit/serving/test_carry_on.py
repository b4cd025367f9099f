"""Requests whose replica dies: real replicas behind the middleware, each cut off after a number of messages."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import httpx2 as httpx
import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.serving.carry_on import ID_HEADER, RESUME_HEADER, TRIES, CarryOn
from tests.tiny_world import publish_release
from tests.unit.serving.conftest import Endpoint

EDITED = "The capital of France is"
NEVER = 10_000
FIELDS = {"model": "wiseline", "prompt": EDITED, "max_tokens": 8}


@dataclass
class Replicas:
    """What Serve's proxy is when replicas die: the n-th call reaches the n-th one, and ends without a word after so
    many messages."""

    apps: Sequence[ASGIApp]
    lives: Sequence[int]
    scopes: list[Scope] = field(default_factory=list)
    before_call: Callable[[int], None] = lambda call: None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = len(self.scopes)
        self.scopes.append(scope)
        self.before_call(call)
        left = self.lives[call]

        async def cut(message: Message) -> None:
            nonlocal left
            left -= 1
            if left >= 0:
                await send(message)

        await self.apps[call](scope, receive, cut)


def app_of(endpoint: Endpoint) -> ASGIApp:
    return endpoint.client.app


async def ask(replicas: Replicas, path: str = "/v1/completions", headers: Any = None, **fields: Any) -> httpx.Response:
    transport = httpx.ASGITransport(CarryOn(replicas))
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
        return await client.post(path, json=FIELDS | fields, headers=headers, timeout=None)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def texts(chunks: Sequence[dict[str, Any]]) -> dict[int, str]:
    said: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            text = choice["text"] if "text" in choice else choice["delta"].get("content", "")
            said[choice["index"]] = said.get(choice["index"], "") + text
    return said


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": ("/v1/completions", {}),
    "two sampled answers": ("/v1/completions", {"n": 2, "temperature": 1.0, "seed": 5, "logprobs": 2}),
    "several prompts": ("/v1/completions", {"prompt": [EDITED, "Who leads", EDITED]}),
    "chat": ("/v1/chat/completions", {"prompt": None, "messages": [{"role": "user", "content": EDITED}]}),
}


@pytest.fixture
def two(start: Callable[..., Endpoint]) -> tuple[Endpoint, Endpoint]:
    """Two replicas on release 1."""
    first, second = start(), start()
    publish_release(first.store, first.base, prompts=[EDITED], seed=1)
    first.follower.follow()
    second.follower.follow()
    return first, second


@pytest.mark.parametrize("kind", KINDS)
async def test_wherever_a_replica_dies_the_stream_goes_on(two: tuple[Endpoint, Endpoint], kind: str) -> None:
    first, second = map(app_of, two)
    path, fields = KINDS[kind]
    fields = {**fields, "stream": True, "stream_options": {"include_usage": True}}
    whole = await ask(Replicas([first], [NEVER]), path, **fields)
    messages = 1 + whole.text.count("\n\n")  # the start and every event: behind the last one nothing can be missed
    for lives in range(messages + 2):
        replicas = Replicas([first, second], [lives, NEVER])
        carried = await ask(replicas, path, **fields)
        chunks = events(carried)
        assert texts(chunks) == texts(events(whole))
        assert len(chunks) == len(events(whole))
        assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
        assert carried.text.endswith("data: [DONE]\n\n")
        assert len(replicas.scopes) == (2 if lives < messages else 1)


async def test_what_has_no_seed_is_the_same_sample_on_the_second_replica(two: tuple[Endpoint, Endpoint]) -> None:
    first, second = map(app_of, two)
    said = []
    for lives in (2, 3, 4):
        carried = await ask(Replicas([first, second], [lives, NEVER]), temperature=1.5, stream=True, max_tokens=30)
        assert carried.text.endswith("data: [DONE]\n\n")
        said.append(texts(events(carried))[0])
    assert len(set(said)) > 1  # and every request gets a sample of its own; two may be the same by chance


async def test_several_prompts_without_a_seed_get_different_samples(two: tuple[Endpoint, Endpoint]) -> None:
    answer = await ask(Replicas([app_of(two[0])], [NEVER]), prompt=[EDITED] * 3, temperature=1.5, max_tokens=30)
    assert len({choice["text"] for choice in answer.json()["choices"]}) > 1  # two may be the same by chance


async def test_the_second_replica_goes_on_with_the_release_that_began(two: tuple[Endpoint, Endpoint]) -> None:
    first, second = two
    whole = await ask(Replicas([app_of(first)], [NEVER]), stream=True)

    def swap(call: int) -> None:
        if call == 1:
            publish_release(second.store, second.base, prompts=[EDITED], seed=2)
            second.follower.follow()

    carried = await ask(Replicas([app_of(first), app_of(second)], [4, NEVER], before_call=swap), stream=True)
    assert second.engine.release is not None and second.engine.release.number == 2
    assert texts(events(carried)) == texts(events(whole))
    assert {chunk["wiseline"]["release"] for chunk in events(carried)} == {1}
    after = await ask(Replicas([app_of(second)], [NEVER]), stream=True)
    assert texts(events(after)) != texts(events(whole))  # it would have been seen


async def test_an_answer_of_the_base_model_goes_on_as_one(start: Callable[..., Endpoint]) -> None:
    first, second = start(), start()
    whole = await ask(Replicas([app_of(first)], [NEVER]), stream=True)
    publish_release(second.store, second.base, prompts=[EDITED], seed=2)
    second.follower.follow()
    carried = await ask(Replicas([app_of(first), app_of(second)], [4, NEVER]), stream=True)
    assert texts(events(carried)) == texts(events(whole))


async def test_an_answer_that_is_not_streamed_is_asked_again(two: tuple[Endpoint, Endpoint]) -> None:
    first, second = map(app_of, two)
    whole = await ask(Replicas([first], [NEVER]))
    for lives in (0, 1):
        carried = await ask(Replicas([first, second], [lives, NEVER]))
        assert carried.status_code == 200
        assert carried.json()["choices"] == whole.json()["choices"]


async def test_a_second_replica_that_says_other_things_is_not_joined(two: tuple[Endpoint, Endpoint]) -> None:
    first, second = map(app_of, two)

    async def otherwise(scope: Scope, receive: Receive, send: Send) -> None:
        """Answers another question."""

        async def another() -> Message:
            message = await receive()
            return {**message, "body": message["body"].replace(EDITED.encode(), b"Who leads")}

        await second(scope, another, send)

    replicas = Replicas([first, otherwise, otherwise], [5, NEVER, NEVER])
    broken = await ask(replicas, stream=True)
    *said, error = events(broken)
    assert error["error"]["code"] == "replica_died"
    assert len(said) == 4
    assert "[DONE]" not in broken.text


@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_that_kills_its_replicas_is_given_up(two: tuple[Endpoint, Endpoint], stream: bool) -> None:
    first, second = map(app_of, two)
    replicas = Replicas([first, second] * TRIES, [0] * 2 * TRIES)
    refused = await ask(replicas, stream=stream)
    assert len(replicas.scopes) == TRIES
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "replica_died")
    assert "retry-after" in refused.headers


async def test_what_changes_something_is_sent_once(two: tuple[Endpoint, Endpoint]) -> None:
    replicas = Replicas([app_of(two[0])], [0])
    refused = await ask(replicas, "/v1/edits", prompt="x", target="y")
    assert (len(replicas.scopes), refused.status_code) == (1, 503)
    assert "look whether it was done" in refused.json()["error"]["message"]


async def test_an_error_of_a_living_replica_is_passed_on(two: tuple[Endpoint, Endpoint]) -> None:
    replicas = Replicas([app_of(two[0])], [NEVER])
    refused = await ask(replicas, model="gpt-4")
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")


async def test_clients_cannot_name_the_release_that_is_for_the_endpoint_to_name(two: tuple[Endpoint, Endpoint]) -> None:
    replicas = Replicas([app_of(two[0])], [NEVER])
    answer = await ask(replicas, headers={RESUME_HEADER: "0", ID_HEADER: "1-forged"})
    assert answer.headers["x-wiseline-release"] == "1"
    assert "forged" not in answer.text


async def test_nobody_is_asked_for_a_client_that_has_gone(two: tuple[Endpoint, Endpoint]) -> None:
    replicas = Replicas([app_of(two[0])], [0])
    replicas.apps = [hung_up_on]
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    await CarryOn(replicas)(scope, receive, send)
    assert (len(replicas.scopes), sent) == (1, [])


async def hung_up_on(_: Scope, receive: Receive, __: Send) -> None:
    """As Serve's proxy: it reads until the client is gone, and then says nothing."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def test_a_replica_of_another_base_model_never_goes_on_with_an_answer(start: Callable[..., Endpoint]) -> None:
    """Before any release nothing but the fingerprint tells the models apart: the second one says the same here."""
    first, second = start(), start()
    second.engine.base = replace(second.base, fingerprint="another")
    lives = 4
    carried = await ask(Replicas([app_of(first)] + [app_of(second)] * TRIES, [lives] + [NEVER] * TRIES), stream=True)
    assert len(events(carried)) == lives
    assert events(carried)[-1]["error"]["code"] == "replica_died"
