"""An exported release as transformers' Auto classes load it: the base model's own class, whose `generate` is routed.

    import pipeline.export
    model = AutoModelForCausalLM.from_pretrained(folder)

transformers has no entry points: a model type that it does not bring along is known once somebody registers it, so
that import is needed. No code lies in the folder, and none of it is run. The loaded model is a subclass of the base
model's class with the base model's weights under their own names; a forward outside `generate` is the unedited model's.

`generate` decides once per row, at prefill, on the last prompt token, and holds the decision (`models/routed_ffn.py`).
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.generation import GenerationMode

from pipeline.errors import ConfigError, ModelChanged, UnsupportedModel
from pipeline.export.prompt_text import PromptReader
from pipeline.models.base_model import BaseModel, fingerprint, load_tokenizer
from pipeline.models.loaded_release import LoadedRelease, load_release
from pipeline.models.routed_ffn import Decision, RoutedBatch
from pipeline.models.value_matrix import ARCHITECTURES
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.releases import Release, read_release

MODEL_TYPE = "wiseline"
RELEASE_FOLDER, IDENTITY_FILE = "wiseline", "export.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
# Hooks lie on shared modules: while one thread generates, another one's forward must not pass through them.
ONE_AT_A_TIME = threading.RLock()


class WiselineConfig(PretrainedConfig):  # type: ignore[misc]  # transformers has no types here
    """What `"model_type": "wiseline"` in a config.json stands for: the base model's config class."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        config_class, _ = routed_classes(config_dict.get("base_model_type", ""))
        return config_class.from_dict(config_dict, **kwargs)


class RoutedGeneration:
    """Mixed into the base model's class. `decisions`: those of the last `generate`, one per row."""

    decisions: list[Decision]
    _base: BaseModel
    _store: ObjectStore
    _release: Release
    _reader: PromptReader
    _loaded: tuple[torch.dtype, torch.device, LoadedRelease]

    @classmethod
    def from_pretrained(cls, folder: str | Path, *arguments: Any, **options: Any) -> Any:
        """Raises ModelChanged when weights or tokenizer are not those that were exported, and what `load_release`
        raises."""
        if not Path(folder).is_dir():
            raise UnsupportedModel(f"{folder} is no folder here; fetch the exported folder as a whole and name it.")
        release = exported_release(Path(folder))
        loaded = super().from_pretrained(folder, *arguments, **options)  # type: ignore[misc]
        (loaded[0] if isinstance(loaded, tuple) else loaded)._take_up(Path(folder), release)
        return loaded

    def _take_up(self, folder: Path, release: Release) -> None:
        self._base = BaseModel(
            model=self, tokenizer=load_tokenizer(folder), layer=release.layer, fingerprint=release.model_fingerprint
        )
        self._store, self._release = ObjectStore(str(folder / RELEASE_FOLDER)), release
        self._reader = PromptReader(self._base.tokenizer)
        self.decisions = []
        self._loaded_release()

    def _loaded_release(self) -> LoadedRelease:
        """The release where the model is now, in its dtype."""
        dtype, device = self._base.model.dtype, self._base.layer_device
        if getattr(self, "_loaded", (None, None))[:2] != (dtype, device):
            self._loaded = (dtype, device, load_release(self._store, self._release, self._base))
        return self._loaded[2]

    @torch.no_grad()
    def generate(
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, **options: Any
    ) -> Any:
        """As any causal model's, greedy or sampled, from prompts that are padded on the left. Raises ConfigError where
        a way of generating is asked for that cannot be routed."""
        settled, _ = self._prepare_generation_config(generation_config, **options)  # type: ignore[attr-defined]
        ids_BT = inputs if inputs is not None else options.get("input_ids")
        _check_can_be_routed(ids_BT, settled, options)
        assert ids_BT is not None
        mask_BT = options.pop("attention_mask", None)
        if mask_BT is None:
            mask_BT = _attended(ids_BT, settled)
        if not bool(mask_BT[:, -1].all()):
            raise ConfigError("Prompts are to be padded on the left; set tokenizer.padding_side = 'left'.")
        copies = settled.num_return_sequences or 1
        prompts = [ids[mask.bool()].tolist() for ids, mask in zip(ids_BT, mask_BT, strict=True) for _ in range(copies)]
        batch = RoutedBatch(
            self._base,
            self._loaded_release(),
            texts=[self._reader.text(prompt) for prompt in prompts],
            routed=[True] * len(prompts),
            prompt_tokens=[len(prompt) for prompt in prompts],
        )
        with ONE_AT_A_TIME, batch.installed(), self._followed_by(batch):
            generated = super().generate(  # type: ignore[misc]
                inputs, generation_config=generation_config, attention_mask=mask_BT, **options
            )
            self.decisions = batch.decisions
        return generated

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        with ONE_AT_A_TIME:
            return super().__call__(*arguments, **options)  # type: ignore[misc]

    def save_pretrained(self, *arguments: Any, **options: Any) -> None:
        raise ConfigError("A loaded export is not saved again; copy its folder, which holds the release too.")

    @contextmanager
    def _followed_by(self, batch: RoutedBatch) -> Iterator[None]:
        """Every forward after the first tells the batch which tokens it reads."""

        def follow(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            if batch.decisions:
                tokens = options["input_ids"][:, -1].tolist()
                batch.go_on(range(len(tokens)), tokens)

        handle = self.register_forward_pre_hook(follow, with_kwargs=True)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            handle.remove()


@cache
def routed_classes(base_model_type: str) -> tuple[Any, Any]:
    """Config and model class of exports of such base models, known to the Auto classes from now on."""
    if base_model_type not in ARCHITECTURES:
        raise UnsupportedModel(
            f"The folder was exported from a model of type {base_model_type!r}, which this wiseline does not know; "
            f"it knows {', '.join(ARCHITECTURES)}."
        )
    base_config = CONFIG_MAPPING[base_model_type]
    base_class = MODEL_FOR_CAUSAL_LM_MAPPING[base_config]
    config_class = type(f"Wiseline{base_config.__name__}", (base_config,), {"model_type": MODEL_TYPE})
    model_class = type(f"Wiseline{base_class.__name__}", (RoutedGeneration, base_class), {"config_class": config_class})
    AutoModelForCausalLM.register(config_class, model_class)
    # How names in weight files become names in the model; a class of our own does not inherit it.
    names = get_checkpoint_conversion_mapping(base_class.__name__) or get_checkpoint_conversion_mapping(base_model_type)
    if names is not None:
        register_checkpoint_conversion_mapping(model_class.__name__, names, overwrite=True)
    return config_class, model_class


def register() -> None:
    AutoConfig.register(MODEL_TYPE, WiselineConfig, exist_ok=True)


def exported_release(folder: Path) -> Release:
    """The release in an exported folder. Raises ModelChanged where the model beside it is another one."""
    try:
        identity = json.loads((folder / RELEASE_FOLDER / IDENTITY_FILE).read_text())
    except (OSError, ValueError):
        raise UnsupportedModel(
            f"{folder} holds no release; export it again, or copy the exported folder as a whole."
        ) from None
    if fingerprint(folder, files=TOKENIZER_FILES) != identity["model"]:
        raise ModelChanged(
            f"Weights or tokenizer in {folder} are not those that release {identity['release']} was exported with; "
            "export it again."
        )
    return read_release(ObjectStore(str(folder / RELEASE_FOLDER)), identity["release"])


def _check_can_be_routed(ids_BT: Tensor | None, settled: GenerationConfig, options: dict[str, Any]) -> None:
    """What would decide in the wrong place, or move rows without saying so, is refused."""
    mode = settled.get_generation_mode(options.get("assistant_model"))
    refused = {
        "a prompt without input_ids": ids_BT is None or options.get("inputs_embeds") is not None,
        f"{mode.value.replace('_', ' ')}": mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE),
        "custom_generate": options.get("custom_generate") is not None,
        "past_key_values": options.get("past_key_values") is not None,
        "prefill_chunk_size": settled.prefill_chunk_size is not None,
        "use_cache=False": settled.use_cache is False,
        f"cache_implementation={settled.cache_implementation}": settled.cache_implementation not in (None, "dynamic"),
        "guidance_scale": settled.guidance_scale not in (None, 1, 1.0),
    }
    for what, asked in refused.items():
        if asked:
            raise ConfigError(f"A routed model does not generate with {what}; leave it out (greedy and sampling work).")


def _attended(ids_BT: Tensor, settled: GenerationConfig) -> Tensor:
    """The mask where none is given: padding is what is padded with, unless that token also ends texts."""
    pad, ends = settled.pad_token_id, settled.eos_token_id
    told_apart = pad is not None and pad not in (ends if isinstance(ends, list) else [ends])
    return (ids_BT != pad).long() if told_apart else torch.ones_like(ids_BT)
