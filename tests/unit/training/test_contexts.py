"""Texts to train behind and to calibrate on: the model's own, none blank, the same for the same seed."""

import torch

from pipeline.models.base_model import BaseModel
from pipeline.training.contexts import OPENINGS, cut_short, generate_texts


def test_the_same_seed_gives_the_same_texts_and_none_is_blank(base: BaseModel) -> None:
    texts = generate_texts(base, tokens=6, seed=3, count=12)
    assert texts == generate_texts(base, tokens=6, seed=3, count=12)
    assert texts != generate_texts(base, tokens=6, seed=4, count=12)
    assert all(texts) and len(set(texts)) == len(texts)


def test_a_model_that_says_nothing_by_itself_is_given_a_first_word(base: BaseModel) -> None:
    def ends_at_once(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        output[..., base.end_ids[0]] = 1e4
        return output

    handle = base.model.get_output_embeddings().register_forward_hook(ends_at_once)
    try:
        assert sorted(generate_texts(base, tokens=6, seed=0, count=12)) == sorted(OPENINGS)
    finally:
        handle.remove()


def test_texts_are_cut_at_words() -> None:
    texts = ["one two three", "four"]
    for whole, cut in zip(texts, cut_short(texts, seed=0), strict=True):
        assert cut and whole.split()[: len(cut.split())] == cut.split()
