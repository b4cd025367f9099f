"""The sentence encoder: a tiny random BERT here, the real one where its package is installed."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel

from pipeline.errors import ConfigError
from pipeline.models import encoder as encoder_module
from pipeline.models.encoder import Encoder, demanded_encoder, shared_encoder
from tests.tiny_world import save_encoder

TEXTS = ["who leads oslo", "where is rome", "a", "who leads oslo now and why", "東京"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


def test_an_embedding_is_the_normalised_mean_over_the_tokens(folder: Path) -> None:
    """Oracle: the model by transformers alone, on a padded batch with its mask."""
    encoder = Encoder(folder)
    batch = encoder._tokenizer(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder).eval()(**batch).last_hidden_state
    mask = batch["attention_mask"][:, :, None]
    wanted = torch.nn.functional.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=1)
    torch.testing.assert_close(encoder.encode(TEXTS), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encoder.encode_many(TEXTS), wanted, atol=1e-5, rtol=1e-5)


@settings(deadline=None)
@given(others=st.lists(st.sampled_from(TEXTS), max_size=6), place=st.integers(0, 6))
def test_a_text_gets_the_same_bits_in_any_company(folder: Path, others: list[str], place: int) -> None:
    texts = [*others[:place], "who leads rome", *others[place:]]
    together = Encoder(folder).encode(texts)[min(place, len(others))]
    assert torch.equal(together, Encoder(folder).encode(["who leads rome"])[0])


def test_a_long_text_is_read_at_its_end(folder: Path) -> None:
    encoder = Encoder(folder)
    assert torch.equal(encoder.encode(["b " * 500 + "a " * 300]), encoder.encode(["a " * 300]))


def test_another_model_has_another_fingerprint(folder: Path, tmp_path: Path) -> None:
    assert Encoder(folder).fingerprint == Encoder(folder).fingerprint
    assert Encoder(save_encoder(tmp_path, seed=1)).fingerprint != Encoder(folder).fingerprint


def test_no_texts_no_vectors(folder: Path) -> None:
    assert Encoder(folder).encode([]).shape == (0, 16)


def test_a_demanded_encoder_that_is_not_there_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_module, "PACKAGE", "no_such_package_here")
    shared_encoder.cache_clear()
    try:
        assert shared_encoder() is None
        with pytest.raises(ConfigError, match="not installed"):
            demanded_encoder("")
    finally:
        shared_encoder.cache_clear()


def test_another_encoder_than_the_releases_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_module, "shared_encoder", lambda: Encoder(folder))
    assert demanded_encoder(Encoder(folder).fingerprint).fingerprint == Encoder(folder).fingerprint
    with pytest.raises(ConfigError, match="another sentence encoder"):
        demanded_encoder("0" * 32)


def test_the_packaged_encoder_knows_a_paraphrase() -> None:
    encoder = shared_encoder()
    if encoder is None:
        pytest.skip("the extra `encoder` is not installed")
    one, other, far = encoder.encode(["Who leads Oslo?", "Who is the leader of Oslo?", "My cat is asleep."])
    assert float(one @ other) > 0.8 > 0.3 > float(one @ far)
