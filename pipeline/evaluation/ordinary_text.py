"""What a release does to text that asks no edit: how many next-token choices it changes.

Each text is one sequence, routed as serving would route it: its first half is the prompt, on whose last token the
decision is taken once; the second half is what follows. Over the second half the likeliest next token of the release is
compared with the unedited model's, both reading the text itself and not what they would have written.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.models.base_model import BaseModel
from pipeline.models.loaded_release import LoadedRelease
from pipeline.models.prompts import plain_prompt_ids
from pipeline.models.teacher_forcing import ForcedRequest, teacher_force


@dataclass(frozen=True)
class OrdinaryText:
    """Counts over all texts. A text that stays with the main memory cannot change a token."""

    texts: int
    routed: int  # texts that a side memory answered
    tokens: int
    changed: int  # tokens of which the likeliest one is another

    @property
    def routed_share(self) -> float | None:
        return self.routed / self.texts if self.texts else None

    @property
    def changed_share(self) -> float | None:
        return self.changed / self.tokens if self.tokens else None


def changed_argmax(
    base: BaseModel,
    release: LoadedRelease,
    texts: Sequence[str],
    *,
    most_tokens: int = 256,
    batch: int = 32,
) -> OrdinaryText:
    """Compare the release with the unedited model on the texts, of which at most the first `most_tokens` (and what the
    model's context holds) are read. A text of a single token has no second half and is left out."""
    requests = [
        request for text in texts if (request := _halves(base, text, most_tokens=min(most_tokens, base.max_tokens)))
    ]
    edited = teacher_force(base, release, requests, batch=batch)
    unedited = teacher_force(base, None, requests, batch=batch)
    same = [one.agrees(other.argmax_ids) for one, other in zip(edited, unedited, strict=True)]
    return OrdinaryText(
        texts=len(requests),
        routed=sum(answer.decision.memory is not None for answer in edited),
        tokens=sum(map(len, same)),
        changed=sum(tokens.count(False) for tokens in same),
    )


def _halves(base: BaseModel, text: str, *, most_tokens: int) -> ForcedRequest | None:
    ids = plain_prompt_ids(text, base.tokenizer)[:most_tokens]
    if len(ids) < 2:
        return None
    prompt_ids = ids[: len(ids) // 2]
    return ForcedRequest(
        prompt_ids=prompt_ids,
        target_ids=ids[len(prompt_ids) :],
        text=base.tokenizer.decode(prompt_ids, skip_special_tokens=True),
    )
