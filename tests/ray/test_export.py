"""A trained release out of the store and into transformers: edits, paraphrases and neighbours, asked through
`model.generate(**tokenizer(…))`, are answered to the token as wiseline itself answers them."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs.ingest_edits import ingest
from pipeline.config import Config, load_config
from pipeline.export.releases import export_release
from pipeline.models.base_model import BaseModel, load_base_model
from pipeline.models.generate import GenerationRequest, generate
from pipeline.models.loaded_release import load_release
from pipeline.models.prompts import chat_prompt_ids, plain_prompt_ids
from pipeline.rounds import run_round
from pipeline.storage.object_store import open_store
from pipeline.storage.releases import Release

pytestmark = pytest.mark.usefixtures("local_ray")

DEMO = Path(__file__).parents[2] / "demo"
EDITS, TOKENS = 12, 12
SETTINGS = (
    "shards.edits_per_shard=3",
    "shards.shards_per_memory=2",
    "training.prefixes=1",
    "training.max_steps=60",
    "merge.polish_steps=0",
    "round.min_reliability=0.5",
    "round.min_generalization=0",
    "round.min_locality=0",
)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DEMO / "edits.jsonl").read_text().splitlines()[:EDITS]]


@pytest.fixture(scope="module")
def config(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("world")
    file = folder / "edits.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load_config(overrides=[f"model.path={DEMO / 'model'}", f"store.uri={folder / 'store'}", *SETTINGS])
    ingest(config, [str(file)])
    return config


@pytest.fixture(scope="module")
def release(config: Config, local_ray: None) -> Release:
    return run_round(config).release


def test_the_demos_questions_get_the_same_tokens(
    config: Config, release: Release, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    assert len(release.memories) == 2
    store, base = open_store(config.store), load_base_model(config.model)
    export_release(store, release, config.model, format="hf", to=tmp_path / "hf", tolerance=0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    edits = [row["prompt"] for row in rows]
    others = [text for row in rows for text in (*row["paraphrases"], *(local["prompt"] for local in row["locality"]))]
    asked = [(plain_prompt_ids(text, base.tokenizer), text) for text in (*edits, *others)]
    answers = theirs(model, tokenizer, tokenizer([*edits, *others], padding=True, return_tensors="pt"))
    wanted, decisions = own(base, load_release(store, release, base), asked)
    assert answers == wanted
    reached = [(decision.memory, decision.edit_id) for decision in decisions]
    assert [(decision.memory, decision.edit_id) for decision in model.decisions] == reached
    assert {decision.memory for decision in decisions} == {None, 0, 1}

    chats = [[{"role": "user", "content": text}] for text in edits]
    asked = [(chat_prompt_ids(chat, base.tokenizer), text) for chat, text in zip(chats, edits, strict=True)]
    options = {"add_generation_prompt": True, "padding": True, "return_tensors": "pt", "return_dict": True}
    answers = theirs(model, tokenizer, tokenizer.apply_chat_template(chats, **options))
    assert answers == own(base, load_release(store, release, base), asked)[0]


def theirs(model: Any, tokenizer: Any, inputs: Any) -> list[str]:
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def own(base: BaseModel, loaded: Any, asked: list[tuple[tuple[int, ...], str]]) -> tuple[list[str], list[Any]]:
    requests = [GenerationRequest(prompt_ids=ids, text=text, max_new_tokens=TOKENS) for ids, text in asked]
    return generate(base, loaded, requests)
