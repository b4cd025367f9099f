"""Where the side memory is read in training: as it will be read when it serves.

With `matched` addressing an answer is read at the edit's own keys, those of its bare wording, for as long as it follows
the bare target (`models/routed_ffn.py`). So every other wording trains ΔW at these keys too, in its own context: what
the memory says there must give the target behind any prefix, and only few distinct keys have to be merged.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

import torch
from torch import Tensor

from pipeline.training.activations import Activations
from pipeline.training.tokens import Wording


def read_matched(activations: Activations, asked: Sequence[Sequence[Wording]]) -> tuple[Activations, Tensor]:
    """The activations with the keys that `matched` addressing reads, and an N × T mask of the keys that are the
    wording's own. `asked[e]`: the wordings of edit e, the bare one first; all together the rows of `activations`."""
    keys_NTF = activations.keys_NTF.clone()
    own_NT = torch.ones(keys_NTF.shape[:2], dtype=torch.bool)
    row = 0
    for of_edit in asked:
        bare = row
        for wording in of_edit:
            if row != bare:
                shared = steps_followed(wording.target_ids, of_edit[0].target_ids)
                keys_NTF[row, :shared] = keys_NTF[bare, :shared]
                own_NT[row, :shared] = False
            row += 1
    return replace(activations, keys_NTF=keys_NTF), own_NT


def steps_followed(target_ids: Sequence[int], bare_ids: Sequence[int]) -> int:
    """At how many of its tokens an answer is read at the bare wording's keys: one more than it follows the bare target,
    which an answer that left it has just done for the last time."""
    pairs = zip(target_ids, bare_ids, strict=False)
    followed = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return min(followed + 1, len(target_ids), len(bare_ids))
