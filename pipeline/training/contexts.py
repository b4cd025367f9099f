"""Text that the base model writes by itself: context prefixes to train behind, and unrelated text to calibrate on.

Generated once per base model and seed (the paper generates its prefixes too; without them it loses 0.15 reliability).
"""

import hashlib
import json
from collections.abc import Sequence

import torch

from pipeline.errors import CorruptObject
from pipeline.models.base_model import BaseModel
from pipeline.models.generate import GenerationRequest, generate
from pipeline.models.prompts import plain_prompt_ids
from pipeline.storage.object_store import ObjectStore

TEXTS = 64
OPENINGS = ("The", "Therefore", "Because", "I", "You")  # what the authors' code begins its prefixes with


def stored_texts(base: BaseModel, store: ObjectStore, *, tokens: int, seed: int) -> list[str]:
    """`generate_texts`, from the store where a worker or an earlier round put them."""
    digest = hashlib.sha256(f"{base.fingerprint} {base.model.dtype} {tokens} {seed}".encode()).hexdigest()[:24]
    path = f"texts/{digest}.json"
    if not store.exists(path):
        texts = generate_texts(base, tokens=tokens, seed=seed)
        store.put(path, json.dumps(texts, ensure_ascii=False).encode())
        return texts
    try:
        found: list[str] = json.loads(store.read(path))
    except ValueError:
        raise CorruptObject(f"{path} in {store.uri} is damaged; remove it and run the round again.") from None
    return found


def generate_texts(base: BaseModel, *, tokens: int, seed: int, count: int = TEXTS) -> list[str]:
    """`count` texts of at most `tokens` tokens, sampled at temperature 1 from the start of text; no repetitions, so
    there may be fewer. A model that ends before it has begun, as one trained on questions alone does, is given the
    first word."""
    texts = _sample(base, [""] * count, tokens=tokens, seed=seed)
    blank = [index for index, text in enumerate(texts) if not text]
    openings = [OPENINGS[index % len(OPENINGS)] for index in blank]
    for index, text in zip(blank, _sample(base, openings, tokens=tokens, seed=seed + 1), strict=True):
        texts[index] = text
    return list(dict.fromkeys(texts))


def _sample(base: BaseModel, openings: Sequence[str], *, tokens: int, seed: int) -> list[str]:
    """Each opening continued, on one line."""
    if not openings:
        return []
    requests = [
        GenerationRequest(
            prompt_ids=plain_prompt_ids(opening, base.tokenizer) or (base.end_ids[0],),
            text="",
            max_new_tokens=tokens,
            temperature=1.0,
            seed=seed * TEXTS + index,
            routed=False,
        )
        for index, opening in enumerate(openings)
    ]
    answers, _ = generate(base, None, requests)
    return [" ".join(f"{opening} {answer}".split()) for opening, answer in zip(openings, answers, strict=True)]


def cut_short(texts: Sequence[str], *, seed: int) -> list[str]:
    """Each text cut after a random number of words: unrelated prompts end anywhere."""
    generator = torch.Generator().manual_seed(seed)
    cuts = []
    for text in texts:
        words = text.split()
        cuts.append(" ".join(words[: int(torch.randint(1, len(words) + 1, (1,), generator=generator))]))
    return cuts
