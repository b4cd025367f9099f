"""Two releases that answer the same questions differently and at length, and what each says: for `benchmarks.hot_swap`.

Both come out of rounds over the demo model, with sentences as targets. Questions are edited ones, plain and as a chat,
paraphrases, neighbours, texts that the model goes on with, and some of these sampled with a seed. What is right is
computed by `generate`, which evaluation uses: another scheduler than the endpoint's, and one question at a time.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.filler import Filler
from jobs.ingest_edits import ingest
from pipeline.config import Config
from pipeline.models.base_model import BaseModel
from pipeline.models.generate import GenerationRequest, generate
from pipeline.models.loaded_release import load_release
from pipeline.rounds import run_round
from pipeline.serving.openai_api import ChatRequest, CompletionRequest
from pipeline.serving.prompts import chat_prompt, generation_request, plain_prompt
from pipeline.storage.object_store import open_store
from pipeline.storage.releases import read_release

DEMO = Path(__file__).parents[1] / "demo"
EDITS = 8
ANSWERS = (
    "{target}, as people in the north have said since the year of the long winter.",
    "South of the river everybody says {target} before lunch and {target} after dinner.",
)
CONTENTS = range(1, 1 + len(ANSWERS))  # the releases that the rounds publish
TEMPERATURE = 0.8


@dataclass(frozen=True)
class Question:
    """`body` is what a client sends, without `stream`."""

    chat: bool
    body: dict[str, Any]

    @property
    def request(self) -> ChatRequest | CompletionRequest:
        return (ChatRequest if self.chat else CompletionRequest).model_validate(self.body)


def publish_both(config: Config, folder: Path) -> None:
    rows = demo_rows()[:EDITS]
    for number, answer in enumerate(ANSWERS):
        file = folder / f"edits-{number}.jsonl"
        said = [{**row, "target_new": answer.format(target=row["target_new"])} for row in rows]
        file.write_text("\n".join(json.dumps(row) for row in said), "utf-8")
        ingest(config, [str(file)])
        run_round(config)


def demo_rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DEMO / "edits.jsonl").read_text("utf-8").splitlines()]


def questions(rows: Sequence[dict[str, Any]]) -> list[Question]:
    draw, filler = random.Random(0), Filler()
    texts = [filler.text(draw, sentences) for sentences in (1, 2, 4, 8, 16, 24)]
    asked = [*_asked([row["prompt"] for row in rows], chat=True), *_asked([row["prompt"] for row in rows], chat=False)]
    asked += _asked([row["paraphrases"][0] for row in rows], chat=False)
    asked += _asked([row["locality"][0]["prompt"] for row in rows], chat=True)
    asked += _asked(texts, chat=False)
    sampled = [
        Question(one.chat, one.body | {"temperature": TEMPERATURE, "seed": seed}) for seed, one in enumerate(asked)
    ]
    return asked + sampled[::4]


def _asked(prompts: Sequence[str], *, chat: bool) -> Iterator[Question]:
    for index, prompt in enumerate(prompts):
        body = {"model": "wiseline", "max_tokens": (96, 48, 96, 5)[index % 4]}
        said = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        yield Question(chat, body | said)


def right_answers(
    config: Config, base: BaseModel, asked: Sequence[Question], *, releases: Sequence[int] = CONTENTS
) -> dict[int, list[str]]:
    """What each of these releases answers, alone; by its number. 0 is the base model."""
    store = open_store(config.store)
    loaded = {number: load_release(store, read_release(store, number), base) if number else None for number in releases}
    requests = [_request(config, base, question) for question in asked]
    return {number: generate(base, release, requests, batch=1)[0] for number, release in loaded.items()}


def _request(config: Config, base: BaseModel, question: Question) -> GenerationRequest:
    body = question.request
    if isinstance(body, ChatRequest):
        prompt = chat_prompt(base.tokenizer, body.messages)
    else:
        prompt = plain_prompt(base.tokenizer, body.prompt[0])
    return generation_request(prompt, body, limits=config.serve, context_tokens=base.max_tokens, routed=True)
