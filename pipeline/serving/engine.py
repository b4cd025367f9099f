"""One thread owns the model: it lets waiting prompts in as others finish, and answers all of them a token at a time.

A job is one HTTP request. It takes one reference to the current release when its first prompt is let in, and all its
prompts keep it to their last token: a swap never changes an answer that has begun. How steps are made is the backend's.
"""

import asyncio
import math
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import count

from pipeline.config import ServeSection
from pipeline.errors import EndpointError
from pipeline.logs import ids, logger
from pipeline.metrics import record
from pipeline.models.base_model import BaseModel
from pipeline.models.generate import GenerationRequest, Token
from pipeline.models.loaded_release import LoadedRelease
from pipeline.models.routed_ffn import Decision
from pipeline.serving.backend import backend_for
from pipeline.serving.logprobs import SaidToken
from pipeline.serving.openai_responses import Choice
from pipeline.serving.text_stream import TextStream

log = logger(__name__)


class QueueFull(EndpointError):
    """As many prompts wait as `serve.max_queued_requests` allows; asking again later is safe."""


class EngineStopped(EndpointError):
    """The thread that owns the model has ended; this replica answers nothing any more."""


class GenerationFailed(EndpointError):
    """The model raised while it answered this. The engine goes on with other requests."""


class Newest(Enum):
    """In place of a release: the one in use when the first prompt is let in. (None is the base model.)"""

    NEWEST = "newest"


@dataclass(frozen=True)
class Started:
    """What is known before the first text: who answers, and by which memory (one decision per prompt)."""

    release: LoadedRelease | None
    decisions: tuple[Decision, ...]


class Job:
    """The prompts of one HTTP request and, on the event loop that submitted them, their answers as they are written."""

    def __init__(
        self, requests: Sequence[GenerationRequest], *, stop: Sequence[str], strip_start: bool, whole: bool
    ) -> None:
        self.requests, self.stop, self.strip_start, self.whole = tuple(requests), tuple(stop), strip_start, whole
        self.cancelled, self.begun = False, False
        self.belongs_to = ids()  # the engine's thread logs for many requests
        self.submitted = time.monotonic()
        self.heard = self.submitted  # when the last token came; it need not have been one that shows
        self.release: LoadedRelease | None = None
        self._decisions: dict[int, Decision] = {}
        self._held: list[Choice] = []  # text of some prompts, while others have none
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Started | Choice | EndpointError] = asyncio.Queue()

    async def started(self) -> Started:
        """Waits for the first token of every prompt. Raises GenerationFailed or EngineStopped."""
        event = await self._next()
        assert isinstance(event, Started)
        return event

    async def pieces(self) -> AsyncIterator[Choice]:
        """Text of all prompts as it is written, until each of them is finished. Raises like `started`."""
        unfinished = len(self.requests)
        while unfinished:
            piece = await self._next()
            assert isinstance(piece, Choice)
            unfinished -= piece.finish is not None
            yield piece

    def cancel(self) -> None:
        """Nobody reads the answer any more; the engine drops it at its next step."""
        self.cancelled = True

    def begin(self, release: LoadedRelease | None) -> None:
        """For the engine's thread only, as what follows. All prompts of a job are answered by one release."""
        if not self.begun:
            self.begun, self.release = True, release

    def decide(self, index: int, decision: Decision) -> None:
        self._decisions[index] = decision
        if len(self._decisions) == len(self.requests):
            self._post(Started(self.release, tuple(self._decisions[index] for index in range(len(self.requests)))))
            for piece in self._held:
                self._post(piece)
            self._held.clear()

    def send(self, event: Choice | EndpointError) -> None:
        if isinstance(event, Choice) and len(self._decisions) < len(self.requests):
            self._held.append(event)
        else:
            self._post(event)

    def _post(self, event: Started | Choice | EndpointError) -> None:
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the event loop is closed, so nobody is left to read
            self.cancelled = True

    async def _next(self) -> Started | Choice:
        event = await self._events.get()
        if isinstance(event, EndpointError):
            raise event
        return event


class Engine:
    """Until the first `swap` the base model answers. Raises ConfigError when the model's cache does not fit."""

    def __init__(self, base: BaseModel, section: ServeSection) -> None:
        self.base = base
        self.release: LoadedRelease | None = None
        self._section = section
        self._backend = backend_for(base, section)
        self._waiting: deque[tuple[Job, int]] = deque()  # a job and which of its prompts
        self._running: dict[int, _Answer] = {}
        self._entering: list[int] = []  # running ones that the backend does not know yet
        self._keys = count()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="wiseline-engine", daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closing

    @property
    def queued(self) -> int:
        """Prompts that wait for a place in the batch."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Answers that are being written."""
        return len(self._running)

    def swap(self, release: LoadedRelease) -> None:
        """`release` answers the jobs that begin from now on."""
        self.release = release

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Finishes the jobs that have begun; whatever still waits fails with EngineStopped."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def submit(
        self,
        requests: Sequence[GenerationRequest],
        *,
        stop: Sequence[str] = (),
        strip_start: bool = False,
        whole: bool = False,
        release: LoadedRelease | Newest | None = Newest.NEWEST,
    ) -> Job:
        """Queue the prompts of one HTTP request. `whole`: each answer comes as one piece, and the event loop is woken
        once for it, not for every token. `release`: of an answer that began elsewhere and goes on here.

        Raises QueueFull or EngineStopped, and has then queued nothing."""
        assert requests
        job = Job(requests, stop=stop, strip_start=strip_start, whole=whole)
        if not isinstance(release, Newest):
            job.begin(release)
        with self._changed:
            if not self.alive:
                raise EngineStopped("The engine of this replica has stopped; ask again, another replica may answer.")
            self._waiting = deque((waiting, index) for waiting, index in self._waiting if not waiting.cancelled)
            if len(self._waiting) + len(requests) > self._section.max_queued_requests:
                record("wiseline_refused_requests_total")
                raise QueueFull(f"{len(self._waiting)} prompts are already waiting; ask again in a moment.")
            self._waiting.extend((job, index) for index in range(len(requests)))
            self._changed.notify()
        return job

    def _run(self) -> None:
        try:
            while self._admit():
                try:
                    self._step()
                except BaseException as error:
                    self._fail_running(error)
                    if not isinstance(error, Exception):  # SystemExit and the like end this thread
                        raise
        finally:
            with self._changed:
                self._closing = True
                for job in {job: None for job, _ in self._waiting}:
                    job.send(EngineStopped("The engine of this replica stopped before it came to this request."))
            del self._backend  # its cache is freed here, and not while the interpreter ends

    def _admit(self) -> bool:
        """Waits for something to do, and lets in what waits while there is room; False when closing and all is done.

        When closing, only prompts of jobs that have begun are let in."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._running or self._closing)
            while self._waiting and len(self._running) < self._section.max_batch_requests:
                if self._closing and not self._waiting[0][0].begun:
                    break
                job, index = self._waiting.popleft()
                if not job.cancelled:
                    job.begin(self.release)
                    key = next(self._keys)
                    self._running[key] = _Answer(self.base, job, index)
                    self._entering.append(key)
            return bool(self._running) or not self._closing

    def _step(self) -> None:
        while self._entering:
            key = self._entering.pop(0)
            answer = self._running[key]
            self._backend.add(key, answer.request, answer.job.release)
            record("wiseline_prompt_tokens_total", len(answer.request.prompt_ids))
        for key in [key for key, answer in self._running.items() if answer.job.cancelled]:
            self._leave(key)
        if self._running:
            said = self._backend.step()
            record("wiseline_tokens_total", len(said))
            for token in said:
                self._say(token)

    def _say(self, token: Token) -> None:
        answer = self._running[token.request]
        if not answer.decided:
            answer.decide(self._backend.decision(token.request))
        piece = answer.add(token)
        if piece.finish or (piece.text and not answer.job.whole):
            answer.job.send(piece)
        if piece.finish:
            self._leave(token.request)

    def _leave(self, key: int) -> None:
        del self._running[key]
        self._backend.remove(key)

    def _fail_running(self, error: BaseException) -> None:
        record("wiseline_failed_steps_total")
        jobs = list({answer.job: None for answer in self._running.values()})
        requests = [job.belongs_to.get("request_id", "") for job in jobs]
        log.error(
            "A step failed; %d prompts were being answered.",
            len(self._running),
            exc_info=error,
            extra={"request_ids": requests},
        )
        failure = f"The model failed on this batch ({type(error).__name__}); it is safe to ask again."
        for job in jobs:
            job.send(GenerationFailed(failure))
            job.cancel()  # its other prompts may still wait
        self._running.clear()
        self._entering.clear()
        self._backend.reset()


class _Answer:
    """Turns the tokens of one prompt into the pieces its job receives."""

    def __init__(self, base: BaseModel, job: Job, index: int) -> None:
        self.job, self.request = job, job.requests[index]
        self.decided = False
        self._index = index
        self._tokens = 0
        self._unsaid: list[SaidToken] = []
        self._so_far = Choice(index, "", 0, None)  # of a job that wants whole answers
        self._text = TextStream(
            base.tokenizer, prompt_ids=job.requests[index].prompt_ids, stop=job.stop, strip_start=job.strip_start
        )

    def decide(self, decision: Decision) -> None:
        self.decided = True
        record("wiseline_first_token_seconds", time.monotonic() - self.job.submitted)
        route = "off" if not self.request.routed else "main" if decision.memory is None else "memory"
        record("wiseline_answers_total", route=route)
        if decision.edit_id is not None or decision.memory is not None:
            record("wiseline_routing_margin", logistic(decision.score - decision.threshold))
        self.job.decide(self._index, decision)

    def add(self, token: Token) -> Choice:
        self.job.heard = time.monotonic()
        if token.finish == "stop":  # the end-of-sequence token itself is not shown
            return self._piece(self._text.finish(), "stop")
        self._tokens += 1
        if token.logprob is not None:
            self._unsaid.append(SaidToken(token.token_id, token.logprob, token.top, self._text.length))
        text = self._text.add(token.token_id)
        if token.finish == "length" and not self._text.stopped:
            text += self._text.finish()
        return self._piece(text, "stop" if self._text.stopped else token.finish)

    def _piece(self, text: str, finish: str | None) -> Choice:
        """With the tokens that were read since the last piece, but those that only made a stop string."""
        said: tuple[SaidToken, ...] = ()
        if text or finish:
            cut = self._text.length if self._text.stopped else sys.maxsize
            said = tuple(one for one in self._unsaid if one.offset < cut)
            self._unsaid = []
        piece = Choice(self._index, text, self._tokens, finish, said)
        if self.job.whole:
            self._so_far = self._so_far.followed_by(piece)
            return self._so_far
        return piece


def logistic(value: float) -> float:
    return 0.5 + 0.5 * math.tanh(value / 2)
