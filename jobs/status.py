"""`wiseline status`: one screen on the store, the head release and the endpoint."""

import json
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from jobs.options import ConfigOption, JsonOption, SetOption, print_json
from jobs.releases import note, published
from jobs.serve import url_of
from pipeline.config import load_config

if TYPE_CHECKING:
    from pipeline.storage.releases import Release

ENDPOINT_TIMEOUT_SECONDS = 2


def status_command(config: ConfigOption = None, set_: SetOption = None, json_line: JsonOption = False) -> None:
    """Show the store, the head release with its scores, and whether the endpoint answers."""
    from pipeline.storage.edit_log import EditLog
    from pipeline.storage.object_store import open_store
    from pipeline.storage.releases import head, newest_of_a_round

    settings = load_config(config, overrides=set_ or ())
    store = open_store(settings.store)
    log = EditLog(store)
    version = log.version()
    live = sum(op == "upsert" for _, op in log.slots(version).values())
    quarantined = len(log.quarantine())
    release, newest = head(store), newest_of_a_round(store)
    url = url_of(settings.serve, settings.serve.port)
    health = _health(url)

    grid = Table.grid(padding=(0, 2))
    grid.add_row("store", store.uri)
    grid.add_row("edit log", "empty" if version is None else f"version {version}, {live} live edits")
    grid.add_row("quarantine", f"{quarantined} rows")
    grid.add_row("head", "nothing published yet" if release is None else _head(release, published(store, release)))
    for name, score in ({} if release is None else release.scores).items():
        grid.add_row(f"  {name.replace('_', ' ')}", f"{score:.3f}")
    grid.add_row("to do", _to_do(version, None if newest is None else newest.log_version))
    grid.add_row("endpoint", f"{url} does not answer" if health is None else f"{url}, release {health['release']}")
    if health is not None and health["follower"]["error"]:
        grid.add_row("", health["follower"]["error"])
    Console(markup=False).print(grid)
    if json_line:
        print_json(
            {
                "store": store.uri,
                "log_version": version,
                "live_edits": live,
                "quarantined": quarantined,
                "head": None if release is None else release.model_dump(mode="json"),
                "endpoint": {"url": url, "reachable": health is not None, "health": health},
            }
        )


def _head(release: "Release", when: str) -> str:
    what = note(release, head=False)
    return f"release {release.number}{f' ({what})' if what else ''}, {release.edits} edits, {when}"


def _to_do(version: int | None, trained: int | None) -> str:
    """`trained`: the log version of the newest release that a round published; a rollback does not count."""
    if version is None:
        return "wiseline ingest FILE"
    if trained is None or trained < version:
        return "wiseline round (the log has moved on)"
    return "nothing"


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
