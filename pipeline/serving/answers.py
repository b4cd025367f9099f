"""From one request to one answer, whoever asks: the endpoint over HTTP, or `wiseline ask --offline` in process."""

import asyncio
import copy
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from pipeline.config import Config
from pipeline.logs import logger
from pipeline.models.generate import GenerationRequest
from pipeline.models.loaded_release import LoadedRelease
from pipeline.models.routed_ffn import Decision
from pipeline.serving.api_errors import ApiError
from pipeline.serving.engine import Engine, Job, Newest
from pipeline.serving.logprobs import Spelling
from pipeline.serving.openai_api import ChatRequest, CompletionRequest
from pipeline.serving.openai_responses import Bodies, Choice
from pipeline.serving.prompts import chat_prompt, generation_request, plain_prompt, seeded, seeded_apart
from pipeline.traces import past

log = logger(__name__)

MODEL_NAME = "wiseline"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What decides an answer beside its request. A second replica that is given the same goes on where the first one
    died (`carry_on.py`)."""

    number: str = field(default_factory=lambda: uuid.uuid4().hex)  # of the response; seeds whatever has no seed
    created: int = field(default_factory=lambda: int(time.time()))
    release: LoadedRelease | Newest | None = Newest.NEWEST


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer that has begun: who gives it is known, its text is still to come."""

    release: int  # 0: the base model, before there is any release
    routes: tuple[str, ...]  # "main" or "memory-<index>", one per prompt; its several answers have the same
    bodies: Bodies
    about: tuple[dict[str, Any], ...]
    job: Job
    patience: float  # seconds between two tokens

    async def complete(self) -> dict[str, Any]:
        """The whole body. Raises GenerationFailed, EngineStopped, or ApiError where the engine stands still."""
        choices = [Choice(index, "", 0, None) for index in range(len(self.job.requests))]
        async for piece in self._pieces():
            choices[piece.index] = choices[piece.index].followed_by(piece)
        return self.bodies.complete(choices, about=self.about)

    async def chunks(self, *, include_usage: bool) -> AsyncIterator[dict[str, Any]]:
        """The same body in pieces. Raises like `complete`."""
        tokens = [0] * len(self.job.requests)
        # OpenAI: with include_usage every chunk has the field, and all but the last have nothing in it.
        usage: dict[str, Any] = {"usage": None} if include_usage else {}
        for body in self.bodies.opening(len(tokens)):
            yield body | usage
        async for piece in self._pieces():
            tokens[piece.index] = piece.tokens
            yield self.bodies.chunk(piece) | usage | {"wiseline": self.about[piece.index]}
        if include_usage:
            yield self.bodies.usage_chunk(sum(tokens))

    async def _pieces(self) -> AsyncIterator[Choice]:
        """The job's pieces, or ApiError once no token has come for too long. (Tokens without text are no pieces: a stop
        string or a character may be unfinished.)"""
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self.patience, lambda: look())

        def look() -> None:
            nonlocal timer
            left = self.job.heard + self.patience - time.monotonic()
            if left > 0:
                timer = loop.call_later(left, look)
            else:
                self.job.send(_too_slow("stood still", self.patience))

        tokens: dict[int, int] = {}
        try:
            async for piece in self.job.pieces():
                tokens[piece.index] = piece.tokens
                yield piece
        finally:
            timer.cancel()
            self._ended(sum(tokens.values()))

    def _ended(self, tokens: int) -> None:
        """Also where the client has gone, or the engine failed."""
        seconds = time.monotonic() - self.job.submitted
        # Not "route": that is the path of the request in Serve's own logs.
        said: dict[str, str | int] = {"release": self.release, "answered_by": ", ".join(self.routes), "tokens": tokens}
        log.info("%d tokens in %.3f s.", tokens, seconds, extra={**said, "seconds": round(seconds, 4)})
        past("generation", seconds=seconds, **said)


class Answerer:
    """Answers requests with one engine, from the event loop that calls `begin`."""

    def __init__(self, config: Config, engine: Engine) -> None:
        self._config, self._engine = config, engine
        # Encoding happens here and decoding in the engine's thread; two threads must not share a fast tokenizer.
        self._tokenizer = copy.deepcopy(engine.base.tokenizer)
        self._spelling = Spelling(self._tokenizer)

    async def begin(
        self, body: ChatRequest | CompletionRequest, *, routed: bool = True, origin: Origin | None = None
    ) -> Answer:
        """Waits for the first token. Raises ApiError, QueueFull, GenerationFailed or EngineStopped; nothing is then
        left running, nor when the caller is cancelled."""
        origin = origin or Origin()
        chat = isinstance(body, ChatRequest)
        echo = isinstance(body, CompletionRequest) and body.echo
        requests = seeded(self._requests(body, routed=routed), origin.number)
        job = self._engine.submit(
            requests, stop=body.stop, strip_start=chat, whole=not body.stream, release=origin.release
        )
        try:
            async with asyncio.timeout(self._config.serve.first_token_seconds):
                started = await job.started()
        except TimeoutError:
            job.cancel()
            raise _too_slow("did not begin", self._config.serve.first_token_seconds) from None
        except BaseException:
            job.cancel()
            raise
        about = tuple(_about(started.release, decision, explain=body.explain) for decision in started.decisions)
        release = number(started.release)
        bodies = Bodies(
            kind="chat" if chat else "text",
            model=body.model,
            fingerprint=f"{self._engine.base.fingerprint[:12]}-{release}",
            wiseline=about[0],
            number=origin.number,
            created=origin.created,
            prompt_tokens=sum(len(request.prompt_ids) for request in job.requests[:: body.n]),
            spelling=None if body.alternatives is None else self._spelling,
            echoed=[request.text for request in job.requests] if echo else (),
        )
        routes = tuple(one["route"] for one in about[:: body.n])
        patience = self._config.serve.next_token_seconds
        return Answer(release=release, routes=routes, bodies=bodies, about=about, job=job, patience=patience)

    def check_model(self, name: str) -> None:
        """Raises ApiError (404) unless it is what this endpoint serves, by our name or the base model's."""
        if name not in (MODEL_NAME, self._config.model.path):
            message = f"The model '{name}' does not exist; this endpoint serves '{MODEL_NAME}'."
            raise ApiError(404, message, param="model", code="model_not_found")

    def _requests(self, body: ChatRequest | CompletionRequest, *, routed: bool) -> list[GenerationRequest]:
        limits = self._config.serve
        self.check_model(body.model)
        wanted = body.n * (1 if isinstance(body, ChatRequest) else len(body.prompt))
        most = min(limits.max_batch_requests, limits.max_queued_requests)
        if wanted > most:
            param = "n" if body.n > 1 else "prompt"
            raise ApiError(400, f"One request may ask for at most {most} answers, not {wanted}.", param=param)
        if isinstance(body, ChatRequest):
            prompts = [chat_prompt(self._tokenizer, body.messages)]
        else:
            prompts = [plain_prompt(self._tokenizer, prompt) for prompt in body.prompt]
        requests = [
            generation_request(
                prompt,
                body,
                limits=limits,
                context_tokens=self._engine.base.max_tokens,
                routed=routed,
            )
            for prompt in prompts
        ]
        return [one for request in requests for one in seeded_apart(request, body.n)]


def number(release: LoadedRelease | None) -> int:
    """How a release is named to clients."""
    return (release.number or 0) if release else 0


def _too_slow(what: str, seconds: float) -> ApiError:
    return ApiError(503, f"The answer {what} within {seconds:g} s; ask again later.", code="timeout", retry_after=1)


def _about(release: LoadedRelease | None, decision: Decision, *, explain: bool) -> dict[str, Any]:
    """The `wiseline` object of a body: who answered, by which route and, when asked for, why."""
    route = "main" if decision.memory is None else f"memory-{decision.memory}"
    about: dict[str, Any] = {"release": number(release), "route": route}
    if explain:
        about["why"] = {
            "memory": decision.memory,
            "similarity": decision.similarity,
            "score": decision.score,
            "threshold": decision.threshold,
            "nearest_edit": _edit(release, decision.edit_id),
            "nearest_edits": _nearest_edits(release, decision),
        }
    return about


def _nearest_edits(release: LoadedRelease | None, decision: Decision) -> list[dict[str, Any]]:
    """The edits that the router found nearest, the best first, and how near each is."""
    if release is None or decision.edit_id is None:
        return []
    near = [(decision.edit_id, decision.score, decision.similarity), *decision.runners_up]
    edits = ((_edit(release, edit_id), score, similarity) for edit_id, score, similarity in near)
    return [{**edit, "score": score, "similarity": similarity} for edit, score, similarity in edits if edit]


def _edit(release: LoadedRelease | None, edit_id: str | None) -> dict[str, Any] | None:
    if release is None or edit_id is None:
        return None
    edit = release.entry_of[edit_id]
    return {"edit_id": edit_id, "prompt": edit.prompt, "target": edit.target, "subject": edit.subject}
