"""Where each architecture keeps W_v, the main memory: one row per architecture, and a sentence for those without.

W_v is the second matrix of the FFN: it maps key activations A(x), F wide, back to the residual stream, D wide.
`nn.Linear` stores it as D × F, GPT-2's `Conv1D` as F × D; a ΔW is D × F everywhere. Gemma 2 and 3 are not in the table:
they normalise the FFN's output before adding it, so what a side memory adds there is not simply added to the stream.
"""

from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from pipeline.errors import UnsupportedModel


@dataclass(frozen=True)
class Architecture:
    """Module paths inside `AutoModelForCausalLM`; the FFN's output is added to the residual stream unchanged."""

    blocks: str
    value: str
    embedding: str = "model.embed_tokens"
    positions: str | None = None  # learned position embedding, added to `inputs_embeds`


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(blocks="model.layers", value="mlp.down_proj"),
    "mistral": Architecture(blocks="model.layers", value="mlp.down_proj"),
    "qwen2": Architecture(blocks="model.layers", value="mlp.down_proj"),
    "qwen3": Architecture(blocks="model.layers", value="mlp.down_proj"),
    "gemma": Architecture(blocks="model.layers", value="mlp.down_proj"),
    "phi": Architecture(blocks="model.layers", value="mlp.fc2"),
    "phi3": Architecture(blocks="model.layers", value="mlp.down_proj"),
    "gptj": Architecture(blocks="transformer.h", value="mlp.fc_out", embedding="transformer.wte"),
    "gpt2": Architecture(
        blocks="transformer.h", value="mlp.c_proj", embedding="transformer.wte", positions="transformer.wpe"
    ),
    "gpt_neox": Architecture(blocks="gpt_neox.layers", value="mlp.dense_4h_to_h", embedding="gpt_neox.embed_in"),
    "opt": Architecture(
        blocks="model.decoder.layers",
        value="fc2",
        embedding="model.decoder.embed_tokens",
        positions="model.decoder.embed_positions",
    ),
}


def architecture(config: PretrainedConfig) -> Architecture:
    """Row of the table. Raises UnsupportedModel naming what is supported."""
    model_type = getattr(config, "base_model_type", config.model_type)  # an exported model says what it is made of
    row = ARCHITECTURES.get(model_type)
    if row is None:
        raise UnsupportedModel(
            f"Models of type {model_type!r} are not supported; supported are {', '.join(ARCHITECTURES)}."
        )
    if model_type == "opt" and not config.do_layer_norm_before:
        raise UnsupportedModel("OPT with layer norm after the FFN (opt-350m) is not supported; other OPT sizes are.")
    return row


def resolve_layer(config: PretrainedConfig, layer: int | Literal["auto"]) -> int:
    """Index of the edited layer; `auto` is the paper's relative depth, layer 27 of Llama-2-7B's 0…31."""
    last = int(config.num_hidden_layers) - 1
    if layer == "auto":
        return round(27 / 31 * last)
    if not 0 <= layer <= last:
        raise UnsupportedModel(f"model.layer is {layer}, but the layers of this model are 0 to {last}.")
    return layer


def block(model: PreTrainedModel, layer: int) -> nn.Module:
    return model.get_submodule(architecture(model.config).blocks)[layer]  # type: ignore[no-any-return]


def value_path(config: PretrainedConfig, layer: int) -> str:
    """Name of the module that holds W_v of `layer`."""
    row = architecture(config)
    return f"{row.blocks}.{layer}.{row.value}"


def value_module(model: PreTrainedModel, layer: int) -> nn.Module:
    """The module that holds W_v of `layer`."""
    return block(model, layer).get_submodule(architecture(model.config).value)
