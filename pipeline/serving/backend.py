"""What the engine asks of whatever runs the model: requests in, their tokens out, a step at a time.

`ContinuousBatching` fulfils it, `WindowedBatches` where that cannot, and so could another library's engine (vLLM's
`add_request`, `step`, `abort_request`). One thread calls all of it: the engine's.
"""

from typing import Protocol

from pipeline.config import ServeSection
from pipeline.models.base_model import BaseModel
from pipeline.models.cache_room import cache_pages
from pipeline.models.continuous import ContinuousBatching, can_batch_continuously
from pipeline.models.generate import GenerationRequest, Token
from pipeline.models.loaded_release import LoadedRelease
from pipeline.models.routed_ffn import Decision
from pipeline.models.windowed import WindowedBatches


class Backend(Protocol):
    def add(self, key: int, request: GenerationRequest, release: LoadedRelease | None) -> None:
        """`request` runs from one of the next steps on, and keeps `release`; its tokens carry `key`, which is new."""

    def step(self) -> list[Token]:
        """What was said meanwhile. A request's last token is the one that says how it finished.

        After an exception only `reset` may follow."""

    def decision(self, key: int) -> Decision:
        """Which memory answers and why; known from the request's first token on."""

    def remove(self, key: int) -> None:
        """The request is finished or nobody wants it any more. What it held, its release too, is let go."""

    def reset(self) -> None:
        """Forgets all requests."""


def backend_for(base: BaseModel, section: ServeSection) -> Backend:
    """Raises ConfigError when the cache would not hold one whole context."""
    if not can_batch_continuously(base):
        return WindowedBatches(base)
    sequences = section.max_batch_requests
    pages = cache_pages(base, sequences=sequences, gib=section.cache_gib)
    return ContinuousBatching(base, sequences=sequences, step_tokens=section.max_batch_tokens, pages=pages)
