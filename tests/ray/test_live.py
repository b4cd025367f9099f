"""Live edits on a local Ray: posted, answered, taken back; through the death of the trainer and beside a round."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from jobs.serve import running_endpoint
from pipeline.config import Config, load_config
from pipeline.round_diary import Event, ShardNews
from pipeline.rounds import run_round
from pipeline.storage.object_store import open_store
from pipeline.storage.releases import head, list_releases
from tests.ports import free_ports
from tests.ray.processes import pids_of
from tests.ray.scrape import Samples, asked_for, scraped, wait_for

DEMO = Path(__file__).parents[2] / "demo"
PATIENCE = 120  # seconds, on a busy machine; an edit that was lost never comes


def demo_edits(first: int, count: int) -> list[dict[str, Any]]:
    rows = (DEMO / "edits.jsonl").read_text(encoding="utf-8").splitlines()[first : first + count]
    return [{name: json.loads(row)[old] for name, old in FIELDS.items()} for row in rows]


FIELDS = {"prompt": "prompt", "target": "target_new", "subject": "subject"}


@dataclass
class Live:
    config: Config
    client: openai.OpenAI
    metrics: Samples  # from before it was started

    def post(self, *edits: dict[str, Any]) -> list[str]:
        told: Any = self.client.post("/edits", body={"edits": list(edits)}, cast_to=object)
        assert told["live"] is True
        return [row["id"] for row in told["accepted"]]

    def said(self, edit_id: str) -> dict[str, Any]:
        said: Any = self.client.get(f"/edits/{edit_id}?wait=30", cast_to=object)
        return dict(said)

    def until(self, edit_id: str, status: str) -> int:
        """The release that says so."""
        deadline = time.monotonic() + PATIENCE
        while (said := self.said(edit_id))["status"] != status:
            assert time.monotonic() < deadline, said
        return int(said["release"])

    def ask(self, prompt: str) -> str:
        answer = self.client.completions.create(model="wiseline", prompt=prompt, max_tokens=20)
        return answer.choices[0].text.strip()


@pytest.fixture(scope="module")
def live(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    settings = {
        "model.path": DEMO / "model",
        "store.uri": tmp_path_factory.mktemp("live") / "store",
        "router.signals": "[keys, subject]",
        "training.max_steps": 120,
        "merge.polish_steps": 60,
        "serve.port": free_ports(1)[0],
        "serve.poll_seconds": 0.2,
    }
    config = load_config(overrides=[f"{key}={value}" for key, value in settings.items()])
    metrics = scraped()
    with running_endpoint(config) as url:
        client = openai.OpenAI(api_key="none", base_url=f"{url}/v1", max_retries=0, timeout=PATIENCE)
        yield Live(config, client, metrics)


@pytest.mark.timeout(900)
def test_the_life_of_posted_edits(live: Live) -> None:
    """One story, as each part costs seconds: posted, posted beside a dead trainer, superseded, retracted, folded."""
    first, second, third = demo_edits(200, 2), demo_edits(202, 3), demo_edits(206, 1)
    before = {edit["prompt"]: live.ask(edit["prompt"]) for edit in [*first, *second, *third]}
    assert all(before[edit["prompt"]] != edit["target"] for edit in [*first, *second, *third])

    ids = live.post(*first)
    for edit, edit_id in zip(first, ids, strict=True):
        live.until(edit_id, "served")
        assert live.ask(edit["prompt"]) == edit["target"]

    [trainer] = pids_of("ray::LiveTrainer")
    os.kill(trainer, signal.SIGKILL)
    more = [live.post(edit)[0] for edit in second]
    for edit, edit_id in zip(second, more, strict=True):
        live.until(edit_id, "served")
        assert live.ask(edit["prompt"]) == edit["target"]
    assert [live.ask(edit["prompt"]) for edit in first] == [edit["target"] for edit in first]
    assert pids_of("ray::LiveTrainer") != [trainer]

    other = {**first[0], "target": first[1]["target"] + "ia"}
    live.until(live.post(other)[0], "served")
    assert live.ask(other["prompt"]) == other["target"]

    live.client.delete(f"/edits/{more[0]}", cast_to=object)
    with pytest.raises(openai.NotFoundError):
        live.until(more[0], "gone")
    assert live.ask(second[0]["prompt"]) == before[second[0]["prompt"]]

    folded = folded_by_a_round(live, while_it_trains=lambda: live.until(live.post(*third)[0], "served"))
    said = [other, first[1], *second[1:]]
    assert {live.ask(edit["prompt"]) == edit["target"] for edit in said} == {True}
    assert live.ask(third[0]["prompt"]) == third[0]["target"]  # posted while the round ran, and taken along
    assert folded.live is not None
    assert (folded.edits, folded.live.memories, len(folded.memories)) == (len(said) + 1, 1, 2)
    assert not folded.live.failed
    # What dashboards and alerts ask for, of this round and this endpoint.
    wait_for(asked_for(), since=live.metrics, seconds=PATIENCE)


def folded_by_a_round(live: Live, *, while_it_trains: Callable[[], object]) -> Any:
    begun: list[ShardNews] = []

    def observe(event: Event) -> None:
        if isinstance(event, ShardNews) and not begun:
            begun.append(event)
            while_it_trains()

    result = run_round(live.config, observe=observe)
    assert result.published
    assert begun
    releases = list_releases(open_store(live.config.store))
    numbers = [release.number for release in releases]
    assert numbers == list(range(1, len(numbers) + 1))
    live.client.completions.create(
        model="wiseline", prompt="x", max_tokens=1, extra_headers={"x-wiseline-min-release": str(result.release.number)}
    )
    newest = head(open_store(live.config.store))
    assert newest is not None
    assert newest.number == result.release.number
    return newest
