"""A fresh memory: what edits are taught into by the handful, between two rounds.

A batch of posted edits is extracted and fitted by the code of a round's shards, with three differences. It is not
merged with others, so it needs no subspace of its own: the whole matrix may move, which takes a third of the steps. It
is trained on from what the memory already says, with the memory's earlier edits beside it so that these are not undone.
And fewer wordings and steps must do. A memory that is full is followed by another; the next round trains the same edits
as shards of full memories.
"""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.config import Config
from pipeline.edits import Edit
from pipeline.models.base_model import BaseModel
from pipeline.storage.deltas import MemoryMetadata, SideMemory, decode_matrix, encode_matrix, encode_memory
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.releases import ObjectRef
from pipeline.training.activations import Activations, joined
from pipeline.training.fit import Progress, fit, target_losses
from pipeline.training.planning import plan_shard
from pipeline.training.shard import extract_shard
from pipeline.training.shard_files import BareWording, read_bare_wordings, read_states

# Measured on the demo: docs/decisions/0023-live-edits.md.
LIVE_PREFIXES = 1
# Below ln 2 nats every token of a target is likelier than all others together: greedy answers cannot differ from it.
LIVE_STOP_LOSS = 0.5
FIRST_STEPS, LAST_STEPS = 40, 120  # most edits hold after 15; a round takes training.max_steps


@dataclass(frozen=True)
class Extracted:
    """Edits as the base model reads them; all but the activations are in the edits' order."""

    edits: tuple[Edit, ...]
    activations: Activations
    owner_N: Tensor  # whose wording a row of the activations is
    bare: tuple[BareWording, ...]
    states: tuple[Tensor, ...]  # W × D each

    def and_then(self, more: "Extracted") -> "Extracted":
        return Extracted(
            edits=self.edits + more.edits,
            activations=joined([self.activations, more.activations]),
            owner_N=torch.cat([self.owner_N, more.owner_N + len(self.edits)]),
            bare=self.bare + more.bare,
            states=self.states + more.states,
        )

    def rows(self, where_N: Tensor) -> "Extracted":
        """Every edit, but only these of the wordings."""
        rows_N = where_N.nonzero()[:, 0]
        return replace(self, activations=self.activations.select(rows_N), owner_N=self.owner_N[rows_N])

    def only(self, edit_ids: Collection[str]) -> "Extracted | None":
        """Without the edits that live no more: what they say may contradict those that took their place."""
        kept = [place for place, edit in enumerate(self.edits) if edit.edit_id in edit_ids]
        if not kept:
            return None
        rows_N = torch.isin(self.owner_N, torch.tensor(kept)).nonzero()[:, 0]
        place_E = torch.full((len(self.edits),), -1)
        place_E[kept] = torch.arange(len(kept))
        return Extracted(
            edits=tuple(self.edits[place] for place in kept),
            activations=self.activations.select(rows_N),
            owner_N=place_E[self.owner_N[rows_N]],
            bare=tuple(self.bare[place] for place in kept),
            states=tuple(self.states[place] for place in kept),
        )


@dataclass(frozen=True)
class FreshMemory:
    """`taught`: the edits, with those of their wordings that hold; later batches are trained beside these. `unsure`:
    ids of the edits of which a wording does not."""

    taught: Extracted
    delta_DF: Tensor
    unsure: frozenset[str]

    @property
    def readouts(self) -> dict[str, Tensor]:
        """Edit id → what the memory says at the edit's own keys, T × D."""
        return {
            edit.edit_id: bare.keys_TF @ self.delta_DF.T
            for edit, bare in zip(self.taught.edits, self.taught.bare, strict=True)
        }


def extract_edits(
    base: BaseModel, store: ObjectStore, edits: Sequence[Edit], *, texts: Sequence[str], config: Config
) -> Extracted:
    """By the code that extracts a round's shards. `texts`: what the base model writes by itself."""
    training = config.training.model_copy(update={"prefixes": min(LIVE_PREFIXES, config.training.prefixes)})
    config = config.model_copy(update={"training": training})
    shard = plan_shard(edits, config=config, fingerprint=base.fingerprint, layer=base.layer)
    activations = extract_shard(base, store, shard, prefix_pool=texts, config=config)
    assert isinstance(activations, Activations)  # the paper's procedure has no live edits
    bare, states = read_bare_wordings(store, shard), read_states(store, shard)
    # The bare wordings come first, then the others, edit by edit.
    others_E = torch.tensor([len(states_WD) - 1 for states_WD in states])
    owner_N = torch.cat([torch.arange(len(edits)), torch.repeat_interleave(torch.arange(len(edits)), others_E)])
    return Extracted(tuple(edits), activations, owner_N, tuple(bare), tuple(states))


def teach(
    suffix: PreTrainedModel, new: Extracted, *, memory: FreshMemory | None, steps: int, config: Config
) -> FreshMemory:
    """`memory` with the new edits, or one that holds them alone. Raises TrainingDiverged."""
    device = suffix.device
    D, F = new.activations.hidden_NTD.shape[2], new.activations.keys_NTF.shape[2]
    taught = new if memory is None else memory.taught.and_then(new)
    activations = taught.activations.to(device)
    stop_loss = max(LIVE_STOP_LOSS, config.training.stop_loss)
    training = config.training.model_copy(update={"max_steps": steps, "stop_loss": stop_loss})
    *_, last, delta_DF = fit(
        suffix,
        activations,
        mask_DF=torch.ones(D, F, dtype=torch.bool, device=device),
        sibling_keys_MF=torch.zeros(0, F, device=device),
        sibling_penalty=0.0,
        training=training,
        seed=config.training.seed,
        bare=len(new.edits) if memory is None else 0,
        start_DF=None if memory is None else memory.delta_DF.to(device),
    )
    assert isinstance(last, Progress) and not isinstance(delta_DF, Progress)
    if last.holding == last.wordings:
        holds_N = torch.ones(len(activations), dtype=torch.bool)
    else:
        holds_N = target_losses(suffix, activations, delta_DF, batch=training.batch_prompts) <= training.stop_loss
    unsure = {taught.edits[owner].edit_id for owner in taught.owner_N[~holds_N].tolist()}
    unsure |= memory.unsure if memory else set()
    return FreshMemory(taught.rows(holds_N), delta_DF.cpu(), frozenset(unsure))


def store_memory(store: ObjectStore, memory: FreshMemory, *, base: BaseModel, config: Config) -> ObjectRef:
    """Named by its bytes. The edits' states lie beside it: a router that is fitted later needs them."""
    taught = memory.taught.edits
    rows, columns = memory.delta_DF.shape
    metadata = MemoryMetadata(
        model_fingerprint=base.fingerprint,
        layer=base.layer,
        method="fresh",
        shards=1,
        edits_digest=hashlib.sha256(",".join(edit.edit_id for edit in taught).encode()).hexdigest()[:24],
        config_digest=config.digest("shards", "training"),
        rows=rows,
        columns=columns,
    )
    data = encode_memory(SideMemory(metadata, memory.delta_DF.numpy()))
    path = f"memories/{hashlib.sha256(data).hexdigest()[:24]}-fresh.parquet"
    states = encode_matrix(
        torch.cat(memory.taught.states).numpy(),
        {"edits": [[edit.edit_id, len(of_edit)] for edit, of_edit in zip(taught, memory.taught.states, strict=True)]},
    )
    store.put(_states_path(path), states)
    return ObjectRef(path=path, sha256=store.put(path, data))


def fresh_states(store: ObjectStore, memory: ObjectRef) -> dict[str, Tensor]:
    """Edit id → W × D states of every edit in a fresh memory, whoever made it. Raises NotFound and CorruptObject."""
    states_ND, description = decode_matrix(store.read(_states_path(memory.path)))
    edit_ids, wordings = zip(*description["edits"], strict=True)
    return dict(zip(edit_ids, torch.split(torch.from_numpy(states_ND.copy()), list(wordings)), strict=True))


def _states_path(memory: str) -> str:
    return memory.replace("-fresh.parquet", "-fresh-states.parquet")
