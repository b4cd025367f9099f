"""How much one key may ask for: requests at a time, and requests per minute. Counted by each replica for itself."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pipeline.serving.api_errors import ApiError
from pipeline.serving.keys import Key

MINUTE = 60.0


@dataclass
class TokenBucket:
    """Holds at most `size` requests and gains `size` per minute, so in any minute at most twice `size` pass."""

    size: int
    left: float
    filled: float  # when `left` was right, seconds

    def take(self, now: float) -> float:
        """Take one, or say in how many seconds there will be one; 0 means taken."""
        self.left = min(self.size, self.left + max(0.0, now - self.filled) * self.size / MINUTE)
        self.filled = now
        if self.left >= 1:
            self.left -= 1
            return 0.0
        return (1 - self.left) * MINUTE / self.size


class KeyLimits:
    """For one event loop."""

    def __init__(self, *, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._running: dict[str, int] = {}
        self._buckets: dict[str, TokenBucket] = {}

    @contextmanager
    def running(self, key: Key) -> Iterator[None]:
        """One request of this key, to the end of its stream. Raises ApiError (429) with the seconds to wait."""
        running = self._running.get(key.id, 0)
        if key.concurrent is not None and running >= key.concurrent:
            message = f"This key has {running} requests running, which is as many as it may; wait for one to end."
            raise ApiError(429, message, code="concurrency_limit_exceeded", retry_after=1)
        if key.per_minute is not None and (wait := self._bucket(key, key.per_minute).take(self._now())):
            seconds = math.ceil(wait)
            message = f"This key may send {key.per_minute} requests a minute; ask again in {seconds} s."
            raise ApiError(429, message, code="rate_limit_exceeded", retry_after=seconds)
        self._running[key.id] = running + 1
        try:
            yield
        finally:
            self._running[key.id] -= 1
            if not self._running[key.id]:
                del self._running[key.id]

    def _bucket(self, key: Key, size: int) -> TokenBucket:
        bucket = self._buckets.get(key.id)
        if bucket is None or bucket.size != size:
            bucket = self._buckets[key.id] = TokenBucket(size, size, self._now())
        return bucket
