"""What a round takes along of the live releases that were published while it ran.

A round answers for the log as it was when the round began. Edits that were posted since are in fresh memories of the
head, and must not be gone for the seconds until they are taught again: a client that read one demands it. So the
candidate is published with these memories beside its own, and without what was retracted since.
"""

from collections.abc import Mapping
from dataclasses import replace

from pipeline.config import Config
from pipeline.models.encoder import wanted_encoder
from pipeline.models.readings import TextReader
from pipeline.storage.edit_log import EditLog, LogEntry
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.releases import LivePart, Release
from pipeline.storage.slots import Slots
from pipeline.training.contents import Contents, read_contents, write_contents
from pipeline.training.fresh import fresh_states
from pipeline.training.live_plan import plan_live
from pipeline.training.router_growth import grown, reached


def carry(store: ObjectStore, candidate: Release, head: Release, *, config: Config) -> Release:
    """The candidate of a round as the successor of `head`, a live release. What its router does not reach is left out:
    live training finds it missing and teaches it again."""
    matched = config.router.addressing == "matched"
    slots = Slots(EditLog(store))
    slots.catch_up()
    made, standing = (read_contents(store, release, matched=matched) for release in (candidate, head))
    plan = plan_live(slots.newest, made.entries, most=0, fits=lambda edit: True)
    contents = _joined(store, made.keep(plan.kept), standing, slots.newest, config)
    there = {entry.edit_id for entry in contents.entries}
    living = {said.edit.edit_id for said in slots.newest.values() if said.edit.op == "upsert"}
    failed = sorted((set(head.live.failed if head.live else ()) & living) - there)
    return candidate.model_copy(
        update={
            "parent": head.number,
            "live": LivePart(memories=contents.fresh, fitted_on=len(made.entries), failed=tuple(failed)),
            **write_contents(store, contents),
        }
    )


def _joined(
    store: ObjectStore, made: Contents, standing: Contents, newest: Mapping[str, LogEntry], config: Config
) -> Contents:
    """`made`, with the entries of the standing release's fresh memories that live and that it does not have."""
    encoder = wanted_encoder(config.router)
    there = {entry.edit_id for entry in made.entries}
    living = {said.edit.edit_id for said in newest.values() if said.edit.op == "upsert"}
    known = TextReader(standing.entries, None).texts_of(standing.router)
    for memory in range(standing.first_fresh, len(standing.memories)):
        reference = standing.memories[memory]
        places = [
            place
            for place, entry in enumerate(standing.entries)
            if entry.memory == memory and entry.edit_id in living - there
        ]
        if not places:
            continue
        states = fresh_states(store, reference)
        said = standing.readouts
        joined = made.with_memory(
            reference,
            [standing.entries[place] for place in places],
            {standing.entries[place].edit_id: said[place] for place in places} if said else {},
            taught_on=False,
        )
        new = [states[standing.entries[place].edit_id] for place in places]
        router = grown(made.router, joined.entries, new, encoder=encoder, embedded=known)
        holds = reached(router, joined.entries, new, encoder=encoder)
        first = len(joined.entries) - len(new)
        keep = [place for place in range(len(joined.entries)) if place < first or holds[place - first]]
        made = replace(joined, router=router).keep(keep)
    return made
