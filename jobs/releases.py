"""`wiseline releases list|show|rollback`."""

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from jobs.options import ConfigOption, JsonOption, SetOption, print_json
from pipeline.config import load_config

if TYPE_CHECKING:
    from pipeline.storage.object_store import ObjectStore
    from pipeline.storage.releases import Release

NumberArgument = Annotated[int, typer.Argument(help="Number of the release.", min=1, show_default=False)]


def list_command(config: ConfigOption = None, set_: SetOption = None, json_line: JsonOption = False) -> None:
    """List every release, newest first. The head is what endpoints serve: of each base model the newest."""
    from pipeline.storage.releases import describe, list_releases

    store = _store(config, set_)
    newest_first = list_releases(store)[::-1]
    if not newest_first:
        typer.echo(f"Nothing is published in {store.uri} yet; run `wiseline ingest` and `wiseline round`.")
    else:
        table = Table(box=None, pad_edge=False)
        for title in ("release", "published", "edits", "reliab.", ""):
            table.add_column(title, justify="right" if title in ("release", "edits", "reliab.") else "left")
        heads = {(one.model_fingerprint, one.layer): one.number for one in newest_first[::-1]}
        if len(heads) > 1:
            table.add_column("base model")
        for release in newest_first:
            reliability = release.scores.get("reliability")
            table.add_row(
                str(release.number),
                published(store, release),
                str(release.edits),
                "" if reliability is None else f"{reliability:.3f}",
                note(release, head=release.number in heads.values()),
                *([release.model_fingerprint[:8]] if len(heads) > 1 else []),
            )
        Console(markup=False).print(table)
    if json_line:
        print_json({"releases": [describe(store, release) for release in newest_first]})


def show_command(
    number: NumberArgument, config: ConfigOption = None, set_: SetOption = None, json_line: JsonOption = False
) -> None:
    """Show what one release holds and how it was measured."""
    from pipeline.storage.releases import describe, read_release

    store = _store(config, set_)
    release = read_release(store, number)
    grid = Table.grid(padding=(0, 2))
    for name, value in _rows(store, release):
        grid.add_row(name, value)
    Console(markup=False).print(grid)
    if json_line:
        print_json(describe(store, release))


def rollback_command(
    number: NumberArgument, config: ConfigOption = None, set_: SetOption = None, json_line: JsonOption = False
) -> None:
    """Publish an older release again, as the new head.

    Nothing is deleted; endpoints follow within seconds, and rolling back can itself be rolled back. A release is
    followed by endpoints of its base model alone: to go back to an older model, serve that.
    """
    from pipeline.storage.releases import describe, rollback

    store = _store(config, set_, probe=True)
    restored = rollback(store, number)
    typer.echo(f"Release {restored.number} is the new head; it holds what release {number} holds.")
    if json_line:
        print_json(describe(store, restored))


def published(store: "ObjectStore", release: "Release") -> str:
    """When, by the store's clock, in local time."""
    return _moment(store, release).astimezone().strftime("%Y-%m-%d %H:%M")


def note(release: "Release", *, head: bool) -> str:
    restores = "" if release.restores is None else f"restores {release.restores}"
    return ", ".join(part for part in ("head" if head else "", restores) if part)


def _store(config: Path | None, set_: list[str] | None, *, probe: bool = False) -> "ObjectStore":
    from pipeline.storage.object_store import open_store

    return open_store(load_config(config, overrides=set_ or ()).store, probe=probe)


def _rows(store: "ObjectStore", release: "Release") -> list[tuple[str, str]]:
    rows = [
        ("release", str(release.number)),
        ("published", published(store, release)),
        ("round", release.round_id),
        ("log version", str(release.log_version)),
        ("edits", str(release.edits)),
        ("side memories", str(len(release.memories))),
        ("base model", f"{release.model_fingerprint}, layer {release.layer}"),
    ]
    if release.restores is not None:
        rows.append(("restores", f"release {release.restores}"))
    return rows + [(name.replace("_", " "), f"{score:.3f}") for name, score in release.scores.items()]


def _moment(store: "ObjectStore", release: "Release") -> datetime:
    from pipeline.storage.releases import release_path

    return store.modified(release_path(release.number))
