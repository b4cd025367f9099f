"""Keeps the engine on the newest release of its model that verifies.

Verification comes first and the swap is one assignment, so a corrupt or foreign release never answers anything. What
fails is tried again, ever more rarely, because a store may only be silent for a while and objects can be restored.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Literal
from weakref import WeakValueDictionary

from pipeline.errors import WiselineError
from pipeline.logs import logger
from pipeline.metrics import record
from pipeline.models.base_model import BaseModel
from pipeline.models.loaded_release import LoadedRelease, load_release
from pipeline.models.side_memories import MemoryCache
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.releases import OfModel, read_release, release_numbers

log = logger(__name__)

FALLBACKS = 3  # a replica that starts beside a damaged head tries so many releases before it
UNREADABLE = "The store cannot be read"
OTHERS_ALONE = "All releases of the store are for other base models; run a round with this one first: `wiseline round`."
LONGEST_PAUSE = 60.0  # seconds between two attempts to load the same damaged head
# Between two looks, where the config does not say: a folder is listed in microseconds, a bucket's listings cost money.
LOCAL_POLL_SECONDS, POLL_SECONDS = 0.2, 1.0


@dataclass(frozen=True)
class FollowerState:
    """`error` is one sentence on why the head is not the release in use; None while all is well."""

    release: int = 0
    error: str | None = None


class ReleaseFollower:
    """Calls `swap` with each newer release once it is loaded and verified. Never raises."""

    def __init__(
        self,
        store: ObjectStore,
        base: BaseModel,
        swap: Callable[[LoadedRelease], None],
        *,
        poll_seconds: float | Literal["auto"],
        memories: MemoryCache | None = None,
    ) -> None:
        self.state = FollowerState()
        self._store, self._base, self._swap = store, base, swap
        self._of_model = OfModel(base.fingerprint, base.layer)
        self._heard_by: dict[int, int | None] = {}  # releases that clients asked for
        auto = POLL_SECONDS if store.on_s3 else LOCAL_POLL_SECONDS
        self._poll_seconds = auto if poll_seconds == "auto" else poll_seconds
        self._memories = memories or MemoryCache(base)  # most memories of a release are those of the one before
        self._loaded: WeakValueDictionary[int, LoadedRelease] = WeakValueDictionary()
        self._loading = threading.Lock()
        self._failed_head, self._pause, self._next_attempt = 0, 0.0, 0.0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="wiseline-follower", daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def follow(self) -> None:
        """Swap to the newest release that verifies, if it is newer than the one in use; `state` says how it went."""
        try:
            newer = [number for number in reversed(release_numbers(self._store)) if number > self.state.release]
        except Exception as error:
            self._report(f"{UNREADABLE}: {_sentence(error)}", release=self.state.release)
            return
        ours = (number for number in newer if not self._is_anothers(number))
        newest = next(ours, None)
        if newest is None:
            release = self.state.release
            self._report(OTHERS_ALONE if newer and not release else None, release=release)
        elif newest != self._failed_head or time.monotonic() >= self._next_attempt:
            self._take_newest([newest, *islice(ours, FALLBACKS)])

    def release(self, number: int) -> LoadedRelease | None:
        """That release, whichever is in use: an answer that another replica began goes on with it. None for 0.

        Raises WiselineError when it cannot be had."""
        if number == 0:
            return None
        with self._loading:
            loaded = self._loaded.get(number)
            if loaded is None:
                loaded = load_release(
                    self._store, read_release(self._store, number), self._base, memories=self._memories
                )
                loaded.prepare()
                self._loaded[number] = loaded
            return loaded

    def log_version_of_anothers(self, number: int) -> int | None:
        """What another model's release heard of the log; None for our own, and where there is no such release."""
        if number not in self._heard_by:
            try:
                release = read_release(self._store, number)
            except Exception:
                return None
            self._heard_by[number] = None if self._of_model.has(release) else release.log_version
        return self._heard_by[number]

    def _is_anothers(self, number: int) -> bool:
        """A manifest that cannot be read may be our model's; it is looked at again when it is tried again."""
        others = self._of_model.others
        if number not in others and (number != self._failed_head or time.monotonic() >= self._next_attempt):
            try:
                release = read_release(self._store, number)
            except Exception:
                return False
            if not self._of_model.has(release):
                others.add(number)
        return number in others

    def _take_newest(self, numbers: list[int]) -> None:
        problem: str | None = None
        for number in numbers:
            began = time.monotonic()
            try:
                loaded = self.release(number)
            except Exception as error:
                problem = problem or f"Release {number} is not used: {_sentence(error)}"
                continue
            assert loaded is not None
            self._schedule(numbers[0], failed=problem is not None)
            self._report(problem, release=number)  # first: who sees its answers sees no error of before
            self._swap(loaded)
            record("wiseline_swap_seconds", time.monotonic() - began)
            log.info("Release %d answers from now on.", number)
            return
        self._schedule(numbers[0], failed=True)
        self._report(problem, release=self.state.release)

    def _schedule(self, head: int, *, failed: bool) -> None:
        """A head that failed again waits twice as long; a newer head never waits."""
        again = failed and head == self._failed_head
        self._pause = min(2 * self._pause, LONGEST_PAUSE) if again else self._poll_seconds
        self._failed_head = head if failed else 0
        self._next_attempt = time.monotonic() + self._pause

    def _report(self, error: str | None, *, release: int) -> None:
        """Both at once: who sees a release sees what it came with, not what was wrong before it."""
        if error is not None and error != self.state.error:
            log.warning("%s Release %d keeps answering.", error, release)
        self.state = FollowerState(release, error)

    def _run(self) -> None:
        while not self._closing.wait(self._poll_seconds):
            self.follow()


def _sentence(error: Exception) -> str:
    text = str(error) if isinstance(error, WiselineError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split()).rstrip(".") + "."
