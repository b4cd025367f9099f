"""The endpoint on Ray Serve: what a client sees across releases, damage, load and hanging up."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import ray

from jobs.serve import running_endpoint
from pipeline.config import load_config
from pipeline.models.base_model import BaseModel, load_base_model
from pipeline.models.generate import GenerationRequest, generate
from pipeline.models.loaded_release import load_release
from pipeline.serving.deployment import APP_NAME
from pipeline.storage.object_store import ObjectStore, open_store
from pipeline.storage.releases import list_releases
from tests.ports import free_ports
from tests.ray.processes import pids_of
from tests.tiny_world import publish_release, save_model

ROOT = Path(__file__).parents[2]
EDITED, OTHER = "The capital of France is", "Who leads the company?"
SHORT, LONG = 10, 3000


@dataclass
class Served:
    url: str
    store: ObjectStore
    base: BaseModel
    client: openai.OpenAI
    spans: Path

    def ask(self, prompt: str, **fields: Any) -> Any:
        return self.client.completions.create(**{"model": "wiseline", "prompt": prompt, "max_tokens": SHORT} | fields)

    def health(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/healthz", timeout=10) as response:
            body: dict[str, Any] = json.load(response)
            return body

    def wait_for(self, release: int) -> None:
        while self.health()["release"] != release:
            time.sleep(0.05)


@pytest.fixture(scope="module")
def served(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("serve")
    save_model(folder / "model", context_tokens=4096)
    settings = {
        "model.path": folder / "model",
        "store.uri": folder / "store",
        "serve.port": free_ports(1)[0],
        "serve.poll_seconds": 0.1,
        "serve.live_edits": "false",
        "serve.max_batch_requests": 2,
        "serve.max_queued_requests": 2,
        "serve.max_new_tokens": LONG,
        "observe.logs": "json",
        "observe.traces": folder / "spans.jsonl",
    }
    config = load_config(overrides=[f"{key}={value}" for key, value in settings.items()])
    with running_endpoint(config) as url:
        client = openai.OpenAI(api_key="none", base_url=f"{url}/v1", max_retries=0)
        yield Served(url, open_store(config.store), load_base_model(config.model), client, folder / "spans.jsonl")


def right_answers(served: Served, prompt: str) -> dict[int, str]:
    """What every release says, and the base model as 0."""
    request = GenerationRequest(
        prompt_ids=tuple(served.base.tokenizer(prompt)["input_ids"]), text=prompt, max_new_tokens=SHORT
    )
    loaded = {
        release.number: load_release(served.store, release, served.base) for release in list_releases(served.store)
    }
    return {number: generate(served.base, loaded.get(number), [request])[0][0] for number in (0, *loaded)}


def test_releases_are_swapped_under_load_without_a_failed_or_mixed_answer(served: Served) -> None:
    first = served.health()["release"]
    answers: list[tuple[int, str]] = []

    def ask_until(release: int) -> None:
        while not answers or answers[-1][0] != release:
            answer = served.ask(EDITED)
            answers.append((answer.wiseline["release"], answer.choices[0].text.strip()))

    ask_until(first)
    for release in (first + 1, first + 2):
        with ThreadPoolExecutor() as pool:
            asking = [pool.submit(ask_until, release) for _ in range(2)]
            publish_release(served.store, served.base, prompts=[EDITED], seed=release)
            for one in asking:
                one.result(timeout=60)
    right = right_answers(served, EDITED)
    assert len(set(right.values())) == len(right)
    assert {number for number, _ in answers} == {first, first + 1, first + 2}
    assert all(text == right[number] for number, text in answers)
    assert served.ask(OTHER).choices[0].text.strip() == right_answers(served, OTHER)[0]


def test_logs_and_spans_name_the_request(served: Served) -> None:
    raw = served.client.completions.with_raw_response
    named = raw.create(
        model="wiseline", prompt=OTHER, max_tokens=5, extra_headers={"x-request-id": "mine", "traceparent": PARENT}
    )
    assert named.headers["x-request-id"] == "mine"
    drawn = raw.create(model="wiseline", prompt=OTHER, max_tokens=5).headers["x-request-id"]
    stream = served.ask(OTHER, max_tokens=5, stream=True, extra_headers={"x-request-id": "streamed"})
    assert list(stream)
    for name in ("mine", drawn, "streamed"):
        [line] = soon(lambda of=name: [one for one in replica_log() if one.get("request_id") == of and "tokens" in one])
        assert (line["tokens"], line["release"], line["levelname"]) == (5, served.health()["release"], "INFO")
        assert line["answered_by"] == "main" and line["seconds"] > 0

    def spans() -> list[dict[str, Any]]:
        return [json.loads(line) for line in served.spans.read_text().splitlines() if line.endswith("}")]

    [request] = soon(lambda: [one for one in spans() if one["attributes"].get("request_id") == "mine"])
    assert request["parent_id"].removeprefix("0x") in PARENT
    [generation] = soon(lambda: [one for one in spans() if one["parent_id"] == request["context"]["span_id"]])
    assert (generation["name"], generation["attributes"]["tokens"]) == ("generation", 5)


def soon(look: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What there is to see. Lines and spans are written when an answer has ended, and the client may be quicker."""
    until = time.monotonic() + 30
    while not (seen := look()) and time.monotonic() < until:
        time.sleep(0.05)
    return seen


PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def replica_log() -> list[dict[str, Any]]:
    folder = Path(ray._private.worker.global_worker.node.get_logs_dir_path(), "serve")
    lines = [line for file in folder.glob(f"replica_{APP_NAME}_*.log") for line in file.read_text().splitlines()]
    # Not what is being written, nor what endpoints of other tests wrote as text.
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


class DamagingStore(ObjectStore):
    """Cuts side memories. The manifest is written last, so nobody can follow before the damage is done."""

    def put(self, path: str, data: bytes) -> str:
        checksum = super().put(path, data)
        if path.endswith("memory.parquet"):
            file = Path(self.uri) / path
            file.chmod(0o644)
            file.write_bytes(data[:-1])
        return checksum


def test_a_damaged_release_keeps_the_old_one(served: Served) -> None:
    good = publish_release(served.store, served.base, prompts=[EDITED], seed=100).number
    served.wait_for(good)
    text = served.ask(EDITED).choices[0].text
    publish_release(DamagingStore(served.store.uri), served.base, prompts=[EDITED], seed=101)
    while served.health()["follower"]["error"] is None:
        time.sleep(0.05)
    health = served.health()
    assert health["release"] == good
    assert f"Release {good + 1} is not used" in health["follower"]["error"]
    answer = served.ask(EDITED)
    assert (answer.choices[0].text, answer.wiseline["release"]) == (text, good)
    publish_release(served.store, served.base, prompts=[EDITED], seed=102)
    served.wait_for(good + 2)
    assert served.health()["follower"]["error"] is None


def test_the_openai_client_works_streamed_or_not(served: Served) -> None:
    [model] = served.client.models.list().data
    assert model.id == "wiseline"
    messages: Any = [{"role": "user", "content": "Who leads?"}]
    whole = served.client.chat.completions.create(model=model.id, messages=messages, max_tokens=30)
    chunks = list(served.client.chat.completions.create(model=model.id, messages=messages, max_tokens=30, stream=True))
    assert whole.choices[0].message.content
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    text = served.ask(EDITED, max_tokens=30)
    streamed = list(served.ask(EDITED, max_tokens=30, stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == text.choices[0].text
    raw = served.client.completions.with_raw_response.create(model="wiseline", prompt=EDITED, max_tokens=1)
    assert raw.headers["x-wiseline-release"] == str(raw.parse().wiseline["release"])  # type: ignore[attr-defined]
    assert raw.headers["x-wiseline-route"] == raw.parse().wiseline["route"]  # type: ignore[attr-defined]


def test_errors_come_through_the_proxy_in_openais_shape(served: Served) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        served.ask("x", model="gpt-4")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        served.ask("x", presence_penalty=2)
    assert "presence_penalty = 2" in refused.value.message
    with pytest.raises(openai.APIStatusError) as large:
        served.ask("x" * 5_000_000)
    assert large.value.status_code == 413
    assert served.ask("x").choices


def test_load_beyond_the_queue_is_a_429_and_never_a_lost_answer(served: Served) -> None:
    def ask(_: int) -> tuple[int, str | None]:
        raw = served.client.completions.with_raw_response
        try:
            return raw.create(model="wiseline", prompt=OTHER, max_tokens=300).status_code, None
        except openai.RateLimitError as error:
            return error.status_code, error.response.headers["retry-after"]

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(12)))
    assert set(answers) == {(200, None), (429, "1")}
    assert answers.count((200, None)) >= 2


@pytest.mark.parametrize("stream", [True, False])
def test_hanging_up_stops_the_model(served: Served, stream: bool) -> None:
    """Two abandoned answers fill the batch; were they written to their end, the next request would wait that long."""
    start = time.monotonic()
    assert served.ask(OTHER, max_tokens=LONG).usage.completion_tokens == LONG
    whole = time.monotonic() - start
    for _ in range(2):
        hang_up(served, {"model": "wiseline", "prompt": OTHER, "max_tokens": LONG, "stream": stream})
    start = time.monotonic()
    served.ask("x", max_tokens=1)
    assert time.monotonic() - start < whole / 2


def hang_up(served: Served, body: dict[str, Any]) -> None:
    """Send a request and close the connection while it is being answered."""
    host, port = served.url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
        if body["stream"]:
            assert connection.recv(20).startswith(b"HTTP/1.1 200")
        else:
            time.sleep(0.1)


@pytest.mark.timeout(300)
def test_answers_survive_the_replica_that_began_them(served: Served) -> None:
    """The only replica dies in the middle of two answers; its successor ends them, by then under another release."""
    begun = publish_release(served.store, served.base, prompts=[EDITED], seed=200).number
    served.wait_for(begun)
    whole = served.ask(EDITED, max_tokens=LONG)
    [replica] = pids_of(f"ray::ServeReplica:{APP_NAME}:{APP_NAME}")
    stream = served.ask(EDITED, max_tokens=LONG, stream=True)
    pieces = [next(stream) for _ in range(5)]
    with ThreadPoolExecutor() as pool:
        unstreamed = pool.submit(served.ask, EDITED, max_tokens=LONG)
        pieces += [next(stream) for _ in range(50)]  # the other has begun, and neither is at its end
        os.kill(replica, signal.SIGSTOP)
        publish_release(served.store, served.base, prompts=[EDITED], seed=201)
        os.kill(replica, signal.SIGKILL)
        pieces += list(stream)
        again = unstreamed.result()
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert {piece.wiseline["release"] for piece in pieces} == {begun}
    assert again.wiseline["release"] in (begun, begun + 1)
    assert (again.choices[0].text == whole.choices[0].text) == (again.wiseline["release"] == begun)
    assert pids_of(f"ray::ServeReplica:{APP_NAME}:{APP_NAME}") != [replica]


def test_a_port_that_is_taken_is_a_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused = wiseline(tmp_path, "serve", "--set", f"serve.port={taken.getsockname()[1]}", "--json")
        out, err = refused.communicate(timeout=120)
    assert refused.returncode == 1
    assert "cannot be used" in json.loads(out.splitlines()[-1])["error"]
    assert err.count("\n") == 1


FIRST_IS_LATE = """
import pathlib, time
from pipeline.serving import carry_on

def in_serves_proxy():
    try:
        pathlib.Path(__file__).with_name("first").touch(exist_ok=False)
        time.sleep(600)
    except FileExistsError:
        return carry_on.in_serves_proxy()
"""


@pytest.mark.timeout(600)
def test_the_command_serves_until_it_is_told_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Serve gives the first proxy up. Told to stop, it ends answers that have begun and refuses new ones."""
    (tmp_path / "late_proxy.py").write_text(FIRST_IS_LATE)
    monkeypatch.setenv("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "late_proxy.in_serves_proxy")
    save_model(tmp_path / "model", context_tokens=4096)
    file = ["--set", f"serve.keys_file={tmp_path / 'keys.json'}"]
    drain = ["--set", "serve.drain_seconds=300", "--set", "serve.next_token_seconds=300"]
    made, _ = wiseline(tmp_path, "keys", "create", "me", "--json", *file).communicate(timeout=60)
    key = json.loads(made.splitlines()[-1])["key"]
    serving = wiseline(
        tmp_path, "serve", "--set", "serve.port=0", "--set", f"serve.max_new_tokens={LONG}", *drain, "--json", *file
    )
    assert serving.stdout is not None
    lines = iter(serving.stdout.readline, "")
    url = next(json.loads(line)["url"] for line in lines if line.startswith("{"))
    assert (tmp_path / "first").exists()
    fields: dict[str, Any] = {"model": "wiseline", "prompt": OTHER, "max_tokens": LONG}
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(api_key="wl-wrong", base_url=f"{url}/v1").completions.create(**fields)
    monkeypatch.setenv("WISELINE_API_KEY", key)
    asked, _ = wiseline(tmp_path, "ask", "Who leads?", "--url", url, "--json", "--explain").communicate(timeout=60)
    assert json.loads(asked.splitlines()[-1])["release"] == 0
    client = openai.OpenAI(api_key=key, base_url=f"{url}/v1", max_retries=0)
    stream = client.completions.create(**fields, stream=True)
    pieces = [next(stream)]
    serving.send_signal(signal.SIGTERM)
    refused = None
    while refused is None:
        try:
            client.models.list()
        except openai.InternalServerError as error:
            refused = error
    assert (refused.status_code, refused.code) == (503, "stopping")
    pieces += list(stream)
    assert pieces[-1].choices[0].finish_reason == "length"
    out, err = serving.communicate(timeout=400)
    told = [line for line in err.splitlines() if not line.startswith("Ray did not start in time")]
    assert (serving.returncode, out, told) == (0, "", [])
    assert key not in made.replace(key, "", 2)
    assert not any(key in path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())


def wiseline(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "RAY_ADDRESS": ""}
    settings = ["--set", f"model.path={folder / 'model'}", "--set", f"store.uri={folder / 'store'}"]
    command = [sys.executable, "-m", "jobs.cli", *arguments, *settings]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, cwd=folder, **pipes)
