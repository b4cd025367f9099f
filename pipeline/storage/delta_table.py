"""Opening, reading and committing to a Delta table, with deltalake's exceptions turned into ours.

A commit carries application transactions. Two commits with the same transaction name conflict, so naming the whole
table makes commits serial; naming a batch makes it recognisable: deltalake records the names but does
not deduplicate by them.
"""

import contextlib
import json
import re
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction

from pipeline.errors import NotFound, OutcomeUnknown, StoreError
from pipeline.storage.object_store import ObjectStore

# Every commit names it; whoever read an older state of the table loses and has to read again.
SERIAL = "wiseline-serial"
# What a commit calls itself in the table's history, so that who sent it recognises it.
COMMIT_NAME = "wiseline-commit"
MOST_SAID = 300
CONFLICT = re.compile("concurrent|conflict|changed since last commit", re.IGNORECASE)


class CommitLost(Exception):
    """Somebody else committed first; nothing of ours is in the table."""


def open_table(store: ObjectStore, name: str, *, version: int | None = None) -> DeltaTable | None:
    """The table, or None where nobody made it yet. Raises NotFound for a version it does not have."""
    with _explained(store, name):
        try:
            table = DeltaTable(store.delta_uri(name), storage_options=store.delta_options)
        except TableNotFoundError:
            return None
        if version is not None and version != table.version():
            if not 0 <= version < table.version():
                raise NotFound(f"{name} in {store.uri} has versions 0 to {table.version()}, not {version}.")
            table.load_as_version(version)
        return table


def make_table(store: ObjectStore, name: str, schema: pa.Schema) -> DeltaTable:
    """The table, made now unless it is there; of two makers at once both get the same table."""
    table = open_table(store, name)
    if table is not None:
        return table
    with _explained(store, name, writing=True):
        try:
            return DeltaTable.create(
                store.delta_uri(name),
                schema,
                storage_options=store.delta_options,
                configuration={"delta.appendOnly": "true"},
                # Otherwise the slower of two makers writes the same schema as a second version, which fails appends.
                commit_properties=CommitProperties(max_commit_retries=0),
            )
        except DeltaError:
            table = open_table(store, name)
            if table is None:
                raise
            return table


def read_table(
    store: ObjectStore, table: DeltaTable, columns: Sequence[str] | None = None, *, where: Any = None
) -> pa.Table:
    """Rows of the version that `table` stands at."""
    with _explained(store, table.table_uri):
        dataset = table.to_pyarrow_dataset()
        return dataset.to_table(columns=None if columns is None else list(columns), filter=where)


def read_batches(
    store: ObjectStore, table: DeltaTable, columns: Sequence[str], *, where: Any = None
) -> Iterator[pa.RecordBatch]:
    """The same piece by piece, in no order."""
    with _explained(store, table.table_uri):
        yield from table.to_pyarrow_dataset().to_batches(columns=list(columns), filter=where)


def read_from(
    store: ObjectStore, table: DeltaTable, columns: Sequence[str] | None = None, *, column: str, least: int
) -> pa.Table:
    """Rows whose `column`, a number, is `least` or more. Files that hold no such rows cost next to nothing."""
    with _explained(store, table.table_uri):
        dataset = table.to_pyarrow_dataset(file_pruning_predicate=f"{column} >= {least}")
        return dataset.to_table(columns=None if columns is None else list(columns), filter=pc.field(column) >= least)


def refresh(store: ObjectStore, table: DeltaTable) -> None:
    """Bring `table` to the newest version. Reads what came since and no more; opening it again would read all."""
    with _explained(store, table.table_uri):
        table.update_incremental()


def largest(store: ObjectStore, table: DeltaTable, column: str) -> int:
    """The largest number of a column, -1 for an empty table; from the files' statistics where all have them."""
    files = pa.table(table.get_add_actions(flatten=True))
    name = f"max.{column}"
    if name in files.column_names and not files[name].null_count:
        known = pc.max(files[name]).as_py()
        return -1 if known is None else int(known)
    parts = [part[column] for part in read_batches(store, table, [column]) if part.num_rows]
    return max((pc.max(part).as_py() for part in parts), default=-1)


def row_count(table: DeltaTable) -> int:
    """From what commits say of their files: the files of an old version may be gone."""
    return int(pc.sum(pa.table(table.get_add_actions(flatten=True))["num_records"]).as_py() or 0)


def was_committed(store: ObjectStore, table: DeltaTable, transaction: str) -> bool:
    """Reads the table's log, back to the newest checkpoint where there is no such transaction."""
    return _transaction(store, table, transaction) is not None


def committed_since(store: ObjectStore, table: DeltaTable, version: int) -> set[str]:
    """Transactions of the commits after `version`; reads these commits alone."""
    return {one["txn"]["appId"] for one in _actions(store, table, version) if "txn" in one}


def commit(store: ObjectStore, table: DeltaTable, rows: pa.Table, *, transactions: Sequence[str] = ()) -> None:
    """Append `rows` (possibly none) in one commit that also records `transactions`.

    Raises CommitLost when the table moved on since it was opened, and OutcomeUnknown when the store went silent and
    the table, opened again, does not show the commit: it may still land.
    """
    with _committing(store, table, transactions) as properties:
        if rows.num_rows:
            write_deltalake(table, rows, mode="append", commit_properties=properties)
        else:
            _add(table, [], properties)


def commit_files(
    store: ObjectStore, table: DeltaTable, files: Sequence[AddAction], *, transactions: Sequence[str]
) -> None:
    """The same for Parquet files that lie in the table's folder already: none is seen before, all are afterwards."""
    with _committing(store, table, transactions) as properties:
        _add(table, files, properties)


def compact(store: ObjectStore, table: DeltaTable, *, keep_hours: int) -> int:
    """Join small files into large ones and remove files that no version younger than `keep_hours` needs, those that
    were never committed among them; how many files were removed.

    No row changes, and commits that run at the same time do not conflict.
    """
    with _explained(store, table.table_uri, writing=True):
        table.optimize.compact()
        return len(table.vacuum(keep_hours, dry_run=False, enforce_retention_duration=False, full=True))


def _add(table: DeltaTable, files: Sequence[AddAction], properties: CommitProperties) -> None:
    table.create_write_transaction(list(files), mode="append", schema=table.schema(), commit_properties=properties)
    table.update_incremental()


@contextlib.contextmanager
def _committing(store: ObjectStore, table: DeltaTable, transactions: Sequence[str]) -> Iterator[CommitProperties]:
    serial = (_transaction(store, table, SERIAL) or 0) + 1
    named = [Transaction(name, 1) for name in dict.fromkeys(transactions)]
    own, version = uuid.uuid4().hex, table.version()
    with _explained(store, table.table_uri, writing=True):
        try:
            yield CommitProperties(
                app_transactions=[Transaction(SERIAL, serial), *named], custom_metadata={COMMIT_NAME: own}
            )
        except (DeltaError, OSError) as error:
            # The answer may be lost. A client that sends the commit again takes its own for somebody else's.
            try:
                landed = _landed(store, table, own, since=version)
            except StoreError:
                raise error from None
            if landed:
                return
            if isinstance(error, CommitFailedError) and CONFLICT.search(str(error)):
                raise CommitLost from None
            raise


def _transaction(store: ObjectStore, table: DeltaTable, name: str) -> int | None:
    with _explained(store, table.table_uri):
        return table.transaction_version(name)


def _landed(store: ObjectStore, table: DeltaTable, commit_name: str, *, since: int) -> bool:
    refresh(store, table)
    return any(one.get("commitInfo", {}).get(COMMIT_NAME) == commit_name for one in _actions(store, table, since))


def _actions(store: ObjectStore, table: DeltaTable, since: int) -> Iterator[dict[str, Any]]:
    """What the commits after version `since` say. DeltaTable.history would keep all threads of the process from running
    while it waits for the store (deltalake 1.6)."""
    log = table.table_uri.rstrip("/").rpartition("/")[2] + "/_delta_log"
    for version in range(since + 1, table.version() + 1):
        yield from map(json.loads, store.read(f"{log}/{version:020}.json").splitlines())


@contextlib.contextmanager
def _explained(store: ObjectStore, name: str, *, writing: bool = False) -> Iterator[None]:
    try:
        yield
    except (DeltaError, OSError, pa.ArrowException) as error:
        raise _sentence(error, f"{name} in {store.uri}", writing=writing) from error


def _sentence(error: Exception, what: str, *, writing: bool) -> StoreError:
    """deltalake wraps the server's answer in coloured prose; the S3 error codes in it are what can be relied on."""
    said = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())
    if "NoSuchBucket" in said:
        return NotFound(f"There is no bucket for {what}; check store.uri.")
    if isinstance(error, FileNotFoundError) and not writing:
        return StoreError(
            f"{what}: a file of this version is gone: `wiseline compact` removes what only old versions need; run the "
            "same command again, which reads the newest."
        )
    if isinstance(error, PermissionError) or "lacked the necessary privileges" in said:
        return StoreError(f"{what}: access was refused; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.")
    said = said if len(said) <= MOST_SAID else said[:MOST_SAID] + "…"
    if writing:
        return OutcomeUnknown(
            f"Writing {what} ended without an answer ({said}); run the same command again: rows that did arrive are "
            "recognised."
        )
    return StoreError(f"{what} cannot be read ({said}).")
