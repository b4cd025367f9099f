"""Reading users' files with Ray Data: files in, validated rows out, in the order of files and rows.

Reading streams: each file is one task that yields blocks of rows, the blocks are validated in parallel, and the driver
takes them in order as they come. Nothing is written here.
"""

import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
from ray.data import DataContext, TaskPoolStrategy

from pipeline.actors.field_names import canonical_fields
from pipeline.actors.row_formats import format_of, is_supported, read_rows
from pipeline.config import EditsSection
from pipeline.edits import Edit, parse_edit
from pipeline.errors import BadEdit, StoreError, WiselineError
from pipeline.storage.batches import Batch, Rejection
from pipeline.storage.user_files import find_sources, open_source

# Rows of one commit to the edit log; a file's n-th batch holds the same rows whenever it is read.
BATCH_ROWS = 20_000
BLOCK_ROWS = 1000
# Ray Data joins rows into blocks of 128 MiB by default: too few to validate in parallel, too much to hold.
BLOCK_BYTES = 4 * 2**20
RAW_CHARS = 1000
LOCAL_READERS = 2
# The row number under which a reader reports that the file as a whole broke while it was read.
BROKEN = 0

ROWS = pa.schema(
    [("file", pa.int32()), ("row", pa.int64()), ("text", pa.binary()), ("raw", pa.string()), ("problem", pa.string())]
)
VALIDATED = pa.schema(
    [("file", pa.int32()), ("row", pa.int64()), ("edit", pa.string()), ("raw", pa.string()), ("problem", pa.string())]
)


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


def read_batches(sources: Sequence[Source], limits: EditsSection) -> Iterator[Batch]:
    """Batches of all rows of `sources`, good and refused, in order; needs a connected Ray.

    Raises StoreError when a file breaks while it is read; the batches before it were complete.
    """
    for index, rows in itertools.groupby(_validated_rows(sources, limits), key=lambda row: row["file"]):
        after = ""
        while part := list(itertools.islice(rows, BATCH_ROWS)):
            batch = _batch(sources[index].uri, part, after)
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


def _validated_rows(sources: Sequence[Source], limits: EditsSection) -> Iterator[dict[str, Any]]:
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns that its bars are off
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = BLOCK_BYTES
    context.execution_options.preserve_order = True  # the log's order must not depend on which task ends first
    with DataContext.current(context):
        files = ray.data.from_items(
            [{"file": index} for index in range(len(sources))], override_num_blocks=len(sources)
        )
        rows = files.map_batches(
            _read_files, fn_args=(list(sources),), batch_size=1, batch_format="pyarrow", **_where_to_read(sources)
        )
        validated = rows.map_batches(
            _validate, fn_args=(limits,), batch_size=BLOCK_ROWS, batch_format="pyarrow", num_cpus=0.5
        )
    for batch in validated.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in batch.to_pylist():
            if row["row"] == BROKEN:
                raise StoreError(row["problem"])
            yield row


def _where_to_read(sources: Sequence[Source]) -> dict[str, Any]:
    """Local files are on the driver's machine alone, which may have no CPUs to give (a cluster's head)."""
    if all(source.uri.startswith("s3://") for source in sources):
        return {"num_cpus": 0.5}
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    return {"num_cpus": 0, "label_selector": here, "compute": TaskPoolStrategy(min(len(sources), LOCAL_READERS))}


def _read_files(files: pa.Table, sources: Sequence[Source]) -> Iterator[pa.Table]:
    """One Ray task: the rows of one file, a block at a time."""
    for index in files["file"].to_pylist():
        source = sources[index]
        try:
            with open_source(source.uri, s3_endpoint_url=source.s3_endpoint_url) as file:
                rows = read_rows(source.uri, file)
                while block := list(itertools.islice(rows, BLOCK_ROWS)):
                    yield _table(ROWS, [{"file": index, **vars(row)} for row in block])
        except WiselineError as error:
            yield _table(ROWS, [{"file": index, "row": BROKEN, "text": b"", "raw": "", "problem": str(error)}])


def _validate(rows: pa.Table, limits: EditsSection) -> pa.Table:
    return _table(VALIDATED, [_validated(row, limits) for row in rows.to_pylist()])


def _validated(row: dict[str, Any], limits: EditsSection) -> dict[str, Any]:
    edit, problem = "", row["problem"]
    if not problem:
        try:
            edit = edit_from_json(row["text"], limits).model_dump_json()
        except BadEdit as error:
            problem = str(error)
    raw = row["raw"] or row["text"].decode("utf-8", "backslashreplace")
    return {
        "file": row["file"],
        "row": row["row"],
        "edit": edit,
        "raw": raw[:RAW_CHARS] if problem else "",
        "problem": problem,
    }


def edit_from_json(text: bytes, limits: EditsSection) -> Edit:
    """The edit that one row says, whatever its field names. Raises BadEdit with the reason."""
    try:
        fields = json.loads(text.decode())
        json.dumps(fields, ensure_ascii=False).encode()  # lone surrogates: bytes that were not UTF-8, or \ud800
    except UnicodeError:
        raise BadEdit("the text is not valid UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise BadEdit(f"broken JSON: {error}") from None
    return parse_edit(
        canonical_fields(fields), max_prompt_chars=limits.max_prompt_chars, max_target_chars=limits.max_target_chars
    )


def _batch(source: str, rows: Iterable[dict[str, Any]], after: str) -> Batch:
    edits: list[tuple[int, Edit]] = []
    rejections: list[Rejection] = []
    for row in rows:
        if row["problem"]:
            rejections.append(Rejection(row["row"], row["problem"], row["raw"]))
        else:
            edits.append((row["row"], Edit.model_validate_json(row["edit"])))
    return Batch(source, tuple(edits), tuple(rejections), after)


def _table(schema: pa.Schema, rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=schema)
