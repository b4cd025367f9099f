"""`wiseline keys create|list|revoke`: who may use the endpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from jobs.options import ConfigOption, JsonOption, SetOption, print_json
from pipeline.config import load_config
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.serving.keys import Key


def create_command(
    name: Annotated[str, typer.Argument(help="Who will use it; edits are signed with it.", show_default=False)],
    scope: Annotated[
        list[str] | None,
        typer.Option("--scope", help="infer (default), edit or admin; may be repeated. None includes another."),
    ] = None,
    concurrent: Annotated[int | None, typer.Option(min=1, help="Most requests at a time, per replica.")] = None,
    per_minute: Annotated[int | None, typer.Option(min=1, help="Most requests a minute, per replica.")] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_line: JsonOption = False,
) -> None:
    """Make an API key and print it, once.

    serve.keys_file keeps its hash, so a lost key cannot be shown again: revoke it and make another.
    """
    from pipeline.serving.keys import SCOPES, create_key

    wanted = scope or ["infer"]
    if unknown := [one for one in wanted if one not in SCOPES]:
        raise ConfigError(f"There is no scope {unknown[0]}; scopes are {', '.join(SCOPES)}.")
    key, secret = create_key(
        _file(config, set_),
        name=name,
        scopes=[one for one in SCOPES if one in wanted],
        concurrent=concurrent,
        per_minute=per_minute,
    )
    typer.echo(f"Key {key.id} for {name} ({', '.join(key.scopes)}). It is shown only now:")
    typer.echo(secret)
    if json_line:
        print_json({**_as_json(key), "key": secret})


def list_command(config: ConfigOption = None, set_: SetOption = None, json_line: JsonOption = False) -> None:
    """List the keys there are, without the keys themselves."""
    from pipeline.serving.keys import read_keys

    keys = read_keys(_file(config, set_))
    table = Table(box=None, pad_edge=False)
    for title in ("id", "name", "scopes", "at a time", "a minute", "made"):
        table.add_column(title)
    for key in keys:
        limits = ("" if limit is None else str(limit) for limit in (key.concurrent, key.per_minute))
        made = key.created.astimezone().strftime("%Y-%m-%d %H:%M")
        table.add_row(key.id, key.name, ", ".join(key.scopes), *limits, made)
    Console(markup=False).print(table)
    if json_line:
        print_json({"keys": [_as_json(key) for key in keys]})


def revoke_command(
    key_id: Annotated[str, typer.Argument(help="Its id, as `wiseline keys list` shows it.", show_default=False)],
    config: ConfigOption = None,
    set_: SetOption = None,
    json_line: JsonOption = False,
) -> None:
    """Take a key back; running endpoints refuse it from the next request on."""
    from pipeline.serving.keys import revoke_key

    key = revoke_key(_file(config, set_), key_id)
    typer.echo(f"Revoked: {key.id}, {key.name}.")
    if json_line:
        print_json({"revoked": key.id})


def _file(config: Path | None, set_: list[str] | None) -> Path:
    name = load_config(config, overrides=set_ or ()).serve.keys_file
    if name is None:
        raise ConfigError("No file for keys is named; name one in the config, or --set serve.keys_file=keys.json.")
    return Path(name)


def _as_json(key: "Key") -> dict[str, Any]:
    return key.model_dump(mode="json", exclude={"sha256"})
