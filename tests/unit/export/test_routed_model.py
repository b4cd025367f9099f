"""An exported folder, loaded by transformers' Auto classes, answers as wiseline's own generation does."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config import ModelSection
from pipeline.errors import ConfigError, ModelChanged, UnsupportedModel
from pipeline.export.releases import export_release
from pipeline.models.base_model import BaseModel, load_base_model
from pipeline.models.generate import GenerationRequest, generate
from pipeline.models.loaded_release import load_release
from pipeline.models.prompts import plain_prompt_ids
from pipeline.models.value_matrix import ARCHITECTURES
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.releases import Release, read_release
from tests.unit.export.conftest import MIXED, ROUTED, publish_two
from tests.unit.models.conftest import save_architecture

TOKENS = 12
ROOT = Path(__file__).parents[3]


def exported(store: ObjectStore, release: Release, section: ModelSection, to: Path) -> tuple[Any, Any]:
    export_release(store, release, section, format="hf", to=to, tolerance=0)
    return AutoModelForCausalLM.from_pretrained(to), AutoTokenizer.from_pretrained(to)


def asked(model: Any, tokenizer: Any, prompts: list[str], **options: Any) -> list[str]:
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    ids = model.generate(**inputs, **{"do_sample": False, "max_new_tokens": TOKENS, **options})
    answers = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def own(base: BaseModel, store: ObjectStore, prompts: list[str], *, routed: bool = True) -> list[str]:
    requests = [
        GenerationRequest(
            prompt_ids=plain_prompt_ids(prompt, base.tokenizer), text=prompt, max_new_tokens=TOKENS, routed=routed
        )
        for prompt in prompts
    ]
    return generate(base, load_release(store, read_release(store, 1), base), requests)[0]


@pytest.fixture
def model_and_tokenizer(store: ObjectStore, base: BaseModel, section: ModelSection, tmp_path: Path) -> tuple[Any, Any]:
    return exported(store, publish_two(store, base), section, tmp_path / "hf")


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_every_architecture_answers_a_padded_batch_as_the_endpoint_does(
    model_type: str, store: ObjectStore, tmp_path: Path
) -> None:
    section = ModelSection(path=str(save_architecture(tmp_path / "base", model_type)), layer=1)
    base = load_base_model(section)
    model, tokenizer = exported(store, publish_two(store, base), section, tmp_path / "hf")
    assert isinstance(model, type(base.model))
    assert tokenizer(MIXED)["input_ids"] == base.tokenizer(MIXED)["input_ids"]
    answers = asked(model, tokenizer, MIXED)
    assert answers == own(base, store, MIXED)
    assert [decision.memory for decision in model.decisions] == [None, 0, None, 1, None]
    unedited = own(base, store, MIXED, routed=False)
    assert [one == other for one, other in zip(answers, unedited, strict=True)] == [True, False, True, False, True]


def test_matched_addressing_follows_each_rows_own_target(
    store: ObjectStore, base: BaseModel, section: ModelSection, tmp_path: Path
) -> None:
    """What the readouts make the model say is learned first, so that one answer follows its target for some tokens and
    the other leaves it at once."""
    first = ObjectStore(str(tmp_path / "first"))
    publish_two(first, base, targets=[(5,) * 4, (5,) * 4])
    said = base.tokenizer(own(base, first, ROUTED[:1])[0], add_special_tokens=False)["input_ids"]
    release = publish_two(store, base, targets=[(*said[:1], 5, 5, 5), (5,) * 4])
    model, tokenizer = exported(store, release, section, tmp_path / "hf")
    answers = asked(model, tokenizer, MIXED)
    assert answers == own(base, store, MIXED)
    assert answers == [asked(model, tokenizer, [prompt])[0] for prompt in MIXED]


def test_the_papers_routing_activation_is_exported_too(
    store: ObjectStore, base: BaseModel, section: ModelSection, tmp_path: Path
) -> None:
    probe = ObjectStore(str(tmp_path / "probe"))
    release = load_release(probe, publish_two(probe, base, thresholds=(0.0, 0.0)), base)
    requests = [
        GenerationRequest(prompt_ids=plain_prompt_ids(prompt, base.tokenizer), text=prompt, max_new_tokens=1)
        for prompt in MIXED
    ]
    strengths = sorted(decision.score for decision in generate(base, release, requests)[1])
    between = (strengths[1] + strengths[2]) / 2
    model, tokenizer = exported(store, publish_two(store, base, thresholds=(between,) * 2), section, tmp_path / "hf")
    assert asked(model, tokenizer, MIXED) == own(base, store, MIXED)
    assert sum(decision.memory is None for decision in model.decisions) == 2


def test_several_samples_of_a_prompt_keep_its_memory(model_and_tokenizer: tuple[Any, Any], base: BaseModel) -> None:
    """Oracle for a prompt that no memory answers: the base model's own sampling, with the same seed."""
    model, tokenizer = model_and_tokenizer
    options = {"do_sample": True, "num_return_sequences": 3}
    asked(model, tokenizer, MIXED[:2], **options)
    assert [decision.memory for decision in model.decisions] == [None] * 3 + [0] * 3
    torch.manual_seed(3)
    here = asked(model, tokenizer, MIXED[:1], **options)
    torch.manual_seed(3)
    inputs = base.tokenizer(MIXED[:1], return_tensors="pt")
    ids = base.model.generate(**inputs, max_new_tokens=TOKENS, pad_token_id=base.tokenizer.pad_token_id, **options)
    assert here == [
        answer.strip()
        for answer in base.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    ]


def test_a_forward_outside_generate_is_the_unedited_models(
    model_and_tokenizer: tuple[Any, Any], base: BaseModel
) -> None:
    model, tokenizer = model_and_tokenizer
    inputs = tokenizer(ROUTED[:1], return_tensors="pt")
    with torch.no_grad():
        unedited = base.model(**inputs).logits
        assert torch.equal(model(**inputs).logits, unedited)
        asked(model, tokenizer, MIXED)
        assert torch.equal(model(**inputs).logits, unedited)


def test_without_a_mask_padding_is_what_pads(model_and_tokenizer: tuple[Any, Any], base: BaseModel) -> None:
    model, tokenizer = model_and_tokenizer
    ids = tokenizer(ROUTED[0], return_tensors="pt")["input_ids"]
    padded = torch.cat([torch.full((1, 3), 7), ids], dim=1)
    model.generate(padded, do_sample=False, max_new_tokens=2, pad_token_id=7)
    assert model.decisions[0].memory == 0


def test_threads_that_share_a_model_get_their_own_answers(model_and_tokenizer: tuple[Any, Any]) -> None:
    model, tokenizer = model_and_tokenizer
    alone = [asked(model, tokenizer, [prompt])[0] for prompt in MIXED]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda prompt: asked(model, tokenizer, [prompt])[0], MIXED * 4))
    assert together == alone * 4


def test_another_dtype_takes_the_release_along(model_and_tokenizer: tuple[Any, Any]) -> None:
    model, tokenizer = model_and_tokenizer
    asked(model.to(torch.float64), tokenizer, MIXED)
    assert [decision.memory for decision in model.decisions] == [None, 0, None, 1, None]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_beams": 2}, "beam search"),
        ({"use_cache": False}, "use_cache=False"),
        ({"prefill_chunk_size": 2}, "prefill_chunk_size"),
        ({"prompt_lookup_num_tokens": 2}, "assisted generation"),
        ({"cache_implementation": "static"}, "cache_implementation=static"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"input_ids": None}, "without input_ids"),
    ],
)
def test_what_cannot_be_routed_is_refused_by_name(
    model_and_tokenizer: tuple[Any, Any], options: dict[str, Any], named: str
) -> None:
    model, tokenizer = model_and_tokenizer
    with pytest.raises(ConfigError, match=named):
        model.generate(**{**tokenizer(ROUTED[0], return_tensors="pt"), "max_new_tokens": 2, **options})


def test_padding_on_the_right_is_refused(model_and_tokenizer: tuple[Any, Any]) -> None:
    model, tokenizer = model_and_tokenizer
    tokenizer.padding_side = "right"
    with pytest.raises(ConfigError, match="padded on the left"):
        asked(model, tokenizer, MIXED)


def test_other_weights_or_no_release_are_refused(model_and_tokenizer: tuple[Any, Any], tmp_path: Path) -> None:
    model, _ = model_and_tokenizer
    with pytest.raises(ConfigError, match="copy its folder"):
        model.save_pretrained(tmp_path / "again")
    weights = tmp_path / "hf" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(ModelChanged, match="export it again"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "wiseline" / "export.json").unlink()
    with pytest.raises(UnsupportedModel, match="holds no release"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "hf")


def test_the_readmes_lines_work_in_a_process_of_their_own(model_and_tokenizer: tuple[Any, Any], tmp_path: Path) -> None:
    readme = (tmp_path / "hf" / "README.md").read_text()
    lines = readme.split("```python\n")[1].split("```")[0]
    script = f"FOLDER, PROMPTS = {str(tmp_path / 'hf')!r}, {MIXED!r}\n{lines}"
    script += "\nprint([decision.memory for decision in model.decisions])"
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert ended.stdout.strip().splitlines()[-1:] == ["[None, 0, None, 1, None]"], ended.stderr
