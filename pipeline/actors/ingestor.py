"""Reading users' files on Ray: files in, batches of checked rows out, in the order of files and rows.

Reading streams: each file is one task that yields blocks of rows, the blocks are checked in parallel, and the driver
takes them in order as they come. Nothing is written here.
"""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray

from pipeline.actors.checked_rows import RAW_CHARS, CheckedRows, check_on_ray
from pipeline.actors.results import fetch
from pipeline.actors.row_blocks import Block, read_blocks
from pipeline.actors.row_formats import format_of, is_supported, read_rows
from pipeline.config import EditsSection
from pipeline.errors import WiselineError
from pipeline.storage.batches import ColumnBatch, Rejection
from pipeline.storage.schemas import CHECKED
from pipeline.storage.user_files import find_sources, open_source

__all__ = ["RAW_CHARS", "Source", "find_files", "read_batches"]

# Rows under one batch id; a file's n-th batch holds the same rows whenever it is read.
BATCH_ROWS = 20_000
# Files that are read at once, and blocks each may be ahead of those who check them.
READERS, BLOCKS_AHEAD = 2, 2
# Blocks that are checked or wait for the driver, for each CPU and at most; a block is some 10 MB.
BLOCKS_PER_CPU, MOST_BLOCKS = 2, 32


@dataclass(frozen=True)
class Source:
    uri: str
    s3_endpoint_url: str | None


def find_files(paths: Sequence[str], *, s3_endpoint_url: str | None = None) -> list[Source]:
    """Every file that `paths` name (files, folders, patterns, s3://), each once, in the order they will be read.

    Reads the beginning of each one, so that a missing or unreadable file is refused before anything is written.
    Raises NotFound, CorruptObject or StoreError about the first such file.
    """
    uris = dict.fromkeys(itertools.chain.from_iterable(_expand(path, s3_endpoint_url) for path in paths))
    sources = [Source(uri, s3_endpoint_url) for uri in uris]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(_read_beginning, sources))
    return sources


def read_batches(sources: Sequence[Source], limits: EditsSection) -> Iterator[ColumnBatch]:
    """Batches of all rows of `sources`, good and refused, in order; needs a connected Ray.

    Raises StoreError when a file breaks while it is read.
    """
    for index, blocks in itertools.groupby(_checked_blocks(sources, limits), key=lambda block: block[0]):
        after = ""
        for rows in _in_batches(rows for _, rows in blocks):
            batch = ColumnBatch(sources[index].uri, rows.edits, rows.rejections, after)
            after = batch.batch_id
            yield batch


def _expand(path: str, s3_endpoint_url: str | None) -> list[str]:
    found = find_sources(path, s3_endpoint_url=s3_endpoint_url)
    if len(found) == 1 or any(sign in path for sign in "*?["):  # named by the user: each must be readable
        return found
    supported = [uri for uri in found if is_supported(uri)]
    if not supported:
        format_of(found[0])  # raises: a folder without anything to read
    return supported


def _read_beginning(source: Source) -> None:
    format_of(source.uri)
    with open_source(source.uri, s3_endpoint_url=source.s3_endpoint_url) as file:
        next(read_rows(source.uri, file), None)


def _checked_blocks(sources: Sequence[Source], limits: EditsSection) -> Iterator[tuple[int, CheckedRows]]:
    """(source, rows) of every block, in order."""
    where = _where_to_read(sources)
    read = ray.remote(_read).options(
        num_returns="streaming", _generator_backpressure_num_objects=BLOCKS_AHEAD, max_retries=3, **where
    )
    checker = ray.remote(check_on_ray).options(num_cpus=1)
    limit_ref = ray.put(limits)
    most = min(MOST_BLOCKS, max(2, int(ray.cluster_resources().get("CPU", 1)) * BLOCKS_PER_CPU))
    readers = deque(enumerate(sources))
    reading: deque[tuple[int, Any]] = deque()
    checking: deque[tuple[int, Any]] = deque()
    while reading or readers:
        while readers and len(reading) < READERS:
            index, source = readers.popleft()
            reading.append((index, read.remote(source)))
        index, blocks = reading.popleft()
        for block in blocks:
            checking.append((index, checker.remote(block, limit_ref)))
            del block  # or it would be kept until the next one comes
            if len(checking) >= most:
                yield _taken(*checking.popleft())
    while checking:
        yield _taken(*checking.popleft())


def _taken(index: int, checked: Any) -> tuple[int, CheckedRows]:
    rows: CheckedRows = fetch(checked)
    return index, rows


def _where_to_read(sources: Sequence[Source]) -> dict[str, Any]:
    """Local files are on the driver's machine alone, which may have no CPUs to give (a cluster's head). No reader takes
    a CPU: readers that wait for checkers must not keep them from running."""
    if all(source.uri.startswith("s3://") for source in sources):
        return {"num_cpus": 0, "scheduling_strategy": "SPREAD"}
    return {"num_cpus": 0, "label_selector": {"ray.io/node-id": ray.get_runtime_context().get_node_id()}}


def _read(source: Source) -> Iterator[Block | WiselineError]:
    """One Ray task: the blocks of one file, or the error that ends them."""
    try:
        with open_source(source.uri, s3_endpoint_url=source.s3_endpoint_url) as file:
            yield from read_blocks(source.uri, file)
    except WiselineError as error:
        yield error


def _in_batches(blocks: Iterator[CheckedRows]) -> Iterator[CheckedRows]:
    """The same rows, BATCH_ROWS at a time."""
    edits = CHECKED.empty_table()
    rejections: list[Rejection] = []
    for block in blocks:
        edits = pa.concat_tables([edits, block.edits])
        rejections += block.rejections
        while edits.num_rows + len(rejections) > BATCH_ROWS:
            rows = np.sort(np.concatenate([_numbers(edits), np.array([bad.row for bad in rejections], np.int64)]))
            last = rows[BATCH_ROWS - 1]
            cut = int(np.searchsorted(_numbers(edits), last, side="right"))
            bad = sum(one.row <= last for one in rejections)
            yield CheckedRows(edits.slice(0, cut), tuple(rejections[:bad]))
            edits, rejections = edits.slice(cut), rejections[bad:]
    if edits.num_rows or rejections:
        yield CheckedRows(edits, tuple(rejections))


def _numbers(edits: pa.Table) -> npt.NDArray[np.int64]:
    numbers: npt.NDArray[np.int64] = edits["row"].to_numpy()
    return numbers
