"""The plain files, read by code that knows nothing but their README: it must answer as wiseline does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config import ModelSection
from pipeline.export.releases import export_release
from pipeline.models.base_model import BaseModel
from pipeline.models.generate import GenerationRequest, generate
from pipeline.models.loaded_release import load_release
from pipeline.models.prompts import plain_prompt_ids
from pipeline.storage.object_store import ObjectStore
from tests.unit.export.conftest import MIXED, publish_two

TOKENS = 6


@pytest.mark.parametrize("targets", [None, [(5, 6, 7), (8, 1)]])
def test_the_readme_says_enough_to_answer(
    targets: list[tuple[int, ...]] | None, store: ObjectStore, base: BaseModel, section: ModelSection, tmp_path: Path
) -> None:
    release = publish_two(store, base, targets=targets)
    to = tmp_path / "tensors"
    export_release(store, release, section, format="safetensors", to=to, tolerance=0)
    requests = [
        GenerationRequest(prompt_ids=plain_prompt_ids(prompt, base.tokenizer), text=prompt, max_new_tokens=TOKENS)
        for prompt in MIXED
    ]
    answers, decisions = generate(base, load_release(store, release, base), requests)
    for request, answer, decision in zip(requests, answers, decisions, strict=True):
        edit, ids = answered_by_the_readme(to, base, list(request.prompt_ids))
        assert edit == (None if decision.memory is None else decision.memory)
        assert base.tokenizer.decode(ids, skip_special_tokens=True).strip() == answer


def answered_by_the_readme(folder: Path, base: BaseModel, prompt: list[int]) -> tuple[int | None, list[int]]:
    about = json.loads((folder / "release.json").read_text())
    bank = [json.loads(line) for line in (folder / "bank.jsonl").read_text().splitlines()]
    router = load_file(folder / "router.safetensors")
    module = base.model.get_submodule(about["module"])
    states: list[torch.Tensor] = []
    block = base.model.get_submodule(about["module"].rsplit(".", 2)[0])
    handle = block.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0][0, -1]))
    with torch.no_grad():
        base.model(torch.tensor([prompt]))
    handle.remove()
    query = (states[0] - router["mean_D"]) @ router["whiten_DD"]
    cosines = router["keys_ND"] @ (query / query.norm())
    scores = [
        float(router["weights_S"][0] * cosines[router["entry_N"] == edit].max() + router["bias_E"][edit])
        for edit in range(about["edits"])
    ]
    edit = max(range(about["edits"]), key=lambda one: scores[one])
    routed = scores[edit] > about["threshold"]
    said: list[int] = []
    while len(said) < TOKENS:
        handle = module.register_forward_hook(reader(folder, about, bank, edit, prompt, said)) if routed else None
        with torch.no_grad():
            token = int(base.model(torch.tensor([prompt + said]), use_cache=False).logits[0, -1].argmax())
        if handle:
            handle.remove()
        if token in base.end_ids:
            break
        said.append(token)
    return (edit if routed else None), said


def reader(folder: Path, about: dict[str, Any], bank: list[Any], edit: int, prompt: list[int], said: list[int]) -> Any:
    memory = int(load_file(folder / "router.safetensors")["memory_E"][edit])
    delta = load_file(folder / "memories" / f"memory-{memory}.safetensors")["delta"]
    target = bank[edit]["target_ids"]
    readouts = load_file(folder / "readouts.safetensors") if about["addressing"] == "matched" else None

    def read(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        for step in range(len(said) + 1):
            place = len(prompt) - 1 + step
            follows = readouts is not None and step < len(target) and said[:step] == target[:step]
            if follows:
                assert readouts is not None
                output[0, place] += readouts["readouts"][int(readouts["first"][edit]) + step]
            else:
                output[0, place] += delta @ inputs[0][0, place]
        return output

    return read
