"""Texts to train behind and to calibrate on: the model's own, none blank, the same for the same seed."""

from pathlib import Path

import pytest
import torch

from pipeline.errors import CorruptObject
from pipeline.models.base_model import BaseModel
from pipeline.storage.object_store import ObjectStore
from pipeline.training.contexts import OPENINGS, cut_short, generate_texts, stored_texts


def test_the_same_seed_gives_the_same_texts_and_none_is_blank(base: BaseModel) -> None:
    texts = generate_texts(base, tokens=6, seed=3, count=12)
    assert texts == generate_texts(base, tokens=6, seed=3, count=12)
    assert texts != generate_texts(base, tokens=6, seed=4, count=12)
    assert all(texts) and len(set(texts)) == len(texts)


def test_texts_are_generated_once_per_store(base: BaseModel, tmp_path: Path) -> None:
    store = ObjectStore(str(tmp_path))
    texts = stored_texts(base, store, tokens=6, seed=3)
    (path,) = store.list("texts")
    assert texts == generate_texts(base, tokens=6, seed=3)
    (tmp_path / path).write_text('["found"]')
    assert stored_texts(base, store, tokens=6, seed=3) == ["found"]
    assert stored_texts(base, store, tokens=6, seed=4) == generate_texts(base, tokens=6, seed=4)
    (tmp_path / path).write_text('["cut o')
    with pytest.raises(CorruptObject, match="remove it and run the round again"):
        stored_texts(base, store, tokens=6, seed=3)


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
