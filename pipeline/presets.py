"""Presets: `default` is this project's method, `paper` is WISE's own, with what its authors published per model.

`paper` (arXiv:2405.14768) is overrides of the config, nothing else: sequential SGD with the margin loss, overlapping
masks of density ρ = 0.2, k = 2, Ties-Merge, the side memory on the whole routed prompt, read at the prompt's own keys,
and Δ_act > ε. Its answers to the gate's questions are what they are, so the gate is open.

Layers, margins, rates and steps are those of the paper's appendix and of the authors' files hparams/WISE/*.yaml
(zjunlp/EasyEdit). Left out: gpt2-xl, whose file edits `c_fc`, the FFN's first matrix and so not W_v; llama3.2-1b, whose
file names layer 27 of 16. `merge_freq` there counts edits: 1,000, so k = 2 shards of 500.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PretrainedConfig

from pipeline.config import Config, ModelSection
from pipeline.errors import ConfigError
from pipeline.models.base_model import load_config, model_folder

PRESETS = ("default", "paper")


@dataclass(frozen=True)
class Published:
    """One model's row. `recognised_by`: what its config.json says."""

    name: str
    source: str
    recognised_by: Mapping[str, object]
    layer: int | Literal["auto"]
    margins: tuple[float, float, float] = (5.0, 20.0, 10.0)  # α, β, γ
    learning_rate: float = 1.0
    steps: int = 70
    edits_per_shard: int = 500
    activation_ratio: float = 1.0  # ε, as a share of the smallest Δ_act among the edits


LLAMA_3 = {"model_type": "llama", "num_hidden_layers": 32, "vocab_size": 128256}
PUBLISHED = (
    Published("Llama-2-7B", "llama-7b.yaml", {"model_type": "llama", "num_hidden_layers": 32, "vocab_size": 32000}, 27),
    Published("Mistral-7B", "mistral-7b.yaml", {"model_type": "mistral", "num_hidden_layers": 32}, 27),
    Published(
        "GPT-J-6B", "gpt-j-6B.yaml", {"model_type": "gptj", "num_hidden_layers": 28}, 21, margins=(15.0, 40.0, 20.0)
    ),
    Published(
        "Llama-3-8B",
        "llama3-8b.yaml",
        LLAMA_3 | {"max_position_embeddings": 8192},
        29,
        margins=(2.0, 20.0, 10.0),
        learning_rate=0.9,
        steps=30,
    ),
    Published(
        "Llama-3.1-8B",
        "llama3.1-8b.yaml",
        LLAMA_3 | {"max_position_embeddings": 131072},
        29,
        margins=(5.0, 10.0, 10.0),
        learning_rate=0.9,
        steps=30,
    ),
    Published("Llama-3.2-3B", "llama3.2-3b.yaml", LLAMA_3 | {"num_hidden_layers": 28, "hidden_size": 3072}, 27),
    Published(
        "Qwen2-7B, Qwen2.5-7B",
        "qwen2.5-7b.yaml",
        {"model_type": "qwen2", "num_hidden_layers": 28, "hidden_size": 3584},
        23,
    ),
    Published(
        "closed world and demo (6 x 256)",
        "margins and shards of this project's measurement of the authors' code; rate and ε chosen on tuning edits",
        {"model_type": "llama", "num_hidden_layers": 6, "hidden_size": 256},
        4,
        margins=(20.0, 80.0, 40.0),
        learning_rate=0.2,
        edits_per_shard=50,
        activation_ratio=1.15,
    ),
)
UNPUBLISHED = Published("another model", "Llama-2-7B's values at the same relative depth", {}, "auto")


def apply_preset(config: Config, name: str, *, model_path: str) -> Config:
    """The config with the preset's values in place of its own; `default` changes nothing.

    Raises UnsupportedModel when `model_path` (a folder or hub name) is no model that can be edited. A model that the
    authors published nothing for gets Llama-2-7B's values, and keeps the configured layer.
    """
    if name not in PRESETS:
        raise ConfigError(f"There is no preset {name!r}; it is one of {', '.join(PRESETS)}.")
    if name == "default":
        return config
    row = published_for(load_config(model_folder(ModelSection(path=model_path))))
    overrides: dict[str, dict[str, Any]] = {
        "model": {} if row.layer == "auto" else {"layer": row.layer},
        "shards": {
            "edits_per_shard": row.edits_per_shard,
            "shards_per_memory": 2,
            "density": 0.2,
            "masks": "overlapping",
        },
        "training": {
            "procedure": "paper",
            "max_steps": row.steps,
            "learning_rate": row.learning_rate,
            "stop_loss": 0.02,
            "sibling_penalty": 0.0,
            "prefixes": 10,
            "prefix_tokens": 10,
            "margins": row.margins,
            "clamp": 1.0,
        },
        "merge": {"method": "ties", "density": 0.53, "polish_steps": 0},
        "router": {"method": "activation", "activation_ratio": row.activation_ratio, "addressing": "own"},
        "round": {"min_reliability": 0.0, "min_generalization": 0.0, "min_locality": 0.0},
    }
    tree = config.model_dump()
    for section, values in overrides.items():
        tree[section] |= values
    return Config.model_validate(tree)


def published_for(model: PretrainedConfig) -> Published:
    for row in PUBLISHED:
        if all(getattr(model, key, None) == value for key, value in row.recognised_by.items()):
            return row
    return UNPUBLISHED
