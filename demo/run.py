"""The whole loop on the demo model, as `make demo` runs it: serve the base model, ask it, ingest edits, train and merge
and publish a release, and ask the same endpoint again."""

import argparse
import json
import shutil
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.ask import ask_endpoint
from jobs.ingest_edits import ingest, show_report
from jobs.round_progress import RoundProgress
from jobs.run_round import show_summary, summarise
from jobs.serve import running_endpoint
from pipeline.config import Config, load_config
from pipeline.rounds import run_round

DEMO = Path(__file__).parent
EDITS, BAD_ROWS = DEMO / "edits.jsonl", DEMO / "bad_rows.jsonl"
SHOWN_EDITS = (0, 1, 3, 40)  # three changes of the world and an invented one
RELEASE_DEADLINE_SECONDS = 60
SERVE = ("serve.port=0", "serve.live_edits=false")  # these edits come from a file and wait for the round

console = Console(highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs the whole loop on the demo model.")
    parser.add_argument("--store", default=".wiseline/demo", help="folder (made anew) or s3://bucket/prefix")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    options = parser.parse_args()
    folder = Path(options.store)
    if "://" not in options.store and folder.exists():
        if not (folder / "edits" / "_delta_log").is_dir():
            raise SystemExit(f"{folder} is not a store that this demo could make anew; name another --store.")
        shutil.rmtree(folder)
    config = load_config(overrides=[f"model.path={DEMO / 'model'}", f"store.uri={options.store}", *SERVE, *options.set])
    run_demo(config)


def run_demo(config: Config) -> None:
    started = time.monotonic()
    questions = demo_questions()
    headline("1  The endpoint, before any edit")
    with running_endpoint(config) as url:
        console.print(f"{url}/v1 serves {config.model.path}")
        before = [answer(url, question) for question in questions]

        headline("2  Ingest")
        show_report(ingest(config, [str(EDITS), str(BAD_ROWS)]))

        headline("3  Round: plan, train the shards side by side, merge, evaluate, publish")
        round_started = time.monotonic()
        with RoundProgress() as progress:
            result = run_round(config, observe=progress)
        show_summary(summarise(result, config, seconds=time.monotonic() - round_started))

        headline("4  The same endpoint, not restarted")
        wait_for_release(url, result.release.number)
        after = [answer(url, question) for question in questions]
        console.print(answers_table(questions, before, after))
    console.print(f"Done in {time.monotonic() - started:.0f} s. Go on with:")
    store = f"--set model.path={config.model.path} --set store.uri={config.store.uri}"
    console.print(f'  .venv/bin/wiseline ask --offline --explain {store} "{questions[0]["prompt"]}"', soft_wrap=True)
    console.print(f"  .venv/bin/wiseline releases list {store}", soft_wrap=True)


def demo_questions() -> list[dict[str, str]]:
    """For a few edits: the edited prompt, a paraphrase that no training saw, and a neighbour to leave alone."""
    rows = [json.loads(line) for line in EDITS.read_text(encoding="utf-8").splitlines()]
    questions = []
    for row in (rows[index] for index in SHOWN_EDITS):
        questions.append({"kind": "edit", "prompt": row["prompt"], "wanted": row["target_new"]})
        questions.append({"kind": "paraphrase", "prompt": row["paraphrases"][0], "wanted": row["target_new"]})
        neighbour = row["locality"][0]
        questions.append({"kind": "neighbour", "prompt": neighbour["prompt"], "wanted": neighbour["answer"]})
    return questions


def answer(url: str, question: dict[str, str]) -> dict[str, Any]:
    """Edited prompts as a chat, the others as plain text: both ways in are shown."""
    asked: dict[str, Any] = {"model": "wiseline"}
    if question["kind"] == "edit":
        response = ask_endpoint(url, {**asked, "messages": [{"role": "user", "content": question["prompt"]}]})
        text = response["choices"][0]["message"]["content"]
    else:
        response = ask_endpoint(url, {**asked, "prompt": question["prompt"]})
        text = response["choices"][0]["text"]
    return {"text": text.strip(), **response["wiseline"]}


def wait_for_release(url: str, number: int) -> None:
    deadline = time.monotonic() + RELEASE_DEADLINE_SECONDS
    while time.monotonic() < deadline:
        with urllib.request.urlopen(f"{url}/healthz", timeout=10) as response:
            if json.load(response)["release"] == number:
                return
        time.sleep(0.1)
    raise SystemExit(f"The endpoint did not follow to release {number} within {RELEASE_DEADLINE_SECONDS} s.")


def answers_table(
    questions: Sequence[dict[str, str]], before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]
) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("question", "before", "after", "answered by"):
        table.add_column(name, overflow="fold")
    for question, old, new in zip(questions, before, after, strict=True):
        right = "green" if new["text"] == question["wanted"] else "red"
        table.add_row(
            f"{question['prompt']} [dim]({question['kind']})[/dim]",
            old["text"],
            f"[{right}]{new['text']}[/{right}]",
            f"[dim]release {new['release']}, {new['route']}[/dim]",
        )
    return table


def headline(text: str) -> None:
    console.print(f"\n[bold]{text}[/bold]")


if __name__ == "__main__":
    main()
