"""A request outlives the replica that began it: ASGI middleware for the process that holds the client's connection.

That process is Serve's proxy. Serve itself repeats a request only until a replica has taken it; when that replica dies
later, the client gets a bare 500, or a stream that breaks. Here what only asks is asked again of a replica that lives.
A stream goes on behind what the client has got: the second replica answers with the release that began it, under the
same seed and id, and what was sent is compared and left out. Where it differs, the client gets an error, never a mix.

The proxy loads this file and no model: no torch and no Ray in here.
"""

import json
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ID_HEADER = "x-wiseline-id"  # "<seconds>-<hex>", the same for all tries of a request
RESUME_HEADER = "x-wiseline-resume"  # the release that began the answer
RELEASE_HEADER = "x-wiseline-release"
OURS = (ID_HEADER.encode(), RESUME_HEADER.encode())

ASKING = ("/v1/chat/completions", "/v1/completions", "/v1/explain")
TRIES = 3  # a request that itself kills replicas must not kill all of them
RETRY_AFTER = 5  # seconds; a new replica needs about as long
LAST_EVENT = b"data: [DONE]\n\n"


def in_serves_proxy() -> list[Middleware]:
    """What the environment variable RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names."""
    return [Middleware(CarryOn)]


class CarryOn:
    """Inert while no replica dies, but for the id that it gives each request."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asking = scope["method"] == "POST" and scope["path"] in ASKING
        harmless = asking or scope["method"] in ("GET", "HEAD")
        request, answer = _Request(receive), _Answer(send, may_resume=asking)
        headers = [(name, value) for name, value in scope["headers"] if name not in OURS]
        headers.append((ID_HEADER.encode(), f"{int(time.time())}-{uuid.uuid4().hex}".encode()))
        for _ in range(TRIES if harmless else 1):
            answer.begin_again()
            await self._app({**scope, "headers": headers + answer.resuming()}, request.from_its_start(), answer.take)
            if answer.finished:
                await answer.end()
                return
            if request.gone:
                return
            if answer.begun and not answer.may_resume:
                return  # a page that broke off: the server closes the connection
        await answer.give_up(scope, receive, harmless=harmless)


class _Request:
    """Remembers what it has read of the client, so that it can be read again."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._heard: list[Message] = []
        self.gone = False

    def from_its_start(self) -> Receive:
        place = 0

        async def next_message() -> Message:
            nonlocal place
            if place == len(self._heard):
                message = await self._receive()
                if message["type"] == "http.disconnect":
                    self.gone = True
                    return message
                self._heard.append(message)
            place += 1
            return self._heard[place - 1]

        return next_message


class _Answer:
    """What the client has got so far; further tries are joined to it."""

    def __init__(self, send: Send, *, may_resume: bool) -> None:
        self._send = send
        self.may_resume = may_resume
        self.begun, self.finished, self._ended = False, False, False
        self._start: Message | None = None  # held back until there is a body: until then all can begin anew
        self._release = b""
        self._said: defaultdict[int | None, list[Any]] = defaultdict(list)  # by the choice that an event belongs to
        self._place: Counter[int | None] = Counter()  # how much of it this try has repeated
        self._useless = False  # this try cannot be joined

    def begin_again(self) -> None:
        self._start, self._useless = None, False
        self._place.clear()

    def resuming(self) -> list[tuple[bytes, bytes]]:
        return [(RESUME_HEADER.encode(), self._release)] if self.begun else []

    async def take(self, message: Message) -> None:
        """What a replica sends."""
        if message["type"] == "http.response.start":
            self._start = message
            joinable = message["status"] == 200 and _header(message, RELEASE_HEADER) == self._release
            self._useless = self.begun and not joinable
        elif not self._useless and message["type"] == "http.response.body":
            await self._take_body(message)

    async def _take_body(self, message: Message) -> None:
        assert self._start is not None
        if not self.begun:
            await self._send(self._start)
            self.begun = True
            self._release = _header(self._start, RELEASE_HEADER)
            self.may_resume &= _header(self._start, "content-type").startswith(b"text/event-stream")
        body = message.get("body", b"")
        if self.may_resume:
            body = b"".join(event + b"\n\n" for event in body.split(b"\n\n") if event and self._is_new(event))
        self._ended = not self._useless and not message.get("more_body", False)
        # Behind the last event comes nothing that a client needs, so that no other replica is asked for it.
        self.finished |= self._ended or (self.may_resume and body.endswith(LAST_EVENT))
        if body or self._ended:
            await self._send({**message, "body": body})

    async def end(self) -> None:
        """Where the replica died before it could."""
        if not self._ended:
            await self._send({"type": "http.response.body"})

    def _is_new(self, event: bytes) -> bool:
        """Whether the client has not got this event from an earlier try."""
        choice, content = _content(event)
        said, place = self._said[choice], self._place[choice]
        self._place[choice] += 1
        if place == len(said):
            said.append(content)
            return not self._useless
        self._useless |= said[place] != content
        return False

    async def give_up(self, scope: Scope, receive: Receive, *, harmless: bool) -> None:
        """Tells the client, in OpenAI's shape: as a response, or as the last event of a stream."""
        what = "it is safe to ask again" if harmless else "look whether it was done before you send it again"
        message = f"The replica that had this request died; {what}."
        error = {"error": {"message": message, "type": "server_error", "param": None, "code": "replica_died"}}
        if self.begun:
            event = f"data: {json.dumps(error)}\n\n".encode()
            await self._send({"type": "http.response.body", "body": event})
        else:
            response = JSONResponse(error, status_code=503, headers={"retry-after": str(RETRY_AFTER)})
            await response(scope, receive, self._send)


def _content(event: bytes) -> tuple[int | None, Any]:
    """Which choice an event of a stream belongs to, and what it says of it, and by which base model; log-probabilities
    may differ in their last digits."""
    data = event.removeprefix(b"data: ")
    chunk = json.loads(data) if data.startswith(b"{") else {}
    choices: Sequence[dict[str, Any]] = chunk.get("choices", ())
    if not choices:
        return None, data
    said = {name: value for name, value in choices[0].items() if name != "logprobs"}
    return choices[0]["index"], (chunk.get("system_fingerprint"), said)


def _header(message: Message, name: str) -> bytes:
    return next((value for key, value in message["headers"] if key.lower() == name.encode()), b"")
