"""`GET /v1/round`: how far the running round is, by what it has left in the store. It runs in a job of its own."""

import threading
import time
from collections.abc import Callable
from datetime import datetime
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict

from pipeline.config import Config
from pipeline.serving import examples
from pipeline.storage.object_store import open_store
from pipeline.training.round_state import ShardState, look_at_rounds

LOOK_EVERY = 2.0  # seconds; the store is asked once for all who ask meanwhile


class _FromRound(BaseModel):
    model_config = ConfigDict(from_attributes=True)


class Shard(_FromRound):
    """`extracted`: what it trains on is in the store. `trained`: so is its delta, by this round or an earlier one."""

    memory: int
    shard: int
    edits: int
    state: ShardState


class RunningRound(_FromRound):
    """`news`: when it last wrote something. A round that was killed stays here, silent, until one after it ends."""

    round_id: str
    began: datetime
    news: datetime
    shards: list[Shard]


class LastRound(_FromRound):
    round_id: str
    ended: datetime
    missed: bool


class RoundNow(BaseModel):
    object: Literal["wiseline.round"] = "wiseline.round"
    running: RunningRound | None
    last: LastRound | None


def round_routes(config: Config) -> APIRouter:
    routes = APIRouter(tags=["wiseline"])
    store = open_store(config.store)

    def look() -> RoundNow:
        running, last = look_at_rounds(store)
        return RoundNow(
            running=RunningRound.model_validate(running) if running else None,
            last=LastRound.model_validate(last) if last else None,
        )

    remembered = Remembered(look, seconds=LOOK_EVERY)

    @routes.get("/v1/round", summary="The running round and its shards", responses=examples.ROUND)
    def round_now() -> RoundNow:
        """By what it has left in the store, a few seconds old. `last` is the one that ended last: it published a
        release, or `missed` a threshold."""
        return remembered.get()

    return routes


class Remembered:
    """What `look` saw, for so many seconds. An error is told and not remembered."""

    def __init__(self, look: Callable[[], RoundNow], *, seconds: float) -> None:
        self._look, self._seconds = look, seconds
        self._seen: tuple[float, RoundNow] | None = None
        self._looking = threading.Lock()

    def get(self) -> RoundNow:
        with self._looking:
            if self._seen is None or time.monotonic() - self._seen[0] >= self._seconds:
                self._seen = time.monotonic(), self._look()
            return self._seen[1]
