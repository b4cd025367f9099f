"""The endpoint over HTTP, in process: answers, streams, headers and errors, as the openai client sees them."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from pipeline.models.base_model import load_base_model
from pipeline.serving.body_limit import MAX_BODY_BYTES
from tests.tiny_world import publish_release, save_model
from tests.unit.serving.conftest import Endpoint, Gate

EDITED, OTHER = "The capital of France is", "Who leads the company?"
TEXT = {"model": "wiseline", "prompt": EDITED, "max_tokens": 10}
CHAT = {"model": "wiseline", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 10}


def client(endpoint: Endpoint) -> openai.OpenAI:
    return openai.OpenAI(api_key="none", base_url="http://testserver/v1", http_client=endpoint.client, max_retries=0)


def release(endpoint: Endpoint, *, seed: int = 1) -> None:
    publish_release(endpoint.store, endpoint.base, prompts=[EDITED], seed=seed)
    endpoint.follower.follow()
    assert endpoint.follower.state.error is None


def complete(endpoint: Endpoint, **fields: Any) -> Any:
    response = endpoint.client.post("/v1/completions", json={**TEXT, **fields})
    assert response.status_code == 200, response.text
    return response


def test_before_any_release_the_base_model_answers(endpoint: Endpoint) -> None:
    response = complete(endpoint)
    assert response.headers["x-wiseline-release"] == "0"
    assert response.headers["x-wiseline-route"] == "main"
    assert response.json()["wiseline"] == {"release": 0, "route": "main"}


def test_a_release_changes_the_edited_prompt_and_nothing_else(endpoint: Endpoint) -> None:
    before = {prompt: complete(endpoint, prompt=prompt).json()["choices"][0]["text"] for prompt in (EDITED, OTHER)}
    release(endpoint)
    edited, other = complete(endpoint), complete(endpoint, prompt=OTHER)
    assert edited.json()["choices"][0]["text"] != before[EDITED]
    assert edited.headers["x-wiseline-route"] == "memory-0"
    assert edited.json()["wiseline"] == {"release": 1, "route": "memory-0"}
    assert other.json()["choices"][0]["text"] == before[OTHER]
    assert (other.headers["x-wiseline-release"], other.headers["x-wiseline-route"]) == ("1", "main")
    unedited = endpoint.client.post("/v1/completions", json=TEXT, headers={"x-wiseline-route": "off"})
    assert unedited.json()["choices"][0]["text"] == before[EDITED]
    assert unedited.headers["x-wiseline-route"] == "main"


def test_explain_says_why(endpoint: Endpoint) -> None:
    release(endpoint)
    why = complete(endpoint, explain=True).json()["wiseline"]["why"]
    assert why["memory"] == 0
    assert why["score"] > why["threshold"]
    assert why["nearest_edit"] == {"edit_id": "edit-0", "prompt": EDITED, "target": "new", "subject": None}
    far = complete(endpoint, prompt=OTHER, explain=True).json()["wiseline"]["why"]
    assert far["memory"] is None
    assert far["score"] <= far["threshold"]
    assert far["nearest_edit"]["edit_id"] == "edit-0"


def test_several_prompts_are_routed_each_for_itself_by_one_release(endpoint: Endpoint) -> None:
    release(endpoint)
    response = complete(endpoint, prompt=[OTHER, EDITED])
    alone = [complete(endpoint, prompt=prompt).json()["choices"][0]["text"] for prompt in (OTHER, EDITED)]
    assert [choice["text"] for choice in response.json()["choices"]] == alone
    assert response.headers["x-wiseline-route"] == "main, memory-0"


@pytest.mark.parametrize("prompt", [EDITED, OTHER])
def test_a_streamed_text_is_the_unstreamed_text(endpoint: Endpoint, prompt: str) -> None:
    release(endpoint)
    fields: dict[str, Any] = {"model": "wiseline", "prompt": prompt, "max_tokens": 30}
    whole = client(endpoint).completions.create(**fields)
    chunks = list(client(endpoint).completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert chunks[0].wiseline == whole.wiseline  # type: ignore[attr-defined]


def test_a_streamed_chat_is_the_unstreamed_chat(endpoint: Endpoint) -> None:
    whole = client(endpoint).chat.completions.create(**CHAT)  # type: ignore[call-overload]
    chunks = list(client(endpoint).chat.completions.create(**CHAT, stream=True))  # type: ignore[call-overload]
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert said == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"


def test_streams_carry_the_headers_and_end_with_done(endpoint: Endpoint) -> None:
    release(endpoint)
    with endpoint.client.stream("POST", "/v1/completions", json={**TEXT, "stream": True}) as response:
        lines = [line for line in response.iter_lines() if line]
    assert response.headers["content-type"].startswith("text/event-stream")
    assert (response.headers["x-wiseline-release"], response.headers["x-wiseline-route"]) == ("1", "memory-0")
    assert lines[-1] == "data: [DONE]"
    assert all(json.loads(line.removeprefix("data: "))["wiseline"]["release"] == 1 for line in lines[:-1])


def test_a_seed_repeats_a_sampled_answer_and_another_changes_it(endpoint: Endpoint) -> None:
    answers = [complete(endpoint, temperature=1.5, seed=seed, max_tokens=20).json() for seed in (1, 1, 2)]
    texts = [answer["choices"][0]["text"] for answer in answers]
    assert texts[0] == texts[1] != texts[2]


def test_models_and_health_name_the_release(endpoint: Endpoint) -> None:
    release(endpoint)
    [model] = client(endpoint).models.list().data
    assert model.id == "wiseline"
    assert model.wiseline["release"] == 1  # type: ignore[attr-defined]
    response = endpoint.client.get("/healthz")
    assert response.status_code == 200
    assert response.json() == {
        "status": "ok",
        "release": 1,
        "fingerprint": endpoint.base.fingerprint,
        "layer": endpoint.base.layer,
        "follower": {"alive": True, "error": None},
    }


def test_health_shows_why_a_release_is_not_used(endpoint: Endpoint) -> None:
    release(endpoint)
    damaged = publish_release(endpoint.store, endpoint.base, prompts=[EDITED], seed=2)
    (Path(endpoint.store.uri) / damaged.bank.path).write_bytes(b"x")
    endpoint.follower.follow()
    health = endpoint.client.get("/healthz").json()
    assert health["release"] == 1
    assert "Release 2 is not used" in health["follower"]["error"]
    assert complete(endpoint).headers["x-wiseline-release"] == "1"


@pytest.mark.parametrize(
    ("path", "fields", "status", "code"),
    [
        ("/v1/completions", {**TEXT, "model": "gpt-4"}, 404, "model_not_found"),
        ("/v1/completions", {**TEXT, "prompt": " "}, 400, None),
        ("/v1/completions", {**TEXT, "prompt": ["a"] * 65}, 400, None),
        ("/v1/completions", {**TEXT, "prompt": "long " * 300}, 400, "context_length_exceeded"),
        ("/v1/completions", {**TEXT, "prompt": "a " * 125}, 400, "context_length_exceeded"),
        ("/v1/completions", {**TEXT, "max_tokens": 257}, 400, None),
        ("/v1/completions", {**TEXT, "temperature": "hot"}, 400, None),
        ("/v1/completions", {}, 400, None),
        ("/v1/completions", [], 400, None),
        ("/v1/chat/completions", {**CHAT, "messages": []}, 400, None),
        (
            "/v1/chat/completions",
            {**CHAT, "messages": [*CHAT["messages"], {"role": "system", "content": "x"}]},
            400,
            None,
        ),  # type: ignore[misc]
        ("/v1/nothing", {}, 404, None),
        ("/v1/models", {}, 405, None),
    ],
)
def test_errors_have_openais_shape(endpoint: Endpoint, path: str, fields: Any, status: int, code: str | None) -> None:
    response = endpoint.client.post(path, json=fields)
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", code)
    assert response.headers["x-wiseline-release"] == "0"


def test_bodies_that_are_no_json_or_too_large(endpoint: Endpoint) -> None:
    headers = {"content-type": "application/json"}
    broken = endpoint.client.post("/v1/completions", content=b"{", headers=headers)
    assert (broken.status_code, broken.json()["error"]["message"]) == (400, "The request body is not valid JSON.")
    large = endpoint.client.post("/v1/completions", content=b" " * (MAX_BODY_BYTES + 1), headers=headers)
    assert large.status_code == 413
    assert "larger than" in large.json()["error"]["message"]
    assert complete(endpoint).status_code == 200


def test_an_unknown_route_is_refused(endpoint: Endpoint) -> None:
    response = endpoint.client.post("/v1/completions", json=TEXT, headers={"x-wiseline-route": "memory-3"})
    assert response.status_code == 400


def test_a_model_without_chat_template_says_where_to_go(start: Callable[..., Endpoint], tmp_path: Path) -> None:
    endpoint = start()
    folder = save_model(tmp_path / "plain", chat=False)
    plain = load_base_model(endpoint.config.model.model_copy(update={"path": str(folder)}))
    from starlette.testclient import TestClient

    from pipeline.serving.app import build_app
    from pipeline.serving.engine import Engine
    from pipeline.serving.release_follower import ReleaseFollower

    engine = Engine(plain, endpoint.config.serve)
    app = build_app(endpoint.config, engine, ReleaseFollower(endpoint.store, plain, engine.swap, poll_seconds=3600))
    with TestClient(app) as http:
        response = http.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 400
    assert "/v1/completions" in response.json()["error"]["message"]


def test_a_full_queue_is_a_429_with_retry_after(start: Callable[..., Endpoint], gate: Gate) -> None:
    endpoint = start(max_queued_requests=1, max_batch_requests=1)
    with ThreadPoolExecutor() as pool:
        running = pool.submit(complete, endpoint)
        assert gate.reached.wait(30)
        waiting = pool.submit(complete, endpoint)
        while not endpoint.engine._waiting:
            time.sleep(0.01)
        with pytest.raises(openai.RateLimitError) as caught:
            client(endpoint).completions.create(**TEXT)  # type: ignore[call-overload]
        gate.open()
        assert {running.result().status_code, waiting.result().status_code} == {200}
    assert caught.value.code == "queue_full"
    assert caught.value.response.headers["retry-after"] == "1"


def test_a_failed_batch_is_a_500_and_the_next_one_is_answered(endpoint: Endpoint, gate: Gate) -> None:
    gate.failures.append(RuntimeError("secret detail"))
    gate.open()
    response = endpoint.client.post("/v1/completions", json=TEXT)
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text
    assert complete(endpoint).status_code == 200


def test_a_failure_half_way_through_a_stream_is_an_error_for_the_client(endpoint: Endpoint, gate: Gate) -> None:
    gate.open()
    complete(endpoint)
    held = endpoint.base.model.register_forward_hook(lambda *_: gate.opened.clear())  # one forward, and no further
    stream = client(endpoint).completions.create(**TEXT, stream=True)  # type: ignore[call-overload]
    gate.failures.append(RuntimeError("boom"))
    held.remove()
    gate.open()
    with pytest.raises(openai.APIError, match="failed on this batch"):
        list(stream)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_is_unwell(endpoint: Endpoint, gate: Gate) -> None:
    gate.failures.append(SystemExit())
    gate.open()
    endpoint.client.post("/v1/completions", json=TEXT)
    while endpoint.engine.alive:
        time.sleep(0.01)
    assert endpoint.client.get("/healthz").status_code == 503
    response = endpoint.client.post("/v1/completions", json=TEXT)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
