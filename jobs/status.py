"""`wiseline status`: one screen on the store, its edits, the newest release, the round and the endpoint."""

import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from jobs.options import ConfigOption, JsonOption, SetOption, print_json
from jobs.releases import note
from jobs.serve import url_of
from pipeline.config import Config, ModelSection, load_config
from pipeline.errors import ConfigError, UnsupportedModel, WiselineError

if TYPE_CHECKING:
    from pipeline.storage.releases import OfModel, Release
    from pipeline.training.round_state import Finished, Unfinished

ENDPOINT_TIMEOUT_SECONDS = 2
LOOK_SECONDS = 2.0
SILENT_SECONDS = 3600  # a round that wrote nothing for so long was most likely killed
BAR_WIDTH = 10

WatchOption = Annotated[bool, typer.Option("--watch", help="Look again every two seconds, until Ctrl-C.")]


@dataclass(frozen=True)
class Overview:
    """What one look saw. `health` is None where no endpoint answers; `waiting_since`: of the oldest waiting edit."""

    store: str
    log_version: int | None
    living: int
    waiting: int
    waiting_since: datetime | None
    quarantined: int
    head: "Release | None"
    published: datetime | None
    running: "Unfinished | None"
    last: "Finished | None"
    url: str
    health: dict[str, Any] | None


def status_command(
    watch: WatchOption = False, config: ConfigOption = None, set_: SetOption = None, json_line: JsonOption = False
) -> None:
    """Show the store, its edits, the newest release with its scores, the round, and whether the endpoint answers."""
    settings = load_config(config, overrides=set_ or ())
    console = Console(markup=False, highlight=False)
    if watch:
        _watch(settings, console)
        return
    seen = look(settings)
    console.print(screen(seen, now=datetime.now(UTC)))
    if json_line:
        print_json(as_json(seen))


def look(config: Config) -> Overview:
    """Raises StoreError where the store cannot be read."""
    import pyarrow.compute as pc

    from pipeline.storage.bank import decode_bank
    from pipeline.storage.edit_log import EditLog
    from pipeline.storage.object_store import open_store
    from pipeline.storage.releases import head, release_path
    from pipeline.training.round_state import look_at_rounds
    from pipeline.training.waiting import decided, waiting

    store = open_store(config.store)
    model = _model(config.model)
    log, standing = EditLog(store), head(store, model)
    version = log.version()
    newest = log.newest(version)
    bank = decode_bank(store.read(standing.bank.path, sha256=standing.bank.sha256)) if standing else ()
    waits = waiting(newest, bank, decided=decided(store, standing))
    running, last = look_at_rounds(store, model)
    url = url_of(config.serve, config.serve.port)
    return Overview(
        store=store.uri,
        log_version=version,
        living=pc.sum(pc.equal(newest["op"], "upsert")).as_py() or 0,
        waiting=waits.num_rows,
        waiting_since=pc.min(waits["ingested_at"]).as_py(),
        quarantined=log.quarantined(),
        head=standing,
        published=store.modified(release_path(standing.number)) if standing else None,
        running=running,
        last=last,
        url=url,
        health=_health(url),
    )


def _model(section: ModelSection) -> "OfModel | None":
    """Whose release and rounds are shown: the config's model's. Those of all, where it is not a folder here: a look
    fetches nothing."""
    from pipeline.models.base_model import identify
    from pipeline.storage.releases import OfModel

    if not Path(section.path).is_dir():
        return None
    try:
        model = identify(section)
    except UnsupportedModel:
        return None
    return OfModel(model.fingerprint, model.layer)


def screen(seen: Overview, *, now: datetime) -> RenderableType:
    """Fits 60 columns; longer values are wrapped beside their names."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("store", seen.store)
    grid.add_row("edits", "none yet" if seen.log_version is None else f"{seen.living} living, {_waiting(seen, now)}")
    grid.add_row("quarantine", f"{seen.quarantined} rows")
    grid.add_row("release", "nothing published yet" if seen.head is None else _release(seen.head, seen.published, now))
    if seen.head is not None and seen.head.scores:
        scores = [f"{of:.3f} {name.replace('_', ' ')}" for name, of in seen.head.scores.items()]
        grid.add_row("scores", Columns(scores, padding=(0, 2)))
    grid.add_row("round", _round(seen.running, seen.last, now))
    grid.add_row("endpoint", _endpoint(seen))
    grid.add_row("to do", Text(to_do(seen, now), "bold"))
    return grid


def to_do(seen: Overview, now: datetime) -> str:
    if seen.log_version is None:
        return "wiseline ingest FILE"
    if seen.running is not None and (now - seen.running.news).total_seconds() < SILENT_SECONDS:
        return "nothing: a round is running"
    if seen.running is not None:
        return "wiseline round (the last one stopped; what it finished is kept)"
    if seen.last is not None and seen.last.missed and seen.waiting:
        return f"read {seen.last.report.removesuffix('json')}html: a threshold was missed"
    if seen.waiting or seen.head is None:
        return "wiseline round"
    return "nothing"


def as_json(seen: Overview) -> dict[str, Any]:
    running, last = seen.running, seen.last
    return {
        "store": seen.store,
        "log_version": seen.log_version,
        "live_edits": seen.living,
        "waiting": seen.waiting,
        "waiting_since": seen.waiting_since.isoformat() if seen.waiting_since else None,
        "quarantined": seen.quarantined,
        "head": None if seen.head is None else seen.head.model_dump(mode="json"),
        "published": seen.published.isoformat() if seen.published else None,
        "round": {
            "running": {"round_id": running.round_id, "began": running.began.isoformat(), **_states(running)}
            if running
            else None,
            "last": {"round_id": last.round_id, "ended": last.ended.isoformat(), "missed": last.missed}
            if last
            else None,
        },
        "endpoint": {"url": seen.url, "reachable": seen.health is not None, "health": seen.health},
        "to_do": to_do(seen, datetime.now(UTC)),
    }


def _watch(config: Config, console: Console) -> None:
    """A store that is silent is said to be so, and asked again."""
    if not console.is_terminal:
        raise ConfigError("--watch needs a terminal; without one, call `wiseline status --json` as often as you like.")
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            try:
                shown = screen(look(config), now=datetime.now(UTC))
            except WiselineError as error:
                shown = Text(str(error), "red")
            live.update(Group(shown, Text(f"{datetime.now():%H:%M:%S}, every {LOOK_SECONDS:g} s; Ctrl-C ends", "dim")))
            live.refresh()
            time.sleep(LOOK_SECONDS)


def _waiting(seen: Overview, now: datetime) -> str:
    if seen.waiting_since is None:
        return "none waiting"
    return f"{seen.waiting} waiting, the oldest for {_ago(seen.waiting_since, now)}"


def _release(release: "Release", published: datetime | None, now: datetime) -> str:
    what = note(release, head=False)
    kind = what or ("live" if release.live else "")
    age = f", {_ago(published, now)} old" if published else ""
    return f"{release.number}{f' ({kind})' if kind else ''}, {release.edits} edits{age}"


def _round(running: "Unfinished | None", last: "Finished | None", now: datetime) -> RenderableType:
    ended = ""
    if last is not None:
        ended = f"last ended {_ago(last.ended, now)} ago, {'missed a threshold' if last.missed else 'published'}"
    if running is None:
        return Text(ended or "none yet")
    states = _states(running)
    total, trained = len(running.shards), states["trained"]
    phase = "extracting" if states["waiting"] else "training" if trained < total else "merging and judging"
    news = f"{phase} for {_ago(running.began, now)}, news {_ago(running.news, now)} ago"
    shards = f"{trained} of {total} shards trained, {trained + states['extracted']} extracted"
    parts: list[RenderableType] = [Text(news)]
    if total:
        bar = Table.grid(padding=(0, 1))
        bar.add_row(ProgressBar(total=total, completed=trained, width=BAR_WIDTH), Text(shards))
        parts.append(bar)
    return Group(*parts, *([Text(ended, "dim")] if ended else []))


def _states(running: "Unfinished") -> dict[str, int]:
    states = [shard.state for shard in running.shards]
    return {
        "waiting": states.count("waiting"),
        "extracted": states.count("extracted"),
        "trained": states.count("trained"),
    }


def _endpoint(seen: Overview) -> RenderableType:
    if seen.health is None:
        return Text(f"{seen.url} does not answer")
    said = f"{seen.url}, release {seen.health['release']}"
    trouble = seen.health["follower"]["error"]
    return Text(said) if not trouble else Group(Text(said), Text(trouble, "red"))


def _ago(moment: datetime, now: datetime) -> str:
    seconds = max(0, int((now - moment).total_seconds()))
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def _health(url: str) -> dict[str, Any] | None:
    """What the endpoint says about itself, also when it is unwell; None when no wiseline answers there."""
    try:
        with urllib.request.urlopen(f"{url}/healthz", timeout=ENDPOINT_TIMEOUT_SECONDS) as response:
            said = response.read()
    except urllib.error.HTTPError as error:
        said = error.read()
    except (OSError, ValueError, HTTPException):
        return None
    try:
        health = json.loads(said)
    except ValueError:
        return None
    return health if isinstance(health, dict) and {"release", "follower"} <= health.keys() else None
