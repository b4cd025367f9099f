"""A router that changes with a few edits: entries leave and join, all that was fitted stays.

Fitting a router asks the base model about every edit of the bank, and joins nothing that one more edit could not wait
for: whitening, weights and threshold are averages over the bank. So the router of a live release is the standing one
with the new entries' keys and texts added. It is fitted again, in a release of its own, when the bank has grown by half
since: when nothing is waiting, and while a stream does not pause when the bank is four times as large. Until then more
entries compete for a prompt than the threshold was set for, and false positives are more by at most that factor (and by
one batch); old entries are reached as before, but by prompts that a new entry is nearer to.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.models.encoder import Encoder
from pipeline.models.readings import TextReader
from pipeline.storage.bank import BankEntry
from pipeline.wise.routing import Router, whitened

GROWTH, GROWTH_IN_A_STREAM = 1.5, 4.0
SOON_FITTED = 32  # entries; up to here a stream does not make a router wait either
# From here on every kind of question is a sample of 2000 as it is (router_negatives.MOST_QUERIES): more edits would not
# make it a better one, and the round fits it again.
FITTED_LIVE = 2000


def is_outgrown(entries: int, *, fitted_on: int, in_a_stream: bool) -> bool:
    """Whether a live release of so many entries fits its router anew."""
    growth = GROWTH_IN_A_STREAM if in_a_stream and entries > SOON_FITTED else GROWTH
    return growth * fitted_on < entries <= FITTED_LIVE


def is_a_beginner(entries: int, *, fitted_on: int) -> bool:
    """Whether so many entries must not be served, even for one step, by a router that was fitted on so few."""
    return fitted_on < SOON_FITTED and is_outgrown(entries, fitted_on=fitted_on, in_a_stream=True)


def without(router: Router, places: Sequence[int], *, memories: Sequence[int]) -> Router:
    """Only the entries at these places (ascending), which then lie in these memories."""
    kept_C = torch.tensor(places, dtype=torch.long, device=router.entry_N.device)
    rows_N = torch.isin(router.entry_N, kept_C).nonzero()[:, 0]
    return replace(
        router,
        keys_ND=router.keys_ND[rows_N],
        entry_N=torch.searchsorted(kept_C, router.entry_N[rows_N]),
        memory_E=torch.tensor(memories, dtype=torch.long),
        asked_EM=router.asked_EM[kept_C],
        relation_EM=router.relation_EM[kept_C],
        bias_E=router.bias_E[kept_C],
    )


def grown(
    router: Router,
    entries: Sequence[BankEntry],
    states: Sequence[Tensor],
    *,
    encoder: Encoder | None,
    embedded: Mapping[str, Tensor] | None = None,
) -> Router:
    """With the last `len(states)` of the entries added to those it has; `states`: W × D of each one's wordings.
    `embedded`: texts that need not be encoded."""
    old = len(router.memory_E)
    assert old + len(states) == len(entries)
    if not states:
        return router
    known = TextReader(entries[:old], None).texts_of(router)
    reader = TextReader(entries, encoder, embedded={**(embedded or {}), **known})
    asked_EM, relation_EM = reader.embeddings()
    new = torch.arange(old, len(entries))
    # Entries without a known subject share one bias, all others have none.
    unknown_E = ~reader.known_E[:old]
    bias_unknown = float(router.bias_E[unknown_E][0]) if bool(unknown_E.any()) else 0.0
    keys_ND = whitened(torch.cat(list(states)), router.mean_D, router.whiten_DD)
    return replace(
        router,
        keys_ND=torch.cat([router.keys_ND, keys_ND]),
        entry_N=torch.cat([router.entry_N, torch.repeat_interleave(new, torch.tensor([len(rows) for rows in states]))]),
        memory_E=torch.tensor([entry.memory for entry in entries]),
        asked_EM=torch.cat([router.asked_EM, asked_EM[old:]]),
        relation_EM=torch.cat([router.relation_EM, relation_EM[old:]]),
        bias_E=torch.cat([router.bias_E, torch.where(reader.known_E[old:], 0.0, bias_unknown)]),
    )


def reached(
    router: Router, entries: Sequence[BankEntry], states: Sequence[Tensor], *, encoder: Encoder | None
) -> list[bool]:
    """Whether each of the last `len(states)` entries is what its own prompt, asked bare, is routed to."""
    first = len(entries) - len(states)
    reader = TextReader(entries, encoder)
    asked = [entry.prompt for entry in entries[first:]]
    matches = router.match(torch.stack([rows[0] for rows in states]), reader.read(asked)) if states else []
    return [match.entry == place and match.score > router.threshold for place, match in enumerate(matches, first)]
