"""One thread owns the model: it takes waiting jobs as a batch, answers them token by token, and takes the next.

A job is one HTTP request; all its prompts are answered in one batch, so by one release. A batch takes one reference to
the current release at its start and keeps it: a swap never changes an answer that has begun.
"""

import asyncio
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from pipeline.config import ServeSection
from pipeline.errors import EndpointError
from pipeline.models.base_model import BaseModel
from pipeline.models.generate import Generation, GenerationRequest, Token
from pipeline.models.loaded_release import LoadedRelease
from pipeline.models.routed_ffn import Decision
from pipeline.serving.logprobs import SaidToken
from pipeline.serving.openai_responses import Choice
from pipeline.serving.text_stream import TextStream

log = logging.getLogger(__name__)


class QueueFull(EndpointError):
    """As many prompts wait as `serve.max_queued_requests` allows; asking again later is safe."""


class EngineStopped(EndpointError):
    """The thread that owns the model has ended; this replica answers nothing any more."""


class GenerationFailed(EndpointError):
    """The model raised on this batch. The engine goes on with the next one."""


@dataclass(frozen=True)
class Started:
    """What is known before the first text: who answers, and by which memory (one decision per prompt)."""

    release: LoadedRelease | None
    decisions: tuple[Decision, ...]


class Job:
    """The prompts of one HTTP request and, on the event loop that submitted them, their answers as they are written."""

    def __init__(self, requests: Sequence[GenerationRequest], *, stop: Sequence[str], strip_start: bool) -> None:
        self.requests, self.stop, self.strip_start = tuple(requests), tuple(stop), strip_start
        self.cancelled = False
        self.heard = time.monotonic()  # when the last token came; it need not have been one that shows
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Started | Choice | EndpointError] = asyncio.Queue()

    async def started(self) -> Started:
        """Waits for the first token. Raises GenerationFailed or EngineStopped."""
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

    def send(self, event: Started | Choice | EndpointError) -> None:
        """For the engine's thread only."""
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
    """Until the first `swap` the base model answers."""

    def __init__(self, base: BaseModel, section: ServeSection) -> None:
        self.base = base
        self.release: LoadedRelease | None = None
        self._section = section
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="wiseline-engine", daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closing

    def swap(self, release: LoadedRelease) -> None:
        """`release` answers from the next batch on."""
        self.release = release

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Finishes the running batch; whatever still waits fails with EngineStopped."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def submit(
        self, requests: Sequence[GenerationRequest], *, stop: Sequence[str] = (), strip_start: bool = False
    ) -> Job:
        """Queue the prompts of one HTTP request. Raises QueueFull or EngineStopped, and has then queued nothing."""
        assert 0 < len(requests) <= self._section.max_batch_requests
        job = Job(requests, stop=stop, strip_start=strip_start)
        with self._changed:
            if not self.alive:
                raise EngineStopped("The engine of this replica has stopped; ask again, another replica may answer.")
            self._waiting = deque(waiting for waiting in self._waiting if not waiting.cancelled)
            if _prompts(self._waiting) + len(requests) > self._section.max_queued_requests:
                raise QueueFull(f"{_prompts(self._waiting)} prompts are already waiting; ask again in a moment.")
            self._waiting.append(job)
            self._changed.notify()
        return job

    def _run(self) -> None:
        try:
            while (jobs := self._next_batch()) is not None:
                try:
                    self._answer(jobs)
                except BaseException as error:
                    log.exception("A batch of %d prompts failed.", _prompts(jobs))
                    failure = f"The model failed on this batch ({type(error).__name__}); it is safe to ask again."
                    for job in jobs:
                        job.send(GenerationFailed(failure))
                    if not isinstance(error, Exception):  # SystemExit and the like end this thread
                        raise
        finally:
            with self._changed:
                self._closing = True
                for job in self._waiting:
                    job.send(EngineStopped("The engine of this replica stopped before it came to this request."))

    def _next_batch(self) -> list[Job] | None:
        """Waits for a job, then a moment longer for others; None when closing."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            self._changed.wait_for(self._is_full_or_closing, timeout=self._section.batch_window_seconds)
            if self._closing:
                return None
            jobs: list[Job] = []
            while self._waiting and _prompts([*jobs, self._waiting[0]]) <= self._section.max_batch_requests:
                jobs.append(self._waiting.popleft())
            return jobs

    def _is_full_or_closing(self) -> bool:
        return self._closing or _prompts(self._waiting) >= self._section.max_batch_requests

    def _answer(self, jobs: Sequence[Job]) -> None:
        rows = [(job, index) for job in jobs for index in range(len(job.requests)) if not job.cancelled]
        if not rows:
            return
        release = self.release
        generation = Generation(self.base, release, [job.requests[index] for job, index in rows])
        answers = [_Answer(self.base, *row) for row in rows]
        first = generation.step()
        for job in {row[0]: None for row in rows}:
            mine = [decision for row, decision in zip(rows, generation.decisions, strict=True) if row[0] is job]
            job.send(Started(release, tuple(mine)))
        self._send(first, answers, generation)
        while not generation.finished:
            self._send(generation.step(), answers, generation)

    def _send(self, tokens: Sequence[Token], answers: Sequence["_Answer"], generation: Generation) -> None:
        for token in tokens:
            answer = answers[token.request]
            piece = answer.add(token)
            if piece.text or piece.finish:
                answer.job.send(piece)
            if answer.job.cancelled or (piece.finish and token.finish is None):
                generation.cancel(token.request)


class _Answer:
    """Turns the tokens of one prompt into the pieces its job receives."""

    def __init__(self, base: BaseModel, job: Job, index: int) -> None:
        self.job = job
        self._index = index
        self._tokens = 0
        self._unsaid: list[SaidToken] = []
        self._text = TextStream(
            base.tokenizer, prompt_ids=job.requests[index].prompt_ids, stop=job.stop, strip_start=job.strip_start
        )

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
        return Choice(self._index, text, self._tokens, finish, said)


def _prompts(jobs: Sequence[Job] | deque[Job]) -> int:
    return sum(len(job.requests) for job in jobs)
