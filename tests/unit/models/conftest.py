"""A tiny random model of every supported architecture, and releases that route chosen prompts."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.config import ModelSection
from pipeline.models.base_model import BaseModel, load_base_model
from pipeline.models.loaded_release import LoadedRelease
from pipeline.models.prompts import plain_prompt_ids
from pipeline.models.value_matrix import ARCHITECTURES, value_module
from pipeline.storage.bank import BankEntry
from pipeline.training.activations import read_prompts
from pipeline.wise.routing import Router, whitened
from tests.tiny_world import save_model

LAYERS = 4
VOCABULARY = 384  # some tokenizer classes add tokens of their own to the 320
OTHER_NAMES = {
    "gpt2": {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_inner": 64, "n_positions": 128},
    "gptj": {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_inner": 64, "n_positions": 128, "rotary_dim": 8},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0, "num_key_value_heads": 4},
    "gpt_neox": {"num_key_value_heads": 4},
    "gemma": {"head_dim": 8},
    "qwen3": {"head_dim": 8},
    "phi3": {"pad_token_id": 1},
}
USUAL_NAMES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def save_architecture(folder: Path, model_type: str, **settings: object) -> Path:
    """A random model of this architecture, with biases and norms that are not at their trivial starting values."""
    save_model(folder)
    own = OTHER_NAMES.get(model_type, {})
    usual = {} if "n_embd" in own else USUAL_NAMES
    config = AutoConfig.for_model(
        model_type,
        **{**usual, **own, "vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.3}
        | settings,
    )
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=sorted(ARCHITECTURES))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = save_architecture(tmp_path_factory.mktemp(request.param), request.param)
    return load_base_model(ModelSection(path=str(folder), layer=1))


@pytest.fixture
def route_to(base: BaseModel) -> Callable[[Sequence[str]], LoadedRelease]:
    """`route_to(prompts)`: two memories of large random ΔW, reached by exactly these prompts, turn about."""
    return lambda prompts: routed_release(base, prompts)


def routed_release(base: BaseModel, prompts: Sequence[str], *, memories: int = 2, seed: int = 5) -> LoadedRelease:
    """`memories` of large random ΔW, reached by exactly these prompts, turn about."""
    D, F = (
        base.model.config.hidden_size,
        value_module(base.model, base.layer).weight.numel() // base.model.config.hidden_size,
    )
    generator = torch.Generator().manual_seed(seed)
    states = read_prompts(base, [plain_prompt_ids(prompt, base.tokenizer) for prompt in prompts]).states_ND
    mean_D, whiten_DD = torch.zeros(D), torch.eye(D)
    memory_E = torch.arange(len(prompts)) % memories
    return LoadedRelease(
        number=1,
        memories=tuple(torch.randn(D, F, generator=generator) for _ in range(memories)),
        router=Router(
            mean_D=mean_D,
            whiten_DD=whiten_DD,
            keys_ND=whitened(states, mean_D, whiten_DD),
            entry_N=torch.arange(len(prompts)),
            memory_E=memory_E,
            asked_EM=torch.zeros(len(prompts), 0),
            relation_EM=torch.zeros(len(prompts), 0),
            weights_S=torch.tensor([1.0, 0.0, 0.0, 0.0]),
            bias_E=torch.zeros(len(prompts)),
            threshold=0.99999,
        ),
        entries=tuple(
            BankEntry(edit_id=str(index), prompt=prompt, target="", subject=None, memory=int(memory_E[index]))
            for index, prompt in enumerate(prompts)
        ),
    )
