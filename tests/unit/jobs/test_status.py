"""The screen of `wiseline status`, at the widths of terminals, and what it says there is to do."""

import io
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from rich.console import Console

from jobs.status import Overview, look, screen, to_do
from pipeline.config import load_config
from pipeline.models.base_model import load_base_model
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.releases import ObjectRef, Release
from pipeline.training.round_state import Finished, ShardSeen, Unfinished
from tests.tiny_world import publish_release, save_model

NOW = datetime(2026, 11, 21, 3, 0, tzinfo=UTC)
THING = ObjectRef(path="banks/0.parquet", sha256="0" * 64)
RELEASE = Release(
    number=12,
    parent=11,
    round_id="308ee218e6217a753b7813ac",
    log_version=7,
    model_fingerprint="9d3c",
    layer=3,
    memories=(),
    router=THING,
    bank=THING,
    edits=1_240,
    scores={
        "reliability": 0.997,
        "reliability_chat": 0.996,
        "generalization": 0.991,
        "locality": 1.0,
        "locality_same_relation": 1.0,
        "locality_same_subject": 0.999,
        "locality_unrelated": 1.0,
    },
)
STATES = ["trained"] * 5 + ["extracted"] * 7
RUNNING = Unfinished(
    "f3a1",
    began=NOW - timedelta(minutes=9),
    news=NOW - timedelta(seconds=4),
    shards=tuple(ShardSeen(place // 2, place % 2, 80, state) for place, state in enumerate(STATES)),  # type: ignore[arg-type]
)
LAST = Finished(
    "308e", ended=NOW - timedelta(hours=25), missed=False, report="rounds/308e/20261120T020000000000/report.json"
)
SEEN = Overview(
    store="s3://a-bucket-with-a-long-name/and-a-long-prefix/wiseline/production",
    log_version=7,
    living=1_243,
    waiting=3,
    waiting_since=NOW - timedelta(hours=5),
    quarantined=17,
    head=RELEASE,
    published=NOW - timedelta(hours=25),
    running=RUNNING,
    last=LAST,
    url="http://127.0.0.1:8000",
    health={"release": 11, "follower": {"error": "Release 12 is not used: banks/0.parquet differs from its checksum."}},
)
EMPTY = Overview(
    store=".wiseline/store", log_version=None, living=0, waiting=0, waiting_since=None, quarantined=0, head=None,
    published=None, running=None, last=None, url="http://127.0.0.1:8000", health=None,
)  # fmt: skip


def drawn(seen: Overview, width: int) -> list[str]:
    console = Console(file=io.StringIO(), force_terminal=False, width=width, markup=False)
    console.print(screen(seen, now=NOW))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize("seen", [SEEN, EMPTY, replace(SEEN, running=None)], ids=["running", "empty", "idle"])
def test_it_is_one_screen(seen: Overview, width: int) -> None:
    lines = drawn(seen, width)
    assert max(map(len, lines)) <= width
    assert len(lines) <= 20
    assert "…" not in "".join(lines)  # nothing is cut


def test_it_says_what_was_seen() -> None:
    text = " ".join(" ".join(drawn(SEEN, 200)).split())
    for part in (
        "1243 living, 3 waiting, the oldest for 5 h",
        "12, 1240 edits, 25 h old",
        "0.997 reliability",
        "training for 9 min, news 4 s ago",
        "5 of 12 shards trained, 12 extracted",
        "last ended 25 h ago, published",
        "release 11",
        "differs from its checksum",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (EMPTY, "wiseline ingest FILE"),
        (replace(SEEN, running=None), "wiseline round"),
        (replace(SEEN, running=None, waiting=0, waiting_since=None), "nothing"),
        (replace(EMPTY, log_version=1, living=2, waiting=2), "wiseline round"),
        (SEEN, "nothing: a round is running"),
        (replace(SEEN, running=replace(RUNNING, news=NOW - timedelta(hours=2))), "wiseline round (the last one"),
        (replace(SEEN, running=None, last=replace(LAST, missed=True)), f"read {LAST.report[:-5]}.html"),
    ],
)
def test_what_there_is_to_do(seen: Overview, expected: str) -> None:
    assert to_do(seen, NOW).startswith(expected)


def test_the_configured_models_release_and_rounds_are_looked_at(tmp_path: Path) -> None:
    mine, other = (save_model(tmp_path / name, seed=seed) for name, seed in (("mine", 1), ("other", 2)))
    store = ObjectStore(str(tmp_path / "store"))
    for path in (mine, other):
        publish_release(
            store, load_base_model(load_config(overrides=[f"model.path={path}"]).model), prompts=["A"], seed=1
        )
    for path, number in ((mine, 1), (other, 2), (tmp_path / "not-here", 2)):
        seen = look(load_config(overrides=[f"model.path={path}", f"store.uri={tmp_path / 'store'}"]))
        assert seen.head is not None and seen.head.number == number
