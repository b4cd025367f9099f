"""Live edits: what was posted to an endpoint becomes a release within seconds, without a round.

One step looks at the log and at the head. Posted edits that the head does not hold are taught into a fresh memory, the
router grows, they are asked, and what holds is published. A router that its bank has outgrown is fitted again in a step
of its own (`router_growth.py` says when). Nothing is kept that the store does not say: a step may be killed anywhere
and taken again by another process. Warm state only saves time.
"""

from collections.abc import Sequence

from transformers import PreTrainedModel

from pipeline.config import Config
from pipeline.edits import Edit
from pipeline.errors import ConfigError, TrainingDiverged
from pipeline.evaluation.holding import failing
from pipeline.logs import logger
from pipeline.models.base_model import BaseModel
from pipeline.models.loaded_release import load_release
from pipeline.models.side_memories import MemoryCache
from pipeline.storage.bank import BankEntry
from pipeline.storage.edit_log import EditLog
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.releases import NO_ROUND, LivePart, ObjectRef, OfModel, Release, head, publish
from pipeline.storage.slots import Slots
from pipeline.training.contents import Contents, no_contents, read_contents, write_contents
from pipeline.training.fresh import FIRST_STEPS, LAST_STEPS, Extracted, FreshMemory, extract_edits, store_memory, teach
from pipeline.training.live_plan import LivePlan, plan_live
from pipeline.training.live_router import LiveRouter
from pipeline.training.tokens import fits

log = logger(__name__)

LARGE_BATCH = 1 / 8  # of what a memory holds; measured against 1 and 1/4 (docs/experiments.md)


class LiveEditor:
    """`suffix`: the layers that train; `texts`: what the base model writes by itself."""

    def __init__(
        self,
        config: Config,
        store: ObjectStore,
        base: BaseModel,
        suffix: PreTrainedModel,
        *,
        texts: Sequence[str],
    ) -> None:
        self._config, self._store, self._base, self._texts, self._suffix = config, store, base, texts, suffix
        self._capacity = config.shards.edits_per_shard * config.shards.shards_per_memory  # of any memory
        self._log = EditLog(store)
        self._slots = Slots(self._log)
        self._of_model = OfModel(base.fingerprint, base.layer)
        self._done: tuple[int | None, int] | None = None  # version of the log and head at which nothing was left to do
        self._open: tuple[ObjectRef, FreshMemory] | None = None
        self._router = LiveRouter(config, store, base, texts=texts)
        self._memories = MemoryCache(base)

    def step(self) -> Release | None:
        """Publish the next live release; None when the head says all that was posted.

        Raises RoundConflict where somebody else published first: the next step goes on from there."""
        standing = head(self._store, self._of_model)
        self._slots.catch_up()
        version = self._slots.version
        at = (version, standing.number if standing else 0)
        if version is None or at == self._done:
            return None
        contents = self._contents(standing)
        known = standing.live.failed if standing and standing.live else ()
        if standing and self._is_rolled_back(standing):
            self._done = at
            return None
        plan = self._plan(contents, known)
        self._router.stand_at(standing.round_id if standing else NO_ROUND)
        waits = bool(plan.new) or len(plan.kept) < len(contents.entries) or plan.failed != known
        fitted, failed = None, set[str]()
        if plan.new or not waits:  # a retraction alone does not wait for the router
            fitted = self._router.caught_up(contents, in_a_stream=waits, out_of_scope=self._out_of_scope())
        if fitted is not None and standing is not None:
            contents = fitted
            if waits:  # until the next step: an answer that is superseded leaves with its successor
                version = standing.log_version
        elif waits:
            contents, failed = self._taught(contents.keep(plan.kept), plan.new)
        else:
            self._done = at
            return None
        release = Release(
            number=0,  # `publish` gives it the next one
            parent=standing.number if standing else None,
            round_id=standing.round_id if standing else NO_ROUND,
            log_version=version,
            model_fingerprint=self._base.fingerprint,
            layer=self._base.layer,
            live=LivePart(
                memories=contents.fresh,
                fitted_on=contents.fitted_on,
                failed=tuple(sorted({*plan.failed, *failed})),
            ),
            **write_contents(self._store, contents),
        )
        return publish(self._store, release)

    def _is_rolled_back(self, standing: Release) -> bool:
        """A rollback is an operator's word: only what the log says since is published over it."""
        return standing.restores is not None and self._log.length(standing.log_version) == self._slots.heard

    def _contents(self, standing: Release | None) -> Contents:
        matched = self._config.router.addressing == "matched"
        if standing is None:
            return no_contents(int(self._base.model.config.hidden_size), matched=matched)
        contents = read_contents(self._store, standing, matched=matched)
        if matched != (contents.readouts is not None) or standing.thresholds or standing.whole_prompt:
            raise ConfigError(
                f"Release {standing.number} was made with other settings of router and training than live edits would "
                "be; run a round first."
            )
        return contents

    def _plan(self, contents: Contents, failed: Sequence[str]) -> LivePlan:
        base = self._base
        return plan_live(
            self._slots.newest,
            contents.entries,
            failed=failed,
            most=self._capacity,
            fits=lambda edit: fits(edit, base.tokenizer, max_tokens=base.max_tokens),
        )

    def _taught(self, kept: Contents, edits: Sequence[Edit]) -> tuple[Contents, set[str]]:
        """With the edits that come to hold, and the ids of those that do not.

        They join the memory that earlier ones went into. Where one of them or of the earlier ones does not hold then,
        they get a memory of their own and more steps; what does not hold there either is left out."""
        if not edits:
            return kept, set()
        new = extract_edits(self._base, self._store, edits, texts=self._texts, config=self._config)
        everything = {edit.edit_id for edit in edits}
        earlier = self._with_room(kept, len(edits))
        for memory, steps in ((earlier, FIRST_STEPS), (None, LAST_STEPS)):
            try:
                fresh = teach(self._suffix, new, memory=memory, steps=steps, config=self._config)
            except TrainingDiverged as error:
                log.warning("%s", error)
                contents, failed = kept, everything
                continue
            contents = self._with_memory(kept, new, fresh, taught_on=memory is not None)
            # Earlier edits all of whose wordings still hold are not asked again: their losses say it.
            asked = [edit for edit in fresh.taught.edits if edit.edit_id in everything | fresh.unsure]
            failed = self._failing(contents, asked)
            if not failed:
                break
        if failed == everything:
            return kept, failed
        if failed:
            holding = [place for place, entry in enumerate(contents.entries) if entry.edit_id not in failed]
            contents = contents.keep(holding)
        self._open = (contents.memories[-1], fresh)
        return contents, failed

    def _with_room(self, kept: Contents, count: int) -> FreshMemory | None:
        """The memory that this process taught last, without the edits that left, if it may hold so many more. Many at
        once get one of their own: beside others each of them takes several times as long."""
        if self._open is None or not kept.fresh or kept.memories[-1] != self._open[0]:
            return None
        if count > max(1, LARGE_BATCH * self._capacity):
            return None
        last, memory = len(kept.memories) - 1, self._open[1]
        living = {entry.edit_id for entry in kept.entries if entry.memory == last}
        if len(living) + count > self._capacity:
            return None
        taught = memory.taught.only(living)
        return FreshMemory(taught, memory.delta_DF, memory.unsure & living) if taught else None

    def _with_memory(self, kept: Contents, new: Extracted, fresh: FreshMemory, *, taught_on: bool) -> Contents:
        memory = store_memory(self._store, fresh, base=self._base, config=self._config)
        entries = [
            BankEntry(edit.edit_id, edit.prompt, edit.target, edit.subject, memory=0, target_ids=bare.target_ids)
            for edit, bare in zip(new.edits, new.bare, strict=True)
        ]
        contents = kept.with_memory(memory, entries, fresh.readouts, taught_on=taught_on)
        return self._router.with_entries(contents, new, out_of_scope=self._out_of_scope())

    def _out_of_scope(self) -> list[str]:
        return [text for said in self._slots.newest.values() for text in said.edit.out_of_scope]

    def _failing(self, contents: Contents, edits: Sequence[Edit]) -> set[str]:
        """Asked of what would be served, read back from the store."""
        candidate = Release(
            number=0,
            parent=None,
            round_id="",
            log_version=0,
            model_fingerprint=self._base.fingerprint,
            layer=self._base.layer,
            **write_contents(self._store, contents),
        )
        return failing(self._base, load_release(self._store, candidate, self._base, memories=self._memories), edits)
