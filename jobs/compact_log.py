"""`wiseline compact`: the edit log in few large files; what it says stays."""

from typing import Annotated

import typer

from jobs.options import ConfigOption, JsonOption, SetOption, print_json
from pipeline.config import load_config


def compact_command(
    keep_hours: Annotated[
        int,
        typer.Option(min=24, help="Files that a version younger than this needs are kept, for rounds that read it."),
    ] = 168,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_line: JsonOption = False,
) -> None:
    """Join the small files of the edit log.

    Every ingest leaves a file or more. Files that only older versions need are removed, and those
    of ingests that were killed. Safe beside ingests and rounds that take less than --keep-hours.
    """
    from pipeline.storage.edit_log import EditLog
    from pipeline.storage.object_store import open_store

    removed = EditLog(open_store(load_config(config, overrides=set_ or ()).store)).compact(keep_hours=keep_hours)
    typer.echo(f"The log is compact; {removed} file{'s were' if removed != 1 else ' was'} removed.")
    if json_line:
        print_json({"removed": removed})
