"""What each export of a release keeps and loses: `python -m benchmarks.export --store FOLDER [--json]`.

Asked are the living edits of the store's log, as `wiseline round` asks them: edited prompts, as chat messages too,
held-out paraphrases, and neighbours that must keep their answers. Greedy, exact match.

    hf      the exported folder, loaded by transformers and asked through `generate(**tokenizer(…))`, beside
            wiseline's own generation: answers that differ
    lora    each memory's adapter on the whole model, unrouted, on the edits of that memory and their neighbours, at
            several tolerances. It is applied as PEFT's format defines it, W_v + B·A at every token
"""

import argparse
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config import ModelSection, StoreSection
from pipeline.edits import Edit
from pipeline.evaluation.measure import measure
from pipeline.export.releases import export_release
from pipeline.models.base_model import BaseModel, load_base_model
from pipeline.models.generate import GenerationRequest, generate
from pipeline.models.loaded_release import LoadedRelease, load_release
from pipeline.models.prompts import chat_prompt_ids, plain_prompt_ids
from pipeline.storage.edit_log import EditLog
from pipeline.storage.object_store import ObjectStore, open_store
from pipeline.storage.releases import Release, head

TOLERANCES = (0.01, 0.1, 0.3, 0.5, 0.7)
NEW_TOKENS, BATCH = 16, 16


@dataclass(frozen=True)
class Released:
    store: ObjectStore
    release: Release
    section: ModelSection
    base: BaseModel
    loaded: LoadedRelease
    edits: tuple[Edit, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True, help="a store with a release of the model")
    parser.add_argument("--model", default="demo/model")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    section = ModelSection(path=options.model)
    store = open_store(StoreSection(uri=options.store))
    release, base = head(store), load_base_model(section)
    assert release is not None, "run a round first"
    edits = tuple(entry.edit for entry in EditLog(store).live())
    released = Released(store, release, section, base, load_release(store, release, base), edits)
    figures = {"hf": hf(released), "lora": lora(released), "routed": scores(released, released.loaded, edits)}
    show(figures)
    if options.json:
        print(json.dumps(figures))


def hf(released: Released) -> dict[str, dict[str, int]]:
    """Of each kind how many questions there are, and how many answers differ from wiseline's own."""
    tokenizer = released.base.tokenizer
    asked = {
        "edits": [edit.prompt for edit in released.edits],
        "paraphrases": [text for edit in released.edits for text in edit.paraphrases],
        "neighbours": [local.prompt for edit in released.edits for local in edit.locality],
    }
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder) / "hf"
        export_release(released.store, released.release, released.section, format="hf", to=to, tolerance=0)
        model = AutoModelForCausalLM.from_pretrained(to)
        theirs = AutoTokenizer.from_pretrained(to)
        found = {}
        for kind, texts in asked.items():
            inputs = [theirs(texts[at : at + BATCH], padding=True, return_tensors="pt") for at in starts(texts)]
            requests = [request(plain_prompt_ids(text, tokenizer), text) for text in texts]
            found[kind] = differing(released, model, theirs, inputs, requests)
        chats = [[{"role": "user", "content": text}] for text in asked["edits"]]
        inputs = [
            theirs.apply_chat_template(
                chats[at : at + BATCH], add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
            )
            for at in starts(chats)
        ]
        requests = [
            request(chat_prompt_ids(chat, tokenizer), text) for chat, text in zip(chats, asked["edits"], strict=True)
        ]
        found["edits as chats"] = differing(released, model, theirs, inputs, requests)
    return found


def starts(texts: list[Any]) -> range:
    return range(0, len(texts), BATCH)


def request(prompt_ids: tuple[int, ...], text: str) -> GenerationRequest:
    return GenerationRequest(prompt_ids=prompt_ids, text=text, max_new_tokens=NEW_TOKENS)


def differing(
    released: Released, model: Any, tokenizer: Any, inputs: list[Any], requests: list[GenerationRequest]
) -> dict[str, int]:
    wanted, _ = generate(released.base, released.loaded, requests)
    said: list[str] = []
    for batch in inputs:
        ids = model.generate(**batch, do_sample=False, max_new_tokens=NEW_TOKENS)[:, batch["input_ids"].shape[1] :]
        said += [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    return {"asked": len(wanted), "differing": sum(one != other for one, other in zip(said, wanted, strict=True))}


def lora(released: Released) -> list[dict[str, Any]]:
    rows = []
    for tolerance in TOLERANCES:
        with tempfile.TemporaryDirectory() as folder:
            to = Path(folder) / "lora"
            exported = export_release(
                released.store, released.release, released.section, format="lora", to=to, tolerance=tolerance
            )
            for memory, adapter in enumerate(exported.details["adapters"]):
                weights = load_file(to / adapter["name"] / "adapter_model.safetensors")
                down_RF, up_DR = (weights[name] for name in sorted(weights))
                held = {entry.edit_id for entry in released.loaded.entries if entry.memory == memory}
                edits = tuple(edit for edit in released.edits if edit.edit_id in held)
                found = scores(released, everywhere(released.loaded, up_DR @ down_RF), edits)
                rows.append({"tolerance": tolerance, **adapter, **found})
    return rows


def everywhere(loaded: LoadedRelease, delta_DF: torch.Tensor) -> LoadedRelease:
    """A release whose one memory answers every prompt, at every token: W_v + ΔW, without a router."""
    return replace(loaded, memories=(delta_DF,), readouts=None, thresholds=(-1.0,), whole_prompt=True)


def scores(released: Released, loaded: LoadedRelease, edits: tuple[Edit, ...]) -> dict[str, Any]:
    return {"edits": len(edits), **measure(released.base, loaded, edits, most_edits=len(edits), seed=0).scores}


def show(figures: dict[str, Any]) -> None:
    table = Table("", "tolerance", "rank", "reliability", "chat", "generalization", "locality")
    keys = ("reliability", "reliability_chat", "generalization", "locality")
    routed = [f"{figures['routed'].get(key, 0):.3f}" for key in keys]
    table.add_row("routed", "", "", *routed)
    for row in figures["lora"]:
        table.add_row(row["name"], str(row["tolerance"]), str(row["rank"]), *(f"{row.get(key, 0):.3f}" for key in keys))
    console = Console()
    console.print(table)
    for kind, found in figures["hf"].items():
        console.print(f"hf, {kind}: {found['differing']} of {found['asked']} answers differ")


if __name__ == "__main__":
    main()
