"""`wiseline ingest`: edits from files into the log, refused rows into quarantine."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jobs.options import ConfigOption, JsonOption, SetOption, print_json
from pipeline.config import Config, load_config
from pipeline.metrics import record

# Refused rows that the report names; all of them are in quarantine/.
SHOWN_REJECTIONS = 5


@dataclass(frozen=True)
class RejectedRow:
    source: str
    row: int
    reason: str


@dataclass(frozen=True)
class IngestReport:
    """Each of `rows` is one of ingested, unchanged, duplicates and quarantined.

    `superseded` and `retracted` say how many of the ingested replaced or removed an earlier edit; `log_version` names
    the log as it is now; `refused` holds the first few refused rows.
    """

    files: int
    rows: int
    ingested: int
    unchanged: int
    superseded: int
    duplicates: int
    quarantined: int
    retracted: int
    log_version: int | None
    refused: tuple[RejectedRow, ...] = ()


def ingest_command(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH...", help="JSONL, JSON, CSV or Parquet: files, folders, patterns or s3:// addresses."
        ),
    ],
    again: Annotated[
        bool, typer.Option("--again", help="Let rows speak that were read before: restores older answers.")
    ] = False,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_line: JsonOption = False,
) -> None:
    """Read edits into the log.

    Good rows land in edits/, bad ones in quarantine/ with the reason. Reading a file again
    changes nothing; to restore the older answers it holds, say --again.
    """
    report = ingest(load_config(config, overrides=set_ or ()), paths, again=again)
    show_report(report)
    if json_line:
        print_json(asdict(report))


def ingest(config: Config, paths: Sequence[str], *, again: bool = False) -> IngestReport:
    """Append what is new in the files to the edit log, in one commit, and say what each row was; connects to Ray if
    need be.

    Raises WiselineError before anything is written when a file is missing or unreadable or the store is not safe to
    write to. Every step may be repeated: after a crash or OutcomeUnknown the same call ends as if nothing had happened.
    """
    from pipeline.actors.cluster import connect
    from pipeline.actors.ingestor import find_files, read_batches
    from pipeline.storage.edit_log import EditLog
    from pipeline.storage.object_store import open_store

    sources = find_files(paths, s3_endpoint_url=config.store.s3_endpoint_url)
    log = EditLog(open_store(config.store, probe=True))
    connect(config.resources, logs=config.observe.logs)
    refused: list[RejectedRow] = []
    with log.appending(again=again) as stream:
        for batch in read_batches(sources, config.edits):
            stream.add(batch)
            room = SHOWN_REJECTIONS - len(refused)
            refused += [RejectedRow(batch.source, bad.row, bad.reason) for bad in batch.rejections[:room]]
        counts = stream.commit()
    for outcome in ("ingested", "unchanged", "duplicates", "quarantined"):
        record("wiseline_rows_total", getattr(counts, outcome), outcome=outcome)
    return IngestReport(
        files=len(sources),
        rows=counts.rows,
        **asdict(counts),
        log_version=log.version(),
        refused=tuple(refused),
    )


def show_report(report: IngestReport) -> None:
    console = Console(highlight=False)
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right")
    table.add_column()
    table.add_row(f"[bold]{report.rows}[/bold]", f"rows in {report.files} file{'s' if report.files != 1 else ''}")
    meanings = {
        "ingested": f"new in the log: {report.superseded} superseded an edit, {report.retracted} retracted one",
        "unchanged": "said nothing new",
        "duplicates": "repeated an earlier row",
        "quarantined": "refused, see quarantine/",
    }
    for name, meaning in meanings.items():
        table.add_row(str(getattr(report, name)), f"{name} [dim]({meaning})[/dim]")
    console.print(table)
    for bad in report.refused:
        console.print(f"  {escape(bad.source)}, row {bad.row}: {escape(bad.reason)}", soft_wrap=True)
    if report.quarantined > len(report.refused):
        console.print(f"  and {report.quarantined - len(report.refused)} more")
