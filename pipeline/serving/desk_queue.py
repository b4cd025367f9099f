"""Turns at the edit desk: one request at a time, each in a thread, and posts that come close together in one commit."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from fastapi.concurrency import run_in_threadpool

from pipeline.serving.api_errors import RETRY_AFTER, ApiError
from pipeline.serving.edit_desk import EditDesk, Posted

MOST_WAITING = 32  # the log takes one commit at a time
COMMIT_GAP = (
    0.25  # seconds; a commit costs some 50 ms of processor time, and more where replicas are in each other's way
)
T = TypeVar("T")


class DeskQueue:
    def __init__(self, desk: EditDesk) -> None:
        self._desk = desk
        self._turn = asyncio.Lock()
        self._waiting: set[asyncio.Task[Any]] = set()
        self._next_commit = 0.0

    async def run(self, work: Callable[[], T]) -> T:
        """`work` in its turn. Raises ApiError where too many wait already."""

        async def in_turn() -> T:
            async with self._turn:
                return await run_in_threadpool(work)

        return await self._wait_for(in_turn)

    async def post(self, rows: Sequence[object], *, author: str | None) -> Posted:
        """The rows in the log, with what others posted meanwhile. Raises ApiError, before anything is written, where
        too many wait already, and StoreError where they could not be written."""
        self._refuse_when_crowded()  # what is refused must not land
        post = self._desk.leave(rows, author=author)

        async def in_turn() -> None:
            async with self._turn:
                if post.is_done:  # somebody's turn before this one
                    return
                clock = asyncio.get_running_loop().time
                await asyncio.sleep(self._next_commit - clock())
                await run_in_threadpool(self._desk.write)
                self._next_commit = clock() + COMMIT_GAP

        await self._wait_for(in_turn)
        return post.result()

    async def _wait_for(self, in_turn: Callable[[], Awaitable[T]]) -> T:
        """A client that hangs up does not let the next one in before its thread is done."""
        self._refuse_when_crowded()
        task = asyncio.ensure_future(in_turn())
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)
        return await asyncio.shield(task)

    def _refuse_when_crowded(self) -> None:
        if len(self._waiting) >= MOST_WAITING:
            message = f"{MOST_WAITING} requests already wait for the edit log; ask again in a moment."
            raise ApiError(429, message, code="queue_full", retry_after=RETRY_AFTER)
