"""Stores that go silent, fail or lie: what happened must be told apart, and a creation is never sent twice."""

import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipeline.errors import OutcomeUnknown, StoreError, UnsafeStore
from pipeline.storage import s3_bucket
from pipeline.storage.object_store import ObjectStore

Answer = Callable[[BaseHTTPRequestHandler], object]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answer], tuple[ObjectStore, list[str]]]]:
    """A store on a server that answers as the test says, and the list of requests it saw."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    servers: list[ThreadingHTTPServer] = []
    over = threading.Event()

    def start(answer: Answer) -> tuple[ObjectStore, list[str]]:
        seen: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # answers Expect: 100-continue, as S3 does

            def handle_any(self) -> None:
                seen.append(f"{self.command} {self.path}")
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                answer(self)
                if answer is hang:
                    over.wait()

            do_PUT = do_GET = do_HEAD = do_DELETE = do_POST = handle_any

            def handle_expect_100(self) -> bool:
                if answer is mute:
                    seen.append(f"{self.command} {self.path}")
                    over.wait()
                    return False
                return super().handle_expect_100()

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return ObjectStore("s3://bucket/prefix", s3_endpoint_url=f"http://127.0.0.1:{server.server_port}"), seen

    yield start
    over.set()
    for server in servers:
        server.shutdown()
        server.server_close()


def say(status: int) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        request.send_header("Content-Length", "0")
        request.end_headers()

    return answer


def hang(request: BaseHTTPRequestHandler) -> None:
    """Reads the request and says nothing until the test is over."""


def mute(request: BaseHTTPRequestHandler) -> None:
    """Does not even say 100 Continue, so the body is never sent, until the test is over."""


def hang_up(request: BaseHTTPRequestHandler) -> None:
    request.close_connection = True
    request.connection.shutdown(socket.SHUT_RDWR)


ENDINGS = {"silent": hang, "mute": mute, "hung up": hang_up, "500": say(500), "503": say(503)}


@pytest.mark.parametrize("answer", ENDINGS.values(), ids=ENDINGS.keys())
def test_a_creation_without_an_answer_is_unknown_and_sent_once(
    serve: Callable[[Answer], tuple[ObjectStore, list[str]]], answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    if answer in (hang, mute):  # long enough for a busy machine to have sent the request; nothing comes after it
        monkeypatch.setattr(s3_bucket, "READ_TIMEOUT_SECONDS", 5)
    store, seen = serve(answer)
    with pytest.raises(OutcomeUnknown, match="may or may not"):
        store.create("releases/00000001.json", b"{}")
    assert [request.split()[0] for request in seen] == ["PUT"]


def test_a_refusal_is_not_unknown(serve: Callable[[Answer], tuple[ObjectStore, list[str]]]) -> None:
    store, _ = serve(say(403))
    with pytest.raises(StoreError, match="access was refused") as refused:
        store.create("a", b"")
    assert not isinstance(refused.value, OutcomeUnknown)


def test_a_store_that_overwrites_is_refused(serve: Callable[[Answer], tuple[ObjectStore, list[str]]]) -> None:
    store, seen = serve(say(200))
    with pytest.raises(UnsafeStore, match="If-None-Match"):
        store.probe()
    assert seen[-1].startswith("DELETE")


def test_a_store_that_cannot_be_reached_is_not_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    store = ObjectStore("s3://bucket/prefix", s3_endpoint_url="http://127.0.0.1:9")
    with pytest.raises(StoreError, match="cannot be reached") as unreachable:
        store.create("a", b"")
    assert not isinstance(unreachable.value, OutcomeUnknown)
