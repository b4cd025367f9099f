"""`wiseline`: every job as a command. Each job module exports its command; this file only lists them."""

import json
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, NoReturn

import typer

from jobs.ask import ask_command
from jobs.capability import capability_command
from jobs.compact_log import compact_command
from jobs.evaluate import evaluate_command
from jobs.export import export_command
from jobs.ingest_edits import ingest_command
from jobs.keys import create_command, revoke_command
from jobs.keys import list_command as list_keys_command
from jobs.releases import list_command, rollback_command, show_command
from jobs.retract_edits import retract_command
from jobs.run_round import round_command
from jobs.schedule import schedule_command
from jobs.serve import serve_command
from jobs.status import status_command
from jobs.submit import submit_command
from pipeline.errors import WiselineError

TRACEBACK_VARIABLE = "WISELINE_TRACEBACK"

app = typer.Typer(
    name="wiseline",
    help="Keep a deployed language model current: edits in, a routed model served.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
releases = typer.Typer(help="List, show and roll back releases.", no_args_is_help=True)

api_keys = typer.Typer(help="Make, list and revoke the endpoint's API keys.", no_args_is_help=True)

app.command("ingest")(ingest_command)
app.command("retract")(retract_command)
app.command("compact")(compact_command)
app.command("round")(round_command)
app.command("evaluate")(evaluate_command)
app.command("capability")(capability_command)
app.command("serve")(serve_command)
app.command("ask")(ask_command)
app.command("export")(export_command)
app.command("status")(status_command)
app.command("schedule")(schedule_command)
app.command("submit", context_settings={"allow_interspersed_args": False})(submit_command)
app.add_typer(releases, name="releases")
releases.command("list")(list_command)
releases.command("show")(show_command)
releases.command("rollback")(rollback_command)
app.add_typer(api_keys, name="keys")
api_keys.command("create")(create_command)
api_keys.command("list")(list_keys_command)
api_keys.command("revoke")(revoke_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            print(f"wiseline {version('wiseline')}")
        except PackageNotFoundError:  # run from a checkout that is not installed
            print("wiseline (not installed)")
        raise typer.Exit


@app.callback()
def wiseline(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run one command. What the user can put right is one sentence on stderr and exit code 1, never a traceback;
    with --json the sentence is also the last line on stdout, as {"error": …}."""
    try:
        app()
    except WiselineError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        lines = str(error).strip().splitlines() or [""]
        _fail(
            f"Unexpected {type(error).__name__}: {lines[0]} (set {TRACEBACK_VARIABLE}=1 to see where; please report it)"
        )


def _fail(sentence: str) -> NoReturn:
    # A prompt from the command line may hold bytes that are no text; they are shown escaped.
    sentence = sentence.encode("utf-8", "backslashreplace").decode()
    print(f"wiseline: {sentence}", file=sys.stderr)
    if "--json" in sys.argv:
        print(json.dumps({"error": sentence}, ensure_ascii=False))
    sys.exit(1)


if __name__ == "__main__":
    main()
