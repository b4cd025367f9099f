"""The two steps of one shard, in process: extraction with the whole base model, training with the suffix alone."""

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.config import Config
from pipeline.models.base_model import BaseModel
from pipeline.storage.deltas import DeltaMetadata
from pipeline.storage.object_store import ObjectStore
from pipeline.training.activations import Activations, extract
from pipeline.training.addressing import read_matched
from pipeline.training.edit_stream import EditStream, choose_unrelated, extract_prompts
from pipeline.training.fit import Progress, fit
from pipeline.training.fit_paper import fit_paper
from pipeline.training.planning import MemoryPlan, ShardPlan
from pipeline.training.shard_files import BareWording, read_keys, shard_mask, write_delta, write_keys, write_states
from pipeline.training.tokens import choose_prefixes, wordings


def extract_shard(
    base: BaseModel, store: ObjectStore, shard: ShardPlan, *, prefix_pool: Sequence[str], config: Config
) -> Activations | EditStream:
    """Run the base model over every wording of the shard's edits; the keys at which the memory will be read and the
    states go to the store, and all that training needs is returned, the bare wordings first. May be repeated: the same
    bytes are written."""
    asked = [
        wordings(
            edit,
            base.tokenizer,
            prefixes=choose_prefixes(edit, prefix_pool, config.training.prefixes),
            max_tokens=base.max_tokens,
        )
        for edit in shard.edits
    ]
    flat = list(chain.from_iterable(asked))
    by_the_paper = config.training.procedure == "paper"
    activations = extract(base, flat, whole_prompt=by_the_paper)
    own_NT = torch.ones_like(activations.labels_NT, dtype=torch.bool)
    if config.router.addressing == "matched":
        activations, own_NT = read_matched(activations, asked)
    kinds = {kind: torch.tensor([wording.kind == kind for wording in flat]) for kind in ("bare", "chat", "prefixed")}
    write_keys(
        store,
        shard,
        bare=[
            BareWording(target_ids=of_edit[0].target_ids, keys_TF=activations.select(row).target_keys_MF())
            for of_edit, row in zip(asked, kinds["bare"].nonzero(), strict=True)
        ],
        chat_MF=activations.target_keys_MF(own_NT & kinds["chat"][:, None]),
        prefixed_MF=activations.target_keys_MF(own_NT & kinds["prefixed"][:, None]),
    )
    write_states(store, shard, activations.states_ND, wordings=[len(of_edit) for of_edit in asked])
    if not by_the_paper:
        return activations.select(torch.cat([kinds["bare"].nonzero(), (~kinds["bare"]).nonzero()])[:, 0])
    subjects = [edit.subject for edit in shard.edits]
    unrelated = choose_unrelated(prefix_pool, config.training.unrelated_prompts, subjects)
    return EditStream(activations, tuple(map(len, asked)), extract_prompts(base, unrelated))


def train_shard(
    suffix: PreTrainedModel,
    store: ObjectStore,
    memory: MemoryPlan,
    shard: ShardPlan,
    extracted: Activations | EditStream,
    *,
    config: Config,
    fingerprint: str,
    layer: int,
) -> Iterator[Progress]:
    """Fit the shard and store its delta; the siblings' keys must be in the store. May be repeated and killed anywhere:
    the delta appears whole or not at all."""
    activations = extracted.activations if isinstance(extracted, EditStream) else extracted
    metadata = DeltaMetadata(
        model_fingerprint=fingerprint,
        layer=layer,
        seed=memory.seed,
        mask_index=shard.index,
        mask_count=len(memory.shards),
        masks=config.shards.masks,
        density=config.shards.rho,
        dtype="float32",
        edits_digest=shard.digest,
        config_digest=config.digest("shards", "training"),
        rows=activations.hidden_NTD.shape[2],
        columns=activations.keys_NTF.shape[2],
    )
    mask_DF = shard_mask(metadata)
    for item in _fit(suffix, store, memory, shard, extracted, mask_DF=mask_DF, config=config):
        if isinstance(item, Progress):
            yield item
        else:
            write_delta(store, shard, item.cpu(), mask_DF, metadata=metadata)


def _fit(
    suffix: PreTrainedModel,
    store: ObjectStore,
    memory: MemoryPlan,
    shard: ShardPlan,
    extracted: Activations | EditStream,
    *,
    mask_DF: Tensor,
    config: Config,
) -> Iterator[Progress | Tensor]:
    """By the procedure that the shard was extracted for."""
    device, seed = suffix.device, config.training.seed + shard.index
    if isinstance(extracted, EditStream):
        stream = extracted.to(device)
        return fit_paper(suffix, stream, mask_DF=mask_DF.to(device), training=config.training, seed=seed)
    sibling_keys_MF = torch.zeros(0, mask_DF.shape[1])
    if config.training.sibling_penalty and len(memory.shards) > 1:
        others = [other for other in memory.shards if other.index != shard.index]
        sibling_keys_MF = torch.cat([read_keys(store, other, prefixed=False) for other in others])
    return fit(
        suffix,
        extracted.to(device),
        mask_DF=mask_DF.to(device),
        sibling_keys_MF=sibling_keys_MF.to(device),
        sibling_penalty=config.training.sibling_penalty,
        training=config.training,
        seed=seed,
        bare=len(shard.edits),
    )
