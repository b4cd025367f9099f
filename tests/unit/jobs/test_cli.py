"""The command line as a user meets it: mostly in process through `main`, where it matters as a process of its own."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jobs import cli
from pipeline.config import load_config
from pipeline.edits import Edit
from pipeline.models.base_model import BaseModel, load_base_model
from pipeline.models.generate import GenerationRequest, generate
from pipeline.models.loaded_release import load_release
from pipeline.serving.keys import KeyRing
from pipeline.storage.batches import Batch, Rejection
from pipeline.storage.edit_log import EditLog
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.releases import head, read_release
from tests.tiny_world import publish_release, save_model

ROOT = Path(__file__).parents[3]
EDITED = "The capital of France is"
COMMANDS = ["ingest", "retract", "compact", "round", "evaluate", "capability", "serve", "ask", "export"]
COMMANDS += ["status", "schedule", "submit", "releases", "keys"]


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out.splitlines()[-1])


Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path, model_folder: Path) -> Run:
    """`wiseline` with these arguments, in an empty folder whose config names the tiny model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "60")
    (tmp_path / "ray_config.yaml").write_text(f"model:\n  path: {model_folder}\nserve:\n  port: {free_port()}\n")

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["wiseline", *arguments])
        code: object = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
        out, err = capfd.readouterr()
        assert isinstance(code, int)
        assert "Traceback" not in out + err
        return Result(code, out, err)

    return run


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def base(model_folder: Path) -> BaseModel:
    return load_base_model(load_config(overrides=[f"model.path={model_folder}"]).model)


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return ObjectStore(str(tmp_path / ".wiseline/store"))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def process(*arguments: str, **options: Any) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "60"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell's background jobs ignore SIGINT, and so would their children: a test run in the background must not.
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([sys.executable, *arguments], env=environment, **pipes, **options)


def test_help_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'ray', 'transformers', 'deltalake', 'fastapi', 's3fs'}"
    ended = process("-c", f"import sys, jobs.cli; print(sorted({heavy} & set(sys.modules)))")
    out, err = ended.communicate(timeout=60)
    assert (out.strip(), err) == ("[]", "")


@pytest.mark.parametrize(
    "command", [[], *([name] for name in COMMANDS), *(["releases", n] for n in ("list", "show")), ["keys", "create"]]
)
def test_help_fits_sixty_columns(run: Run, command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.code == 0
    assert max(len(line) for line in result.out.splitlines()) <= 60
    if not command:
        assert all(re.search(rf"\b{name}\b", result.out) for name in COMMANDS)


def test_version(run: Run) -> None:
    result = run("--version")
    assert result.code == 0
    assert result.out.startswith("wiseline ")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["status", "--config", "nowhere.yaml"], "There is no config file at nowhere.yaml"),
        (["status", "--set", "serve.prot=1"], "did you mean port?"),
        (["status", "--set", "port=1"], "does not read as section.key=value"),
        (["capability"], "give --text FILE, --task NAME, or both"),
        (["capability", "--text", "nowhere.txt"], "nowhere.txt cannot be read as text"),
        (["capability", "--task", "ray_config.yaml"], "no task of lm-evaluation-harness"),
        (["capability", "--task", "hellaswag"], "Nothing is published in"),
        (["ask", "Who?"], "start one with `wiseline serve`"),
        (["ask", "Who?", "--url", "localhost:1"], "begins with http:// or https://"),
        (["ask", "", "--offline"], "The prompt is empty."),
        (["ask", "long " * 300, "--offline"], "has no room for an answer"),
        (["ask", "Who?", "--offline", "--set", "model.path=nowhere"], "neither a folder here nor a hub model"),
        (["export", "--to", "out"], "Nothing is published in"),
        (["export", "--to", "out", "--release", "3"], "nothing is published yet"),
        (["releases", "show", "3"], "nothing is published yet"),
        (["releases", "rollback", "3"], "nothing is published yet"),
        (["round", "--step", "polish"], "--step 'polish' is unknown; it is one of plan, train"),
        (["round", "--shard", "1"], "--step is missing"),
        (["round", "--step", "merge"], "needs --round, the id that `wiseline round --step plan` printed"),
        (["round", "--step", "plan", "--round", "0abc"], "takes no --round"),
        (["round", "--step", "merge", "--round", "0abc", "--shard", "1"], "--shard goes with --step train alone"),
        (["submit", "round", "--set", "serve.prot=1"], "did you mean port?"),
        (["submit", "--working-dir", "nowhere", "round"], "no folder nowhere to send along"),
        (["submit", "--address", "ray://127.0.0.1:10001", "round"], "it begins with http://"),
        (["submit", "--address", "http://127.0.0.1:1", "round"], "No job server of Ray answers at http://127.0.0.1:1"),
        (["keys", "create", "me"], "No file for keys is named"),
        (["keys", "create", "me", "--scope", "root", "--set", "serve.keys_file=k"], "scopes are infer, edit, admin"),
        (["keys", "list", "--set", "serve.keys_file=k"], "`wiseline keys create` makes it"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_1(run: Run, arguments: list[str], sentence: str) -> None:
    result = run(*arguments)
    assert result.code == 1
    assert sentence in result.err
    assert result.err.startswith("wiseline: ")
    assert result.err.count("\n") == 1
    assert result.out == ""
    again = run(*arguments, "--json")
    assert again.code == 1
    assert sentence in again.json["error"]


@pytest.mark.parametrize(
    "arguments", [["asc"], ["ask"], ["ask", "x", "--nope"], ["releases", "show", "zero"], ["submit", "round", "--nope"]]
)
def test_wrong_usage_is_exit_code_2(run: Run, arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.code == 2
    assert "Usage" in result.err


def test_an_interrupt_is_quiet() -> None:
    """An endpoint that accepts and never answers: Ctrl-C is the way out."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        waiting = process("-m", "jobs.cli", "ask", "Who?", "--url", url, cwd=ROOT)
        silent.settimeout(60)
        connection, _ = silent.accept()
        with connection:
            waiting.send_signal(signal.SIGINT)
            out, err = waiting.communicate(timeout=60)
    assert (waiting.returncode, out, err) == (130, "", "")


@pytest.mark.parametrize("reply", [b"", b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"])
def test_something_else_at_the_address_is_one_sentence(run: Run, reply: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:

        def reply_once() -> None:
            connection, _ = other.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(reply)

        port = other.getsockname()[1]
        for command in (
            ["ask", "Who?", "--url", f"http://127.0.0.1:{port}"],
            ["status", "--set", f"serve.port={port}"],
        ):
            thread = threading.Thread(target=reply_once)
            thread.start()
            result = run(*command)
            thread.join()
            assert (result.code, result.err.count("\n")) == ((1, 1) if command[0] == "ask" else (0, 0))
            assert command[0] == "ask" or "does not answer" in result.out


def test_a_cluster_that_wants_its_token_says_so(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as cluster:

        def refuse() -> None:
            connection, _ = cluster.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n")

        thread = threading.Thread(target=refuse)
        thread.start()
        refused = run("submit", "--address", f"http://127.0.0.1:{cluster.getsockname()[1]}", "round")
        thread.join()
    assert (refused.code, refused.err.count("\n")) == (1, 1)
    assert "RAY_AUTH_TOKEN" in refused.err


def test_releases_of_an_empty_store(run: Run) -> None:
    result = run("releases", "list", "--json")
    assert result.code == 0
    assert "Nothing is published" in result.out
    assert result.json == {"releases": []}


def test_releases_are_listed_shown_and_rolled_back(run: Run, store: ObjectStore, base: BaseModel) -> None:
    for seed in (1, 2):
        publish_release(store, base, prompts=[EDITED], seed=seed)
    listed = run("releases", "list", "--json")
    assert [release["number"] for release in listed.json["releases"]] == [2, 1]
    assert listed.json["releases"][0]["published"]
    assert max(len(line) for line in listed.out.splitlines()[:-1]) <= 60
    assert re.search(r"^ *2 .*1 +1\.000 +head$", listed.out, re.MULTILINE)

    shown = run("releases", "show", "1", "--json")
    assert shown.json["number"] == 1
    assert "generalization" in shown.out
    assert base.fingerprint in shown.out

    rolled = run("releases", "rollback", "1", "--json")
    assert (rolled.json["number"], rolled.json["restores"]) == (3, 1)
    newest = head(store)
    assert newest is not None
    assert (newest.number, newest.restores) == (3, 1)
    assert newest.memories == read_release(store, 1).memories
    assert "head, restores 1" in run("releases", "list").out


def test_without_keys_the_door_is_not_opened_to_other_machines(run: Run) -> None:
    refused = run("serve", "--set", "serve.host=0.0.0.0")
    assert (refused.code, refused.err.count("\n")) == (1, 1)
    assert "wiseline keys create" in refused.err


def test_a_key_is_shown_once_listed_without_itself_and_revoked(run: Run, tmp_path: Path) -> None:
    file = ["--set", "serve.keys_file=keys.json"]
    made = run(
        "keys", "create", "newsroom", "--scope", "edit", "--scope", "infer", "--per-minute", "60", "--json", *file
    )
    assert (made.code, made.json["scopes"], made.json["per_minute"]) == (0, ["infer", "edit"], 60)
    ring = KeyRing(tmp_path / "keys.json")
    assert ring.find(made.json["key"]) is not None
    listed = run("keys", "list", "--json", *file)
    assert [key["name"] for key in listed.json["keys"]] == ["newsroom"]
    assert made.json["key"] not in listed.out and "sha256" not in listed.out
    assert run("keys", "revoke", made.json["id"], *file).code == 0
    assert ring.find(made.json["key"]) is None
    gone = run("keys", "revoke", made.json["id"], *file)
    assert (gone.code, gone.err.count("\n")) == (1, 1)


def test_status_before_and_after(run: Run, store: ObjectStore, base: BaseModel) -> None:
    empty = run("status", "--json")
    assert empty.code == 0
    assert (empty.json["log_version"], empty.json["live_edits"], empty.json["head"]) == (None, 0, None)
    assert "wiseline ingest" in empty.out

    edits = (Edit(prompt=EDITED, target="Lyon"), Edit(prompt="Who leads it?", target="Ada"))
    rejections = (Rejection(row=3, reason="the target is empty", raw="{}"),)
    EditLog(store).append(Batch(source="edits.jsonl", edits=tuple(enumerate(edits, start=1)), rejections=rejections))
    ingested = run("status", "--json")
    assert (ingested.json["live_edits"], ingested.json["quarantined"]) == (2, 1)
    assert "wiseline round" in ingested.out

    release = publish_release(store, base, prompts=[EDITED], seed=1)
    after = run("status", "--json")
    assert after.json["head"] == release.model_dump(mode="json")
    assert "does not answer" in after.out
    assert after.json["endpoint"]["reachable"] is False
    assert max(len(line) for line in after.out.splitlines()[:-1]) <= 60


def test_status_knows_what_waits_when_a_live_release_came_later(run: Run, store: ObjectStore, base: BaseModel) -> None:
    """A live release names the newest version of the log, and yet files wait for a round."""
    (edit,) = edits = (Edit(prompt=EDITED, target="Lyon"),)
    EditLog(store).append(Batch(source="edits.jsonl", edits=tuple(enumerate(edits))))
    publish_release(store, base, prompts=["Who?"], seed=1, failed=["posted"])
    waits = run("status", "--json")
    assert (waits.json["waiting"], waits.json["to_do"]) == (1, "wiseline round")
    publish_release(store, base, prompts=[EDITED], seed=1, failed=["posted"], edit_ids=[edit.edit_id])
    assert run("status", "--json").json["to_do"] == "nothing"
    refused = run("status", "--watch")
    assert (refused.code, refused.err.count("\n")) == (1, 1)
    assert "needs a terminal" in refused.err


def test_ask_offline_answers_as_the_release_does(run: Run, store: ObjectStore, base: BaseModel) -> None:
    request = GenerationRequest(
        prompt_ids=tuple(base.tokenizer(EDITED)["input_ids"]), text=EDITED, max_new_tokens=12, temperature=0.0
    )
    arguments = ["ask", EDITED, "--offline", "--json", "--set", "serve.max_new_tokens=12"]
    before = run(*arguments)
    assert before.json["answer"] == generate(base, None, [request])[0][0]
    assert (before.json["release"], before.json["route"]) == (0, "main")

    release = publish_release(store, base, prompts=[EDITED], seed=1)
    after = run(*arguments, "--explain")
    assert after.json["answer"] == generate(base, load_release(store, release, base), [request])[0][0]
    assert after.json["answer"] != before.json["answer"]
    assert (after.json["release"], after.json["route"]) == (1, "memory-0")
    assert after.json["why"]["nearest_edit"]["prompt"] == EDITED
    assert "release 1, memory-0" in after.err
    assert f"{EDITED} → new" in after.err


@pytest.mark.parametrize("format", ["hf", "lora", "safetensors"])
def test_a_release_is_exported(run: Run, store: ObjectStore, base: BaseModel, tmp_path: Path, format: str) -> None:
    publish_release(store, base, prompts=[EDITED], seed=1)
    arguments = ["export", "--format", format, "--to", "out", "--json"]
    missing = run(*arguments, "--set", "model.path=nowhere")
    assert (missing.code, missing.err.count("\n")) == (1, 1)
    assert "neither a folder here nor a hub model" in missing.json["error"]
    assert not (tmp_path / "out").exists()
    result = run(*arguments)
    assert result.code == 0
    assert (result.json["release"], result.json["format"]) == (1, format)
    assert result.json["files"] == sum(path.is_file() for path in (tmp_path / "out").rglob("*"))
    assert (tmp_path / "out" / "README.md").exists()
    assert ("memory-0: rank" in result.out, "not routed" in result.out) == ((format == "lora"),) * 2
    again = run(*arguments)
    assert (again.code, again.err.count("\n")) == (1, 1)
    assert "is not empty" in again.json["error"]


def test_ask_offline_in_chat(run: Run) -> None:
    result = run("ask", "Who leads?", "--chat", "--offline", "--json", "--set", "serve.max_new_tokens=4")
    assert result.code == 0
    assert result.json["finish_reason"] in ("stop", "length")


def test_an_edit_is_taken_back_by_its_prompt_and_subject(run: Run, store: ObjectStore) -> None:
    edit = Edit(prompt="Who leads Acme?", target="Ada", subject="Acme")
    EditLog(store).append(Batch(source="file", edits=((1, edit),)))
    missing = run("retract", "Who leads Acme?")
    assert (missing.code, missing.err.count("\n")) == (1, 1)
    assert "--subject" in missing.err
    done = run("retract", "who leads  ACME?", "--subject", "acme", "--json")
    assert done.code == 0
    assert json.loads(done.out.splitlines()[-1]) == {"retracted": [edit.edit_id]}
    assert EditLog(store).live() == []


def test_the_log_is_compacted_and_says_the_same(run: Run, store: ObjectStore) -> None:
    for number in range(3):
        edit = Edit(prompt=f"Who leads {number}?", target="Ada")
        EditLog(store).append(Batch(source=str(number), edits=((1, edit),)))
    before = EditLog(store).history()
    result = run("compact", "--json")
    assert (result.code, result.json) == (0, {"removed": 0})  # what the last days need is kept
    assert EditLog(store).history() == before


def test_what_nobody_foresaw_is_one_sentence_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def burst(*_: object) -> None:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr("pipeline.storage.object_store.open_store", burst)
    result = run("status", "--json")
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert "ZeroDivisionError: by nothing" in json.loads(result.out.splitlines()[-1])["error"]


def test_a_head_that_cannot_be_read_can_be_rolled_back(run: Run, store: ObjectStore, base: BaseModel) -> None:
    for seed in (1, 2):
        publish_release(store, base, prompts=["Who?"], seed=seed)
    Path(store.uri, "releases/00000002.json").write_text("{")
    assert run("releases", "rollback", "1").code == 0
    restored = read_release(store, 3)
    assert (restored.restores, restored.parent) == (1, 2)


def test_capability_on_ordinary_text(run: Run, store: ObjectStore, base: BaseModel, tmp_path: Path) -> None:
    """The release answers its own prompt, so that alone can change."""
    publish_release(store, base, prompts=[EDITED], seed=1)
    half = "The capital of France is"  # a text's first half is what it is routed on
    (tmp_path / "texts.txt").write_text(f"{half} {half[::-1]}\n\nA red house stands here and waits for rain\n")
    result = run("capability", "--text", "texts.txt", "--json")
    text = result.json["text"]
    assert (result.json["release"], text["texts"]) == (1, 2)
    assert text["changed_share"] == text["changed"] / text["tokens"]
    assert "tasks" not in result.json
    assert f"{text['changed']} of {text['tokens']} tokens changed" in result.out


def test_capability_on_a_task_from_a_file(run: Run, store: ObjectStore, base: BaseModel, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    publish_release(store, base, prompts=[EDITED], seed=1)
    (tmp_path / "capitals.json").write_text(json.dumps({"question": EDITED, "choices": ["Paris", "Oslo"], "answer": 0}))
    (tmp_path / "capitals.yaml").write_text(
        f"""
        task: capitals
        dataset_path: json
        dataset_kwargs: {{data_files: {{test: {tmp_path}/capitals.json}}, cache_dir: {tmp_path}/cache}}
        test_split: test
        output_type: multiple_choice
        doc_to_text: "{{{{question}}}}"
        doc_to_choice: choices
        doc_to_target: answer
        metric_list: [{{metric: acc}}]
        """
    )
    tasks = run("capability", "--task", "capitals.yaml", "--json").json["tasks"]
    assert (tasks["sequences"], tasks["routed"]) == (2, 2)
    assert set(tasks["unedited"]["capitals"]) == set(tasks["edited"]["capitals"]) == {"acc"}
