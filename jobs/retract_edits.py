"""`wiseline retract`: take one edit back; the next round no longer reaches it."""

from typing import Annotated

import typer

from jobs.options import ConfigOption, JsonOption, SetOption, print_json
from pipeline.config import load_config
from pipeline.errors import NotFound


def retract_command(
    prompt: Annotated[str, typer.Argument(help="The edited prompt.", show_default=False)],
    subject: Annotated[str | None, typer.Option("--subject", help="Its subject, where the edit has one.")] = None,
    author: Annotated[str | None, typer.Option("--author", help="Who takes it back, for the log.")] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_line: JsonOption = False,
) -> None:
    """Take an edit back.

    The retraction is appended to the log; history stays. Many at once: ingest rows with op: retract.
    """
    from pipeline.edits import parse_edit
    from pipeline.storage.edit_log import EditLog
    from pipeline.storage.object_store import open_store

    settings = load_config(config, overrides=set_ or ())
    limit = settings.edits.max_prompt_chars
    fields = {"op": "retract", "prompt": prompt, "subject": subject}
    slot_id = parse_edit(fields, max_prompt_chars=limit, max_target_chars=limit).slot_id
    retracted = EditLog(open_store(settings.store, probe=True)).retract([slot_id], author=author)
    if not retracted:
        raise NotFound(
            f"No live edit asks {prompt!r}{f' about {subject!r}' if subject else ' without a subject'}; name the "
            "prompt and the --subject as they were ingested."
        )
    typer.echo(f"Retracted: {retracted[0].edit.prompt} → {retracted[0].edit.target}. Run `wiseline round` to publish.")
    if json_line:
        print_json({"retracted": [entry.edit.edit_id for entry in retracted]})
