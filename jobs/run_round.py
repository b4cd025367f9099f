"""`wiseline round`: what the log has gained becomes a release, or a report on why it does not."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jobs.options import ConfigOption, JsonOption, SetOption, print_json
from pipeline.config import Config, load_config
from pipeline.errors import GateFailed

if TYPE_CHECKING:
    from pipeline.rounds import RoundResult

SHOWN_FAILURES = 10


def round_command(
    step: Annotated[
        str | None, typer.Option(help="Take this step alone: plan, train, merge, evaluate or publish.")
    ] = None,
    round_id: Annotated[str | None, typer.Option("--round", help="With --step: the round that `plan` named.")] = None,
    shard: Annotated[
        list[int] | None, typer.Option(help="With --step train: this shard alone; may be repeated.")
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_line: JsonOption = False,
) -> None:
    """Train what is new in the edit log, evaluate it, and publish a release.

    Nothing is published when a threshold of the config is missed. A round that
    was interrupted is simply run again: finished shards are not trained twice.

    With --step a workflow engine drives it: `--step plan` prints the round and
    the numbers of its shards as JSON, the others take them. Each may be repeated.
    """
    # Ray and torch take seconds to import; `wiseline --help` must not wait for them.
    from jobs.round_progress import RoundProgress
    from pipeline.actors.cluster import connect
    from pipeline.rounds import run_round

    settings = load_config(config, overrides=set_ or ())
    if step is not None or round_id is not None or shard:
        from jobs.round_step import take_step

        try:
            take_step(settings, step, round_id, shard or None, json_line=json_line)
        except GateFailed as failed:
            _show_failures(failed)
            raise
        return
    started = time.monotonic()
    try:
        if settings.observe.logs == "json":  # the log says it, also what happens before workers are needed
            connect(settings.resources, logs="json")
            result = run_round(settings)
        else:
            with RoundProgress() as progress:
                result = run_round(settings, observe=progress)
    except GateFailed as failed:
        _show_failures(failed)
        raise
    summary = summarise(result, settings, seconds=time.monotonic() - started)
    show_summary(summary)
    if json_line:
        print_json(summary)


def summarise(result: "RoundResult", config: Config, *, seconds: float) -> dict[str, Any]:
    """What --json prints. When nothing changed there is no report, and release and scores are those that stand."""
    shards = result.report.get("shards", [])
    reused = sum(shard["reused"] for shard in shards)
    return {
        "round_id": result.release.round_id,
        "release": result.release.number,
        "published": result.published,
        "scores": result.release.scores,
        "shards_trained": len(shards) - reused,
        "shards_reused": reused,
        "too_long": len(result.report.get("too_long", [])),
        "seconds": round(seconds, 3),
        "report": None if result.report_path is None else _address(config.store.uri, result.report_path),
    }


def _address(uri: str, path: str) -> str:
    """Where a person opens the object: the file itself when the store is a folder."""
    from pipeline.storage.local_disk import local_path

    return f"{uri.rstrip('/')}/{path}" if uri.startswith("s3://") else str(local_path(uri) / path)


def show_summary(summary: Mapping[str, Any]) -> None:
    console = Console(highlight=False)
    if not summary["published"]:
        console.print(f"Nothing changed since release {summary['release']}.")
        return
    grid = Table.grid(padding=(0, 2))
    for name, score in summary["scores"].items():
        grid.add_row(name.replace("_", " "), f"{score:.3f}")
    console.print(grid)
    console.print(f"[bold]Release {summary['release']}[/bold] published in {summary['seconds']:.1f} s")
    console.print(f"Shards trained: {summary['shards_trained']}, reused: {summary['shards_reused']}")
    if summary["too_long"]:
        console.print(f"Left out: {summary['too_long']} edits too long for the model's context, see the report")
    console.print(f"Report: {escape(summary['report'])}", soft_wrap=True)


def _show_failures(failed: GateFailed) -> None:
    console = Console(highlight=False)
    for sentence in failed.failures[:SHOWN_FAILURES]:
        console.print(f"  {sentence}", markup=False, soft_wrap=True)
    left_out = len(failed.failures) - SHOWN_FAILURES
    if left_out > 0:
        console.print(f"  and {left_out} more, see the report")
