"""Presets: known models get what was published for them, and everything the paper says is set."""

from pathlib import Path

import pytest
from transformers import AutoConfig

from pipeline.config import Config, ModelSection
from pipeline.models.value_matrix import architecture, resolve_layer
from pipeline.presets import PUBLISHED, UNPUBLISHED, apply_preset, published_for

KNOWN = [
    ("Llama-2-7B", 27, (5, 20, 10), {"model_type": "llama", "num_hidden_layers": 32, "vocab_size": 32000}),
    ("Mistral-7B", 27, (5, 20, 10), {"model_type": "mistral", "num_hidden_layers": 32}),
    ("GPT-J-6B", 21, (15, 40, 20), {"model_type": "gptj", "n_layer": 28}),
    (
        "Llama-3-8B",
        29,
        (2, 20, 10),
        {"model_type": "llama", "num_hidden_layers": 32, "vocab_size": 128256, "max_position_embeddings": 8192},
    ),
    (
        "Llama-3.1-8B",
        29,
        (5, 10, 10),
        {"model_type": "llama", "num_hidden_layers": 32, "vocab_size": 128256, "max_position_embeddings": 131072},
    ),
    (
        "Llama-3.2-3B",
        27,
        (5, 20, 10),
        {"model_type": "llama", "num_hidden_layers": 28, "hidden_size": 3072, "vocab_size": 128256},
    ),
    ("Qwen2-7B, Qwen2.5-7B", 23, (5, 20, 10), {"model_type": "qwen2", "num_hidden_layers": 28, "hidden_size": 3584}),
]


@pytest.mark.parametrize(("name", "layer", "margins", "fields"), KNOWN)
def test_a_known_model_gets_its_published_row(
    name: str, layer: int, margins: tuple[float, ...], fields: dict[str, object]
) -> None:
    model = AutoConfig.for_model(**fields)
    row = published_for(model)
    assert (row.name, row.layer, row.margins) == (name, layer, margins)
    assert resolve_layer(model, row.layer) == layer
    assert architecture(model)


def test_a_base_model_is_recognised_by_one_row_only() -> None:
    models = [AutoConfig.for_model(**fields) for *_, fields in KNOWN]
    assert [
        sum(all(getattr(model, key, None) == value for key, value in row.recognised_by.items()) for row in PUBLISHED)
        for model in models
    ] == [1] * len(models)


def test_default_changes_nothing() -> None:
    config = Config(model=ModelSection(path="nowhere"))
    assert apply_preset(config, "default", model_path="nowhere") is config


def test_paper_on_the_demo_model_is_the_papers_procedure() -> None:
    demo = str(Path("demo/model").resolve())
    config = apply_preset(Config(), "paper", model_path=demo)
    assert config.model.layer == 4
    assert (config.shards.density, config.shards.shards_per_memory, config.shards.masks) == (0.2, 2, "overlapping")
    assert (config.training.procedure, config.training.max_steps, config.training.learning_rate) == ("paper", 70, 0.2)
    assert (config.training.margins, config.training.clamp, config.training.prefixes) == ((20, 80, 40), 1.0, 10)
    assert (config.merge.method, config.merge.density) == ("ties", 0.53)
    assert (config.router.method, config.router.activation_ratio, config.router.addressing) == (
        "activation",
        1.15,
        "own",
    )
    assert config.training.sibling_penalty == 0


def test_what_the_preset_does_not_speak_of_stays() -> None:
    config = Config(model=ModelSection(layer=1)).model_copy(update={"serve": Config().serve})
    preset = apply_preset(config, "paper", model_path=str(Path("demo/model").resolve()))
    assert preset.store == config.store and preset.serve == config.serve and preset.model.path == config.model.path


def test_an_unpublished_model_gets_llama_2_s_values_and_keeps_its_layer() -> None:
    model = AutoConfig.for_model("gpt_neox", num_hidden_layers=5)
    assert published_for(model) is UNPUBLISHED
    assert UNPUBLISHED.layer == "auto" and UNPUBLISHED.margins == (5, 20, 10)
