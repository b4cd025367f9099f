"""Turns at the edit desk: one request at a time, each in a thread, and posts that come close together in one commit."""

import asyncio
from collections.abc import Callable, Collection, Coroutine, Sequence
from typing import Any, TypeVar

from fastapi.concurrency import run_in_threadpool

from pipeline.serving.api_errors import RETRY_AFTER, ApiError
from pipeline.serving.edit_desk import EditDesk, Posted

MOST_WAITING = 32  # one after another
MOST_POSTS = 1024  # together
# A commit takes tens of milliseconds, and more where replicas and the trainer are in each other's way; then posts wait
# for each other nine times as long as their commit took, at most so many seconds.
GAP_OVER_COMMIT, LONGEST_GAP = 9.0, 1.0
T = TypeVar("T")


class DeskQueue:
    def __init__(self, desk: EditDesk) -> None:
        self._desk = desk
        self._turn = asyncio.Lock()
        self._waiting: set[asyncio.Task[Any]] = set()
        self._posting: set[asyncio.Task[Any]] = set()
        self._next_commit = 0.0

    async def run(self, work: Callable[[], T]) -> T:
        """`work` in its turn. Raises ApiError where too many wait already."""
        _refuse_when_crowded(self._waiting, MOST_WAITING)

        async def in_turn() -> T:
            async with self._turn:
                return await run_in_threadpool(work)

        return await _shielded(in_turn(), self._waiting)

    async def post(self, rows: Sequence[object], *, author: str | None) -> Posted:
        """The rows in the log, with what others posted meanwhile. Raises ApiError, before anything is written, where
        too many wait already, and StoreError where they could not be written."""
        _refuse_when_crowded(self._posting, MOST_POSTS)  # what is refused must not land
        post = self._desk.leave(rows, author=author)
        clock = asyncio.get_running_loop().time

        async def written() -> None:
            while not post.is_done:  # somebody else's commit may have taken it along
                await asyncio.sleep(self._next_commit - clock())  # nobody else waits for that
                async with self._turn:
                    if not post.is_done and clock() >= self._next_commit:
                        began = clock()
                        await run_in_threadpool(self._desk.write)
                        self._next_commit = clock() + min(GAP_OVER_COMMIT * (clock() - began), LONGEST_GAP)

        await _shielded(written(), self._posting)
        return post.result()


async def _shielded(work: Coroutine[Any, Any, T], among: set[asyncio.Task[Any]]) -> T:
    """A client that hangs up does not let the next one in before its thread is done."""
    task = asyncio.ensure_future(work)
    among.add(task)
    task.add_done_callback(among.discard)
    return await asyncio.shield(task)


def _refuse_when_crowded(waiting: Collection[object], most: int) -> None:
    if len(waiting) >= most:
        message = f"{most} requests already wait for the edit log; ask again in a moment."
        raise ApiError(429, message, code="queue_full", retry_after=RETRY_AFTER)
