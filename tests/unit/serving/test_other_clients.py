"""Clients that are not OpenAI's own, over a real port. Skipped where they are not installed: no extra has them."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from pipeline.serving.app import build_app
from pipeline.serving.engine import Engine
from pipeline.serving.release_follower import ReleaseFollower
from tests.unit.serving.conftest import Endpoint


@pytest.fixture
def url(endpoint: Endpoint) -> Iterator[str]:
    engine = Engine(endpoint.base, endpoint.config.serve)
    follower = ReleaseFollower(endpoint.store, endpoint.base, engine.swap, poll_seconds=3600)
    server = uvicorn.Server(uvicorn.Config(build_app(endpoint.config, engine, follower), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        thread.join(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    server.should_exit = True
    thread.join()


def answer(endpoint: Endpoint) -> Any:
    fields = {"model": "wiseline", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 10}
    return endpoint.client.post("/v1/chat/completions", json=fields).json()


def test_langchain(endpoint: Endpoint, url: str) -> None:
    langchain_openai = pytest.importorskip("langchain_openai")
    expected = answer(endpoint)
    chat = langchain_openai.ChatOpenAI(model="wiseline", base_url=url, api_key="none", max_tokens=10, temperature=0)
    said = chat.invoke("Hi")
    assert said.content == expected["choices"][0]["message"]["content"]
    assert said.usage_metadata["output_tokens"] == expected["usage"]["completion_tokens"]
    assert "".join(chunk.content for chunk in chat.stream("Hi")) == said.content


def test_litellm(endpoint: Endpoint, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # otherwise its import asks the network
    litellm = pytest.importorskip("litellm")
    expected = answer(endpoint)
    fields: dict[str, Any] = {"model": "openai/wiseline", "api_base": url, "api_key": "none", "max_tokens": 10}
    said = litellm.completion(messages=[{"role": "user", "content": "Hi"}], **fields)
    assert said.choices[0].message.content == expected["choices"][0]["message"]["content"]
    assert said.usage.total_tokens == expected["usage"]["total_tokens"]
    pieces = litellm.completion(messages=[{"role": "user", "content": "Hi"}], stream=True, **fields)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == said.choices[0].message.content
