"""Whole rounds on a local Ray: resumed rounds give the same bytes, unchanged shards are not trained again, one of two
publishers wins, and a round that misses its gate publishes nothing."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pipeline import round_steps
from pipeline.actors.worker_pool import WorkerPool
from pipeline.config import Config, load_config
from pipeline.errors import GateFailed, RoundConflict, UnsupportedModel, WiselineError
from pipeline.models.base_model import BaseModel, load_base_model
from pipeline.models.generate import GenerationRequest, generate
from pipeline.models.loaded_release import LoadedRelease, load_release
from pipeline.models.prompts import plain_prompt_ids
from pipeline.round_diary import Event, ShardNews
from pipeline.rounds import run_round
from pipeline.storage.object_store import ObjectStore, open_store
from pipeline.storage.releases import ObjectRef, head, publish, release_numbers, release_path, rollback
from pipeline.training.planning import MemoryPlan
from tests.ray.processes import pids_of
from tests.tiny_world import save_model

pytestmark = pytest.mark.usefixtures("local_ray")

LETTERS = "abcdefghijkl"
Configure = Callable[..., Config]
SETTINGS = [
    "model.layer=0",
    "shards.edits_per_shard=3",
    "shards.shards_per_memory=2",
    "shards.density=0.5",
    "training.max_steps=300",
    "training.stop_loss=0.5",
    "training.prefixes=1",
    "router.signals=[keys, subject]",  # the encoder would be loaded by every worker; other tests' rounds have it
    # A random model's states say little, so this gate is as low as it goes; the mechanism is what is tested here.
    "round.min_reliability=0",
    "round.min_generalization=0",
    "round.min_locality=0",
]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), chat=False)


@pytest.fixture
def configure(model_folder: Path, tmp_path: Path) -> Configure:
    def build(*overrides: str, store: str = "store") -> Config:
        return config_of(model_folder, tmp_path / store, *overrides)

    return build


def config_of(model: Path, store: Path, *overrides: str) -> Config:
    return load_config(overrides=[f"model.path={model}", f"store.uri={store}", *SETTINGS, *overrides])


@pytest.fixture(scope="module")
def undisturbed(local_ray: None, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished round over LETTERS, in which every stage started its own workers."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = config_of(model_folder, folder / "store", "resources.stages=apart")
    ingest(config, edits(LETTERS), folder, "first")
    assert run_round(config).published
    return config


def ingest(config: Config, rows: Sequence[dict[str, object]], tmp_path: Path, name: str) -> None:
    from jobs.ingest_edits import ingest as run

    file = tmp_path / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(config, [str(file)])


def edits(names: str, target: str = "new") -> list[dict[str, object]]:
    return [{"prompt": f"Who leads company {name}?", "target": target, "subject": f"company {name}"} for name in names]


def trained(config: Config) -> tuple[list[str], list[str]]:
    """Digests of the shards a round trained, and of those it found."""
    news: list[Event] = []
    run_round(config, observe=news.append)
    shards = [event for event in news if isinstance(event, ShardNews) and event.progress is None]
    return [s.shard.digest for s in shards if not s.reused], [s.shard.digest for s in shards if s.reused]


def release_bytes(config: Config) -> dict[str, bytes]:
    """Manifest and everything it names."""
    store = open_store(config.store)
    release = head(store)
    assert release is not None
    return {path: store.read(path) for path in [release_path(release.number), *(item.path for item in release.objects)]}


def test_the_life_of_a_store(configure: Configure, tmp_path: Path) -> None:
    """Published, nothing new, one edit taken back, rolled back, everything taken back."""
    config = configure()
    store, base = open_store(config.store), load_base_model(config.model)
    prompts = [str(edit["prompt"]) for edit in edits(LETTERS[:4])]

    ingest(config, edits(LETTERS[:4]), tmp_path, "first")
    result = run_round(config)
    assert result.published
    assert (result.release.number, result.release.parent, result.release.edits) == (1, None, 4)
    assert result.release.scores["reliability"] == 1.0
    loaded = load_release(store, result.release, base)
    assert answers(base, loaded, prompts) == ["new"] * 4
    assert answers(base, None, prompts) != ["new"] * 4
    report = json.loads(store.read(str(result.report_path).replace("report.html", "report.json")))
    assert report["outcome"] == "published"
    assert {shard["edits"] for shard in report["shards"]} == {2}

    again = run_round(config)
    assert not again.published
    ingest(config, [*edits("a"), *edits("a")], tmp_path, "nothing new, in another file")
    assert not run_round(config).published
    assert release_numbers(store) == [1]

    ingest(config, [{"op": "retract", "prompt": prompts[1], "subject": "company b"}], tmp_path, "second")
    second = run_round(config)
    assert second.release.edits == 3
    loaded = load_release(store, second.release, base)
    assert sorted(str(entry.subject) for entry in loaded.entries) == ["company a", "company c", "company d"]

    rollback(store, 1)
    assert not run_round(config).published, "an operator's rollback stands until the log has news"
    assert release_numbers(store) == [1, 2, 3]

    retractions = [{"op": "retract", "prompt": edit["prompt"], "subject": edit["subject"]} for edit in edits("acd")]
    ingest(config, retractions, tmp_path, "third")
    last = run_round(config)
    assert (last.release.number, last.release.edits, last.release.memories) == (4, 0, ())
    assert answers(base, load_release(store, last.release, base), prompts) == answers(base, None, prompts)


def answers(base: BaseModel, release: LoadedRelease | None, prompts: Sequence[str]) -> list[str]:
    requests = [
        GenerationRequest(prompt_ids=plain_prompt_ids(prompt, base.tokenizer), text=prompt, max_new_tokens=6)
        for prompt in prompts
    ]
    return generate(base, release, requests)[0]


def test_only_the_newest_memory_is_trained_when_edits_arrive(configure: Configure, tmp_path: Path) -> None:
    config = configure()
    ingest(config, edits(LETTERS[:7]), tmp_path, "first")  # memories of 6: one sealed, one with a single edit
    first, _ = trained(config)
    assert len(first) == 3
    ingest(config, edits(LETTERS[7]), tmp_path, "second")
    second, reused = trained(config)
    assert len(second) == 2
    assert len(reused) == 2
    assert set(reused) < set(first)
    assert head(open_store(config.store)).number == 2  # type: ignore[union-attr]


def test_a_missed_gate_publishes_nothing_and_names_the_edits(configure: Configure, tmp_path: Path) -> None:
    config = configure("round.min_reliability=1", "training.max_steps=1", "merge.polish_steps=0")
    ingest(config, edits("abc"), tmp_path, "first")
    with pytest.raises(GateFailed, match=r"reliability 0\.\d+ is below round\.min_reliability") as caught:
        run_round(config)
    assert any("Who leads company a?" in failure for failure in caught.value.failures)
    assert head(open_store(config.store)) is None
    told: list[Event] = []
    with pytest.raises(GateFailed, match="to judge it again, remove rounds/") as again:
        run_round(config, observe=told.append)
    assert again.value.failures == caught.value.failures
    assert [getattr(event, "name", "") for event in told] == ["plan"]


def test_what_does_not_hold_when_merged_gets_a_second_attempt(configure: Configure, tmp_path: Path) -> None:
    """Shards that hardly trained give a memory in which nothing holds; polishing it publishes what the gate refused."""
    config = configure("round.min_reliability=1", "training.max_steps=1", "merge.polish_steps=300")
    ingest(config, edits("abc"), tmp_path, "first")
    result = run_round(config)
    assert result.published
    (polish,) = result.report["polish"]
    assert polish["held_merged"] < polish["held_polished"]


def test_a_memory_of_more_shards_than_the_cluster_has_room_for_is_merged(configure: Configure, tmp_path: Path) -> None:
    """Two CPUs hold eight trainers and nothing else; the merge between training and polish must not wait for one."""
    config = configure("shards.edits_per_shard=1", "shards.shards_per_memory=9", "shards.density=auto")
    ingest(config, edits(LETTERS[:9]), tmp_path, "first")
    result = run_round(config)
    assert (len(result.report["shards"]), result.report["memories"]) == (9, 1)


def test_a_merge_does_not_wait_for_the_router(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both workers trained; one of them may still fit the router when the only memory is merged."""
    pools: list[tuple[int, int]] = []
    merge = round_steps.merge_memories

    def seen(pool: WorkerPool, memories: Sequence[MemoryPlan]) -> list[ObjectRef]:
        pools.append((len(memories), len(pool.workers)))
        return merge(pool, memories)

    monkeypatch.setattr(round_steps, "merge_memories", seen)
    config = configure()
    ingest(config, edits(LETTERS[:4]), tmp_path, "first")
    assert run_round(config).published
    assert pools == [(1, 2)]


def test_of_two_rounds_at_once_one_publishes(configure: Configure, tmp_path: Path) -> None:
    config = configure()
    ingest(config, edits("ab"), tmp_path, "first")

    def another_round_is_faster(event: Event) -> None:
        if getattr(event, "name", "") == "extract":  # long before this round publishes
            store = open_store(config.store)
            finished = open_store(other.store)
            release = head(finished)
            assert release is not None
            for item in release.objects:
                store.put(item.path, finished.read(item.path))
            publish(store, release)

    other = configure(store="other")
    ingest(other, edits("ab"), tmp_path, "first")
    run_round(other)
    with pytest.raises(RoundConflict, match="run the round again"):
        run_round(config, observe=another_round_is_faster)
    assert release_numbers(open_store(config.store)) == [1]


@pytest.mark.timeout(900)
def test_a_round_killed_half_way_ends_with_the_same_bytes(
    configure: Configure, undisturbed: Config, tmp_path: Path
) -> None:
    """The driver is killed with SIGKILL as soon as its first shard is finished; the next run trains only the others."""
    killed = configure()
    ingest(killed, edits(LETTERS), tmp_path, "first")
    finished = _kill_after_first_shard(killed, tmp_path)
    assert 1 <= len(finished) < 4
    second, reused = trained(killed)
    assert set(reused) >= finished
    assert set(second).isdisjoint(finished)
    assert set(second) | set(reused) == _finished(open_store(undisturbed.store))
    assert release_bytes(killed) == release_bytes(undisturbed)


def _kill_after_first_shard(config: Config, tmp_path: Path) -> set[str]:
    """Digests whose delta was in the store when the driver died."""
    (tmp_path / "config.json").write_text(config.model_copy(update={"resources": _slow(config)}).model_dump_json())
    program = """
import os, signal, sys
from pipeline.config import Config
from pipeline.round_diary import ShardNews
from pipeline.rounds import run_round

def die(event):
    if isinstance(event, ShardNews) and event.progress is None:
        os.killpg(0, signal.SIGKILL)

run_round(Config.model_validate_json(open(sys.argv[1]).read()), observe=die)
"""
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "RAY_AUTH_MODE": "disabled"}
    driver = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "config.json")], env=environment, start_new_session=True
    )
    try:
        assert driver.wait(timeout=240) == -signal.SIGKILL
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(driver.pid, signal.SIGKILL)
    time.sleep(2)  # its actors notice that the driver is gone
    return _finished(open_store(config.store))


def _finished(store: ObjectStore) -> set[str]:
    return {path.split("/")[1] for path in store.list("shards") if path.endswith("/delta.parquet")}


def _slow(config: Config) -> object:
    """One trainer at a time, so that there is something left to do after the first shard."""
    return config.resources.model_copy(update={"cpus_per_trainer": 2.0})


def test_a_worker_that_dies_is_restarted(configure: Configure, undisturbed: Config, tmp_path: Path) -> None:
    """And the release has the bytes of the undisturbed round."""
    config = configure()
    ingest(config, edits(LETTERS), tmp_path, "first")
    killed: list[int] = []

    def kill_a_worker(event: Event) -> None:
        if not isinstance(event, ShardNews) or event.progress is None or killed:
            return
        if pids := pids_of("ray::Worker.train"):  # else this shard has just ended; another follows
            os.kill(pids[0], signal.SIGKILL)
            killed.append(pids[0])

    assert run_round(config, observe=kill_a_worker).published
    assert killed
    assert release_bytes(config) == release_bytes(undisturbed)


def test_user_mistakes_are_one_sentence(configure: Configure, tmp_path: Path) -> None:
    with pytest.raises(WiselineError, match="wiseline ingest"):
        run_round(configure())
    with pytest.raises(UnsupportedModel, match="neither a folder here nor a hub model"):
        run_round(configure("model.path=./no-such-model"))
    with pytest.raises(UnsupportedModel, match="layers of this model are 0 to 1"):
        run_round(configure("model.layer=7"))
