"""The candidate of a round: merged memories, and the router that reaches every living edit; not judged yet."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.config import Config
from pipeline.errors import ConfigError, CorruptObject, NotFound
from pipeline.models.base_model import BaseModel
from pipeline.models.loaded_release import decode_router, encode_router
from pipeline.models.readings import TextReader
from pipeline.storage.bank import BankEntry, decode_bank, encode_bank
from pipeline.storage.deltas import decode_memory, encode_matrix
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.releases import ObjectRef, Release
from pipeline.training.activation_fit import fit_thresholds
from pipeline.training.contents import put_named
from pipeline.training.contexts import cut_short
from pipeline.training.planning import Plan
from pipeline.training.router_fit import Calibration, fit_router
from pipeline.training.shard_files import read_bare_wordings, read_states
from pipeline.wise.routing import empty_router


@dataclass(frozen=True)
class FittedRouter:
    router: ObjectRef
    bank: ObjectRef
    threshold: float
    calibration: Calibration


@dataclass(frozen=True)
class Candidate:
    release: Release
    calibration: Calibration
    threshold: float


def route(
    base: BaseModel, store: ObjectStore, plan: Plan, standing: Release | None, *, texts: Sequence[str], config: Config
) -> FittedRouter:
    """Fit the router over all memories' living edits and store it with its bank. It reads the prompts' states, not the
    memories, so it may be fitted while these are trained. `texts`: what the base model writes by itself.

    Raises ConfigError when this process would read with another sentence encoder than the plan says."""
    entries, states = _living(store, plan)
    if config.router.method == "activation":  # Δ_act is the memories' own; nothing is fitted before they are there
        router, calibration = empty_router(int(base.model.config.hidden_size)), Calibration([], {})
    else:
        router, calibration = fit_router(
            base,
            entries,
            states,
            unrelated=_unrelated(plan, texts, config),
            section=config.router,
            seed=config.training.seed,
            embedded=_embedded(store, standing, encoder=plan.encoder),
        )
        if entries and router.encoder != plan.encoder:
            raise ConfigError(
                "The machine that fits the router has another sentence encoder than the one the round was started on; "
                "install the same extra `encoder` on all of them, or set router.signals to [keys, subject]."
            )
    return FittedRouter(
        router=put_named(store, "routers", encode_router(router), suffix="safetensors"),
        bank=put_named(store, "banks", encode_bank(entries), suffix="parquet"),
        threshold=router.threshold,
        calibration=calibration,
    )


def assemble(
    base: BaseModel,
    store: ObjectStore,
    plan: Plan,
    memories: Sequence[ObjectRef],
    fitted: FittedRouter,
    *,
    texts: Sequence[str],
    config: Config,
    parent: int | None,
) -> Candidate:
    """The release that memories and router make. Nothing is published; its scores are still empty."""
    entries = decode_bank(store.read(fitted.bank.path, sha256=fitted.bank.sha256))
    thresholds, calibration, threshold = None, fitted.calibration, fitted.threshold
    if config.router.method == "activation":
        read = [decode_memory(store.read(reference.path, sha256=reference.sha256)) for reference in memories]
        thresholds, calibration = fit_thresholds(
            base, entries, read, unrelated=_unrelated(plan, texts, config), ratio=config.router.activation_ratio
        )
        threshold = 1.0  # Δ_act is reported relative to ε, since every memory has its own
    release = Release(
        number=(parent or 0) + 1,
        parent=parent,
        round_id=plan.round_id,
        log_version=plan.log_version,
        model_fingerprint=base.fingerprint,
        layer=base.layer,
        memories=tuple(memories),
        router=fitted.router,
        bank=fitted.bank,
        readouts=_readouts(store, plan, memories) if config.router.addressing == "matched" else None,
        thresholds=thresholds,
        whole_prompt=config.training.procedure == "paper",
        edits=len(entries),
    )
    return Candidate(release=release, calibration=calibration, threshold=threshold)


def unrelated_texts(texts: Sequence[str], out_of_scope: Iterable[str], *, config: Config) -> list[str]:
    """What no edit may answer: text of the base model, also cut short, and what edits bring."""
    return [*texts, *cut_short(texts, seed=config.training.seed), *dict.fromkeys(out_of_scope)]


def _unrelated(plan: Plan, texts: Sequence[str], config: Config) -> list[str]:
    out_of_scope = (text for edit in plan.live_edits for text in edit.out_of_scope)
    return unrelated_texts(texts, out_of_scope, config=config)


def _living(store: ObjectStore, plan: Plan) -> tuple[list[BankEntry], list[Tensor]]:
    """Bank entries of the edits that still are what their slot says, with their routing states (W × D)."""
    entries, states = [], []
    for index, memory in enumerate(plan.memories):
        for shard in memory.shards:
            read = zip(shard.edits, read_states(store, shard), read_bare_wordings(store, shard), strict=True)
            for edit, states_WD, bare in read:
                if edit.edit_id in memory.live:
                    entry = BankEntry(
                        edit_id=edit.edit_id,
                        prompt=edit.prompt,
                        target=edit.target,
                        subject=edit.subject,
                        memory=index,
                        target_ids=bare.target_ids,
                    )
                    entries.append(entry)
                    states.append(states_WD)
    return entries, states


def _readouts(store: ObjectStore, plan: Plan, memories: Sequence[ObjectRef]) -> ObjectRef | None:
    """ΔW·A_t of every living edit at each of its target tokens, one below the other in the bank's order."""
    rows: list[Tensor] = []
    for memory, reference in zip(plan.memories, memories, strict=True):
        if not memory.live:
            continue
        delta_DF = torch.from_numpy(decode_memory(store.read(reference.path, sha256=reference.sha256)).matrix.copy())
        for shard in memory.shards:
            bare = zip(shard.edits, read_bare_wordings(store, shard), strict=True)
            rows += [wording.keys_TF @ delta_DF.T for edit, wording in bare if edit.edit_id in memory.live]
    return put_named(store, "readouts", encode_matrix(torch.cat(rows).numpy()), suffix="parquet") if rows else None


def _embedded(store: ObjectStore, standing: Release | None, *, encoder: str) -> dict[str, Tensor]:
    """Texts whose embeddings the standing release holds: most edits stay from one round to the next. One that cannot
    be read costs time and nothing else."""
    if standing is None or not encoder:
        return {}
    try:
        router = decode_router(
            store.read(standing.router.path, sha256=standing.router.sha256), device=torch.device("cpu")
        )
        entries = decode_bank(store.read(standing.bank.path, sha256=standing.bank.sha256))
    except (CorruptObject, NotFound):
        return {}
    return TextReader(entries, None).texts_of(router) if router.encoder == encoder else {}
