"""One batch after another: what waits is answered together and to its end, then what came meanwhile.

For the models that cannot batch continuously: those whose attention is their own (GPT-J), and those spread over several
devices. A request that comes late waits for the longest answer of the running batch.
"""

from pipeline.models.base_model import BaseModel
from pipeline.models.generate import Generation, GenerationRequest, Token
from pipeline.models.loaded_release import LoadedRelease
from pipeline.models.routed_ffn import Decision


class WindowedBatches:
    """One thread may use it. A batch holds one release, so requests of another one wait for the next batch."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self._waiting: dict[int, tuple[GenerationRequest, LoadedRelease | None]] = {}
        self._batch: list[int] = []  # keys, in the generation's order
        self._wanted: set[int] = set()  # those among them that are not finished
        self._generation: Generation | None = None

    def add(self, key: int, request: GenerationRequest, release: LoadedRelease | None) -> None:
        """`request` runs when the batch before it is finished; its tokens carry `key`, which no other may have had."""
        self._waiting[key] = request, release

    def step(self) -> list[Token]:
        """One token of every request of the batch; the next batch begins where none runs."""
        if self._generation is None:
            if not self._waiting:
                return []
            self._begin()
        assert self._generation is not None
        said = self._generation.step()
        return [
            Token(self._batch[token.request], token.token_id, token.finish, token.logprob, token.top) for token in said
        ]

    def decision(self, key: int) -> Decision:
        """Known from the request's first token on, while its batch runs."""
        assert self._generation is not None
        return self._generation.decisions[self._batch.index(key)]

    def remove(self, key: int) -> None:
        """The request yields nothing more. A batch lets go of its release with its last request."""
        self._waiting.pop(key, None)
        self._wanted.discard(key)
        if not self._wanted:
            self._generation = None
        elif self._generation is not None and key in self._batch:
            self._generation.cancel(self._batch.index(key))

    def reset(self) -> None:
        """Forgets all requests: what to do after a step that raised."""
        self._waiting.clear()
        self._wanted.clear()
        self._generation = None

    def _begin(self) -> None:
        release = next(iter(self._waiting.values()))[1]
        self._batch = [key for key, (_, wanted) in self._waiting.items() if wanted is release]
        self._wanted = set(self._batch)
        requests = [self._waiting.pop(key)[0] for key in self._batch]
        self._generation = Generation(self._base, release, requests)
