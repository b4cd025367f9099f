"""The options every command shares, and how a command hands its result to a script."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", help="Config file (default: ./ray_config.yaml, if there is one).", show_default=False
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override one config value, such as serve.port=9000; may be repeated."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object, as the last line.")]


def print_json(result: Mapping[str, Any]) -> None:
    """`result` as one line on stdout. It must be the last thing a command prints: scripts read the last line."""
    print(json.dumps(result, ensure_ascii=False), flush=True)
