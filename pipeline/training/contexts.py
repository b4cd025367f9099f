"""Text that the base model writes by itself: context prefixes to train behind, and unrelated text to calibrate on.

Generated once per base model and seed (the paper generates its prefixes too; without them it loses 0.15 reliability).
"""

from collections.abc import Sequence

import torch

from pipeline.models.base_model import BaseModel
from pipeline.models.generate import GenerationRequest, generate
from pipeline.models.prompts import plain_prompt_ids

TEXTS = 64


def generate_texts(base: BaseModel, *, tokens: int, seed: int, count: int = TEXTS) -> list[str]:
    """`count` texts of at most `tokens` tokens, sampled at temperature 1 from the start of text; no blank ones and no
    repetitions, so there may be fewer."""
    start_ids = plain_prompt_ids("", base.tokenizer) or (base.end_ids[0],)
    requests = [
        GenerationRequest(
            prompt_ids=start_ids,
            text="",
            max_new_tokens=tokens,
            temperature=1.0,
            seed=seed * count + index,
            routed=False,
        )
        for index in range(count)
    ]
    texts, _ = generate(base, None, requests)
    return [text for text in dict.fromkeys(" ".join(text.split()) for text in texts) if text]


def cut_short(texts: Sequence[str], *, seed: int) -> list[str]:
    """Each text cut after a random number of words: unrelated prompts end anywhere."""
    generator = torch.Generator().manual_seed(seed)
    cuts = []
    for text in texts:
        words = text.split()
        cuts.append(" ".join(words[: int(torch.randint(1, len(words) + 1, (1,), generator=generator))]))
    return cuts
