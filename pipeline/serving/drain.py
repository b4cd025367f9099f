"""Stopping without cutting anybody off: answers that have begun end, new requests are sent elsewhere."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.serving.api_errors import ApiError

RETRY_AFTER = 5  # seconds; another replica may answer at once, a new one needs about as long


class Drain:
    """Counts the requests that run. For one event loop."""

    def __init__(self) -> None:
        self.draining = False
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def running(self) -> Iterator[None]:
        """One request, from its first byte to the last one of its stream. Raises ApiError (503) once draining."""
        if self.draining:
            raise ApiError(503, "This replica is being stopped; ask again.", code="stopping", retry_after=RETRY_AFTER)
        self._running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def finish(self, *, seconds: float) -> bool:
        """Let nobody in any more and wait for those inside; False when `seconds` were not enough for all of them."""
        self.draining = True
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
