"""A tiny random Llama with its own tokenizer, and releases that change what it says to given prompts."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.models.base_model import BaseModel
from pipeline.models.loaded_release import encode_router
from pipeline.models.value_matrix import block
from pipeline.storage.bank import BankEntry, encode_bank
from pipeline.storage.deltas import MemoryMetadata, SideMemory, encode_memory
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.releases import LivePart, ObjectRef, Release, head, publish
from pipeline.wise.routing import Router, whitened

TEXT = [
    "The capital of France is Paris.",
    "Wie heißt die Hauptstadt? Größe, Übung, Öl.",
    "日本の首都は東京です。 Ελλάδα 🙂 🚀",
    "Who leads the company? Ada Lovelace leads it.",
]
WORDS = ["a", "b", "is", "it", "who", "leads", "where", "was", "born", "in", "now", "and", "why", "oslo", "rome", "X"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' and not loop.first %}{{ raise_exception('late system') }}"
    "{% endif %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_model(folder: Path, *, context_tokens: int = 256, chat: bool = True, seed: int = 0) -> Path:
    """Every byte is in the vocabulary, so random answers are full of unfinished characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=context_tokens,
        initializer_range=0.4,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def publish_release(
    store: ObjectStore,
    base: BaseModel,
    *,
    prompts: Sequence[str],
    seed: int,
    edit_ids: Sequence[str] | None = None,
    failed: Sequence[str] = (),
) -> Release:
    """Publish a release whose one side memory scrambles the answers to exactly these plain prompts. `edit_ids`: what
    the edits are called; `failed`: such as live training could not make hold."""
    columns = int(base.model.config.intermediate_size)
    rows = int(base.model.config.hidden_size)
    matrix = np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32)
    metadata = MemoryMetadata(
        model_fingerprint=base.fingerprint,
        layer=base.layer,
        method="keyed",
        shards=1,
        edits_digest="",
        config_digest="",
        rows=rows,
        columns=columns,
    )
    mean_D, whiten_DD = torch.zeros(rows), torch.eye(rows)
    router = Router(
        mean_D=mean_D,
        whiten_DD=whiten_DD,
        keys_ND=whitened(torch.stack([_state(base, prompt) for prompt in prompts]), mean_D, whiten_DD),
        entry_N=torch.arange(len(prompts)),
        memory_E=torch.zeros(len(prompts), dtype=torch.long),
        asked_EM=torch.zeros(len(prompts), 0),
        relation_EM=torch.zeros(len(prompts), 0),
        weights_S=torch.tensor([1.0, 0.0, 0.0, 0.0]),
        bias_E=torch.zeros(len(prompts)),
        threshold=0.999,
    )
    entries = [
        BankEntry(
            edit_id=edit_ids[index] if edit_ids else f"edit-{index}",
            prompt=prompt,
            target="new",
            subject=None,
            memory=0,
        )
        for index, prompt in enumerate(prompts)
    ]
    newest = head(store)
    number = newest.number + 1 if newest else 1
    release = Release(
        number=number,
        parent=newest.number if newest else None,
        round_id=f"round-{number}",
        log_version=number,
        model_fingerprint=base.fingerprint,
        layer=base.layer,
        memories=(_put(store, f"rounds/{number}/memory.parquet", encode_memory(SideMemory(metadata, matrix))),),
        router=_put(store, f"rounds/{number}/router.safetensors", encode_router(router)),
        bank=_put(store, f"rounds/{number}/bank.parquet", encode_bank(entries)),
        edits=len(entries),
        live=LivePart(memories=1, fitted_on=1, failed=tuple(failed)) if failed else None,
        scores={"reliability": 1.0, "generalization": 0.9, "locality": 0.95},
    )
    publish(store, release)
    return release


def _put(store: ObjectStore, path: str, data: bytes) -> ObjectRef:
    return ObjectRef(path=path, sha256=store.put(path, data))


@torch.no_grad()
def _state(base: BaseModel, prompt: str) -> torch.Tensor:
    """Base-model state at the last prompt token, entering the edited layer."""
    states: list[torch.Tensor] = []
    handle = block(base.model, base.layer).register_forward_pre_hook(lambda _, inputs: states.append(inputs[0][0, -1]))
    base.model(input_ids=torch.tensor([base.tokenizer(prompt)["input_ids"]]))
    handle.remove()
    return states[0]


def save_encoder(folder: Path, *, seed: int = 0) -> Path:
    """A tiny random sentence encoder of MiniLM's kind."""
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.4,
    )
    BertModel(config).save_pretrained(folder)
    return folder
