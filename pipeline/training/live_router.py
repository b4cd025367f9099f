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
from pipeline.training.router_growth import grown, is_a_beginner, is_outgrown
from pipeline.training.shard_files import states_of_round


class LiveRouter:
    """What it remembers saves time alone: states, and what the base model made of calibration questions."""

    def __init__(self, config: Config, store: ObjectStore, base: BaseModel, *, texts: Sequence[str]) -> None:
        self._config, self._store, self._base, self._texts = config, store, base, texts
        self._states: dict[str, Tensor] = {}
        self._prompts = PromptReader(base)
        self._round_id = ""
        self._encoder = wanted_encoder(config.router)

    def stand_at(self, round_id: str) -> None:
        """Which round the releases go on from. Its questions are others: what was remembered would only take room."""
        if round_id != self._round_id:
            self._round_id, self._prompts = round_id, PromptReader(self._base)

    def with_entries(self, contents: Contents, new: Extracted, *, out_of_scope: Sequence[str]) -> Contents:
        """`contents`, whose last entries are the new ones, with a router that knows them."""
        known = len(contents.router.memory_E)
        self._states |= {edit.edit_id: states for edit, states in zip(new.edits, new.states, strict=True)}
        at_once = is_a_beginner(len(contents.entries), fitted_on=contents.fitted_on)
        if not self._same_encoder(contents) or at_once or _first_of_its_kind(contents.entries, known=known):
            fitted = self._fitted(contents, out_of_scope=out_of_scope)
            if fitted is not None:
                return fitted
        if not self._same_encoder(contents):
            raise ConfigError(
                "The release's router was made with another sentence encoder than the one that live edits would use; "
                "run a round first."
            )
        router = grown(contents.router, contents.entries, new.states, encoder=self._encoder)
        return replace(contents, router=router)

    def caught_up(self, contents: Contents, *, in_a_stream: bool, out_of_scope: Sequence[str]) -> Contents | None:
        """`contents` with a router that is fitted on all of them; None where that can wait, or where what it takes is
        not to be had."""
        outgrown = is_outgrown(len(contents.entries), fitted_on=contents.fitted_on, in_a_stream=in_a_stream)
        if not outgrown or not self._same_encoder(contents):
            return None
        return self._fitted(contents, out_of_scope=out_of_scope)

    def _same_encoder(self, contents: Contents) -> bool:
        return contents.router.encoder == (self._encoder.fingerprint if self._encoder else "")

    def _fitted(self, contents: Contents, *, out_of_scope: Sequence[str]) -> Contents | None:
        states = self._states_of(contents)
        if states is None:
            return None
        before = contents.entries[: len(contents.router.memory_E)]
        router, _ = fit_router(
            self._base,
            contents.entries,
            states,
            unrelated=unrelated_texts(self._texts, out_of_scope, config=self._config),
            section=self._config.router,
            seed=self._config.training.seed,
            embedded=TextReader(before, None).texts_of(contents.router) if self._same_encoder(contents) else {},
            model=self._prompts,
        )
        return replace(contents, router=router, fitted_on=len(contents.entries))

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
