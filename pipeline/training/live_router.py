"""The router of live releases, kept warm: it grows with each, and is fitted again when the bank has outgrown it."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from pipeline.config import Config
from pipeline.errors import ConfigError, CorruptObject, NotFound
from pipeline.models.base_model import BaseModel
from pipeline.models.encoder import wanted_encoder
from pipeline.models.readings import TextReader
from pipeline.storage.bank import BankEntry
from pipeline.storage.object_store import ObjectStore
from pipeline.training.candidate import unrelated_texts
from pipeline.training.contents import Contents
from pipeline.training.fresh import Extracted, fresh_states
from pipeline.training.prompt_reader import PromptReader
from pipeline.training.router_fit import fit_router
from pipeline.training.router_growth import grown, is_outgrown
from pipeline.training.shard_files import states_of_round


class LiveRouter:
    """What it remembers saves time alone: states, and what the base model made of calibration questions."""

    def __init__(self, config: Config, store: ObjectStore, base: BaseModel, *, texts: Sequence[str]) -> None:
        self._config, self._store, self._base, self._texts = config, store, base, texts
        self._states: dict[str, Tensor] = {}
        self._prompts = PromptReader(base)
        self._round_id = ""

    def stand_at(self, round_id: str) -> None:
        """Which round the releases go on from. Its questions are others: what was remembered would only take room."""
        if round_id != self._round_id:
            self._round_id, self._prompts = round_id, PromptReader(self._base)

    def with_entries(self, contents: Contents, new: Extracted, *, out_of_scope: Sequence[str]) -> Contents:
        """`contents`, whose last entries are the new ones, with a router that knows them."""
        section = self._config.router
        encoder = wanted_encoder(section)
        before = contents.entries[: len(contents.router.memory_E)]
        same_encoder = contents.router.encoder == (encoder.fingerprint if encoder else "")
        self._states |= {edit.edit_id: states for edit, states in zip(new.edits, new.states, strict=True)}
        outgrown = is_outgrown(len(contents.entries), fitted_on=contents.fitted_on)
        if not same_encoder or outgrown or _first_of_its_kind(contents.entries, known=len(before)):
            states = self._states_of(contents)
            if states is not None:
                router, _ = fit_router(
                    self._base,
                    contents.entries,
                    states,
                    unrelated=unrelated_texts(self._texts, out_of_scope, config=self._config),
                    section=section,
                    seed=self._config.training.seed,
                    embedded=TextReader(before, None).texts_of(contents.router) if same_encoder else {},
                    model=self._prompts,
                )
                return replace(contents, router=router, fitted_on=len(contents.entries))
        if not same_encoder:
            raise ConfigError(
                "The release's router was made with another sentence encoder than the one that live edits would use; "
                "run a round first."
            )
        router = grown(contents.router, contents.entries, new.states, encoder=encoder)
        return replace(contents, router=router)

    def _states_of(self, contents: Contents) -> list[Tensor] | None:
        """Of all entries; None where those of some are not to be had: then the router waits for the round."""
        wanted = {entry.edit_id for entry in contents.entries}
        found = {edit_id: states for edit_id, states in self._states.items() if edit_id in wanted}
        for read in [lambda: states_of_round(self._store, self._round_id)] + [
            lambda memory=memory: fresh_states(self._store, memory)
            for memory in contents.memories[contents.first_fresh :]
        ]:
            if len(found) < len(wanted):
                try:
                    found = read() | found
                except (NotFound, CorruptObject):
                    continue
        self._states = {edit_id: states for edit_id, states in found.items() if edit_id in wanted}
        return [found[entry.edit_id] for entry in contents.entries] if wanted <= set(found) else None


def _first_of_its_kind(entries: Sequence[BankEntry], *, known: int) -> bool:
    """Whether an entry without a subject joins where all had one: such entries share a bias, which is fitted."""
    has_subject_E = TextReader(entries, None).known_E
    return bool(has_subject_E[:known].all()) and not bool(has_subject_E.all())
