"""The shards of one memory as a merge reads them: blocks of rows of all deltas, from the top, as often as it needs.

Nobody holds the K deltas whole. Shape letters: K shards, D d_model, R rows of a block, F d_ff, N keys, E entries.
"""

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor


class RowBlock(Protocol):
    """Some rows of all deltas, from `first_row` on. It may be made when it is first looked at, in any thread."""

    @property
    def first_row(self) -> int: ...

    @property
    def deltas_KRF(self) -> Tensor:
        """Zero outside the masks."""

    @property
    def trained_KRF(self) -> Tensor:
        """The masks."""


class Shards(Protocol):
    """K shards; `indices_K` are their places in the memory, in the order in which the blocks stack them."""

    @property
    def indices_K(self) -> list[int]: ...

    def blocks(self) -> Iterator[RowBlock]:
        """All rows once, each block about as large as the cache; how many rows it has may change no result."""

    def magnitudes_E(self, shard: int) -> Tensor:
        """|ΔW| of all entries that the shard at this place of the order trained; a copy, for the caller to sort."""

    def keys_NF(self, shard: int) -> Tensor:
        """A(x) of the shard's own edits."""
