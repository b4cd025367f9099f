"""Load the frozen base model once, with what identifies it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from pipeline.config import ModelSection
from pipeline.errors import UnsupportedModel
from pipeline.models.placement import execution_device, placement
from pipeline.models.value_matrix import architecture, resolve_layer, value_module

logging.set_verbosity_error()
logging.disable_progress_bar()

SAMPLE_BYTES = 1024  # at three places of every tensor
IDENTIFYING_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class BaseModel:
    """The unedited model. Nothing writes to its weights, ever."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layer: int
    fingerprint: str

    @property
    def device(self) -> torch.device:
        """Where the model reads its tokens."""
        device: torch.device = self.model.device
        return device

    @property
    def layer_device(self) -> torch.device:
        """Where layer L computes; another GPU, where the model is spread over several."""
        return execution_device(value_module(self.model, self.layer))

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        ids = self.model.generation_config.eos_token_id if self.model.generation_config else None
        if ids is None:
            ids = self.tokenizer.eos_token_id
        return tuple(ids) if isinstance(ids, list) else (ids,) if ids is not None else ()

    @property
    def max_tokens(self) -> int:
        """Longest prompt plus answer, in tokens."""
        return int(self.model.config.max_position_embeddings)


@dataclass(frozen=True)
class Identity:
    """What a round needs to know of the base model before its weights are loaded anywhere."""

    fingerprint: str
    layer: int
    max_tokens: int
    tokenizer: PreTrainedTokenizerBase
    weight_bytes: int


def identify(section: ModelSection) -> Identity:
    """Raises UnsupportedModel like `load_base_model`, and as early as can be."""
    folder = model_folder(section)
    config = load_config(folder)
    return Identity(
        fingerprint=fingerprint(folder),
        layer=resolve_layer(config, section.layer),
        max_tokens=int(config.max_position_embeddings),
        tokenizer=load_tokenizer(folder),
        weight_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    )


def load_base_model(section: ModelSection) -> BaseModel:
    """Weights in `section.dtype`, where `section.placement` says. Remote code is never trusted.

    Raises UnsupportedModel when the folder is not a model or its architecture or layer is not in the table.
    """
    folder = model_folder(section)
    config = load_config(folder)
    layer = resolve_layer(config, section.layer)
    identity = fingerprint(folder)  # also says what is wrong with a folder without weights
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, section.dtype),
            trust_remote_code=False,
            use_safetensors=True,
            **placement(section.placement),
        )
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise UnsupportedModel(f"The weights in {folder} cannot be loaded: {_first_line(error)}") from None
    if torch.cuda.is_available() and not getattr(model, "hf_device_map", None):
        model.to("cuda")
    model.requires_grad_(False).eval()
    return BaseModel(model=model, tokenizer=load_tokenizer(folder), layer=layer, fingerprint=identity)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Tokenizer that pads on the left: the last prompt token of every row is then its last column."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(folder: Path) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UnsupportedModel(
            f"{folder} does not hold a model that transformers knows without remote code: {_first_line(error)}"
        ) from None
    architecture(config)
    return config


def model_folder(section: ModelSection) -> Path:
    """Local folder of the model; a hub name is fetched (or found in the cache) first."""
    folder = Path(section.path)
    if folder.is_dir():
        return folder.resolve()
    try:
        return Path(snapshot_download(section.path, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError):
        raise UnsupportedModel(
            f"model.path {section.path!r} is neither a folder here nor a hub model that can be fetched."
        ) from None


def fingerprint(folder: Path, *, files: Sequence[str] = IDENTIFYING_FILES) -> str:
    """Identity of the base model: every byte of config and tokenizer (`files`), and of each weight file its size, its
    header and the first, middle and last bytes of every tensor. A fine-tuned, edited or re-quantised model differs
    there; 140 GB need not be read."""
    digest = hashlib.sha256()
    for name in files:
        if (folder / name).exists():
            digest.update(name.encode() + (folder / name).read_bytes())
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UnsupportedModel(f"{folder} holds no safetensors weights; convert the model to safetensors first.")
    for file in weights:
        digest.update(f"{file.name}:{file.stat().st_size}".encode())
        try:
            with file.open("rb") as stream:
                header = stream.read(int.from_bytes(stream.read(8), "little"))
                digest.update(header)
                start = stream.tell()
                for name, tensor in json.loads(header).items():
                    if name != "__metadata__":
                        first, end = tensor["data_offsets"]
                        for offset in (first, (first + end - SAMPLE_BYTES) // 2, end - SAMPLE_BYTES):
                            stream.seek(start + max(offset, first))
                            digest.update(stream.read(min(SAMPLE_BYTES, end - first)))
        except (ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError):
            raise UnsupportedModel(f"{file} is not a whole safetensors file; fetch it again.") from None
    return digest.hexdigest()[:32]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
