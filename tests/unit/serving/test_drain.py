"""Stopping, and answers that do not come: who is let end, who is refused, who is given up."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from starlette.testclient import TestClient

from pipeline.config import load_config
from pipeline.serving.api_errors import ApiError
from pipeline.serving.app import build_app
from pipeline.serving.drain import Drain
from pipeline.serving.engine import Engine
from pipeline.serving.release_follower import ReleaseFollower
from tests.unit.serving.conftest import Endpoint, Gate

TEXT: dict[str, Any] = {"model": "wiseline", "prompt": "Who leads", "max_tokens": 6}


async def test_what_runs_may_end_and_nobody_else_comes_in() -> None:
    drain = Drain()
    with drain.running():
        finishing = asyncio.create_task(drain.finish(seconds=30))
        await asyncio.sleep(0)
        with pytest.raises(ApiError) as refused, drain.running():
            pass
        assert (refused.value.status, refused.value.headers) == (503, {"retry-after": "5"})
        assert not finishing.done()
    assert await finishing


async def test_an_idle_replica_is_drained_at_once_and_a_stuck_one_is_given_up() -> None:
    assert await Drain().finish(seconds=0.01)
    stuck = Drain()
    with stuck.running():
        assert not await stuck.finish(seconds=0.01)


def test_a_stream_that_runs_ends_whole_while_the_replica_stops(
    endpoint: Endpoint, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, drain, finished = endpoint.config, Drain(), []

    async def finish(*, seconds: float) -> None:
        """The model goes on when the stop has begun. TestClient's streams end with the app, so it waits for ours."""
        assert drain._running == 1
        gate.open()
        finished.append(await Drain.finish(drain, seconds=seconds))
        assert drain._running == 0
        await asyncio.to_thread(running.result)

    monkeypatch.setattr(drain, "finish", finish)
    engine = Engine(endpoint.base, config.serve)
    follower = ReleaseFollower(endpoint.store, endpoint.base, engine.swap, poll_seconds=3600)
    with ThreadPoolExecutor() as pool:
        with TestClient(build_app(config, engine, follower, drain=drain)) as client:
            running = pool.submit(client.post, "/v1/completions", json={**TEXT, "stream": True})
            assert gate.reached.wait(30)
            drain.draining = True
            late = client.post("/v1/completions", json=TEXT)
            health = client.get("/healthz")
        assert finished == [True]
        assert running.result().text.endswith("data: [DONE]\n\n")
    assert (late.status_code, late.json()["error"]["code"]) == (503, "stopping")
    assert (health.status_code, health.json()["status"]) == (503, "stopping")


def test_an_answer_that_does_not_begin_is_given_up(start: Callable[..., Endpoint], gate: Gate) -> None:
    endpoint = start(first_token_seconds=0.05)
    response = endpoint.client.post("/v1/completions", json=TEXT)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "timeout")
    assert response.headers["retry-after"] == "1"
    gate.open()


def test_a_stream_that_stands_still_ends_with_an_error(start: Callable[..., Endpoint], gate: Gate) -> None:
    endpoint = start(next_token_seconds=0.2)
    client = openai.OpenAI(api_key="x", base_url="http://testserver/v1", http_client=endpoint.client, max_retries=0)
    gate.open()
    handle = endpoint.base.model.register_forward_hook(lambda *_: gate.opened.clear())  # one forward, and no further
    try:
        with pytest.raises(openai.APIError, match="stood still"):
            list(client.completions.create(**TEXT, stream=True))
    finally:
        handle.remove()
        gate.open()


def test_a_slow_stream_that_goes_on_is_not_cut(start: Callable[..., Endpoint], base: Any) -> None:
    """Six tokens take longer together than the limit between two of them."""
    endpoint = start(next_token_seconds=4, first_token_seconds=60)
    pause = threading.Event()
    handle = base.model.register_forward_pre_hook(lambda *_: (pause.wait(0.8), None)[1])
    try:
        response = endpoint.client.post("/v1/completions", json=TEXT)
    finally:
        handle.remove()
    assert response.status_code == 200
    assert response.json()["usage"]["completion_tokens"] == 6


def test_tokens_that_show_nothing_are_no_standstill(start: Callable[..., Endpoint], base: Any) -> None:
    """All that is written may still become the stop string, so nothing is sent before the end."""
    endpoint = start(next_token_seconds=4, first_token_seconds=60)
    fields = {**TEXT, "seed": 1, "temperature": 1.0}
    whole = endpoint.client.post("/v1/completions", json=fields).json()["choices"][0]["text"]
    pause = threading.Event()
    handle = base.model.register_forward_pre_hook(lambda *_: (pause.wait(0.8), None)[1])
    try:
        response = endpoint.client.post("/v1/completions", json={**fields, "stop": [whole + "and more"]})
    finally:
        handle.remove()
    assert (response.status_code, response.json()["choices"][0]["text"]) == (200, whole)


def test_prompts_beyond_the_limit_are_refused(start: Callable[..., Endpoint]) -> None:
    endpoint = start(max_prompt_tokens=4)
    response = endpoint.client.post("/v1/completions", json={**TEXT, "prompt": "one two three four five"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert "reads at most 4" in response.json()["error"]["message"]


def test_paths_in_the_config_are_absolute() -> None:
    assert (load_config(overrides=["serve.keys_file=keys.json"]).serve.keys_file or "").startswith("/")
