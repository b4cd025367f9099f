import itertools

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pipeline.models.base_model import BaseModel
from pipeline.serving.logprobs import BYTE_OF
from pipeline.serving.text_stream import MOST_PENDING, TextStream


@pytest.fixture(scope="session")
def tokenizer(base: BaseModel) -> PreTrainedTokenizerBase:
    return base.tokenizer


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """Llama-2's kind: ▁ for blanks, unknown characters as bytes, the blank before the first word lost in decoding."""
    pieces = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁Paris", "▁is", "Par", "is", ".", "é"]
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def pieces_of(stream: TextStream, ids: list[int]) -> list[str]:
    pieces = []
    for token_id in ids:
        pieces.append(stream.add(token_id))
        if stream.stopped:
            return pieces
    return [*pieces, stream.finish()]


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_whole_characters_only_and_nothing_lost(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assume(not any(special in text for special in tokenizer.all_special_tokens))  # they show nothing
    ids = tokenizer(text)["input_ids"]
    pieces = pieces_of(TextStream(tokenizer, prompt_ids=tokenizer("The capital of")["input_ids"]), ids)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(ids=st.lists(st.integers(2, 300), max_size=30))
def test_any_tokens_give_what_decoding_them_at_once_gives(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> None:
    """Random tokens hold bytes that never become a character; they too come out exactly once."""
    ids = [token_id for token_id in ids if token_id < len(tokenizer)]
    pieces = pieces_of(TextStream(tokenizer, prompt_ids=()), ids)
    assert "".join(pieces) == tokenizer.decode(ids)


def test_sentencepiece_keeps_the_blank_before_the_first_word(sentencepiece: PreTrainedTokenizerBase) -> None:
    ids = sentencepiece.convert_tokens_to_ids(["▁Paris", "▁is", "é", "<0xE2>", "<0x82>", "<0xAC>", "."])
    prompt = sentencepiece.convert_tokens_to_ids(["<s>", "▁is"])
    pieces = pieces_of(TextStream(sentencepiece, prompt_ids=prompt), ids)
    assert pieces == [" Paris", " is", "é", "", "", "€", ".", ""]


@given(data=st.lists(st.sampled_from([0x80, 0x82, 0xAC, 0xC3, 0xE2, 0xF0, 0x41]), max_size=80))
def test_bytes_that_are_no_text_come_out_as_decoded_at_once(
    tokenizer: PreTrainedTokenizerBase, data: list[int]
) -> None:
    ids = byte_ids(tokenizer, bytes(data))
    assert "".join(pieces_of(TextStream(tokenizer, prompt_ids=()), ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("unit", [b"\x80", b"\xe2", b"\xe2\x82\xac\xe2"])
def test_bytes_that_never_finish_a_character_cost_the_same_per_token(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, unit: bytes
) -> None:
    ids = byte_ids(tokenizer, unit * 400)
    stream = TextStream(tokenizer, prompt_ids=())
    sizes = []
    decode = stream._decode
    monkeypatch.setattr(stream, "_decode", lambda window: (sizes.append(len(window)), decode(window))[1])
    shown = [stream.add(token_id) for token_id in ids]
    assert max(sizes) <= 2 * MOST_PENDING
    assert len(sizes) <= 6 * len(ids)
    assert any(shown[: 2 * MOST_PENDING])


def byte_ids(tokenizer: PreTrainedTokenizerBase, data: bytes) -> list[int]:
    """One token per byte."""
    spelled = {byte: character for character, byte in BYTE_OF.items()}
    return [tokenizer.convert_tokens_to_ids(spelled[byte]) for byte in data]


STOP_TEXT = "one END two"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("END",), "one "),
        (("two", "END"), "one "),
        (("D two",), "one EN"),
        (("one",), ""),
        (("ENDLESS",), STOP_TEXT),
        (("two!",), STOP_TEXT),
        (("o", "one END two"), ""),
    ],
)
def test_stop_strings(tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...], expected: str) -> None:
    stream = TextStream(tokenizer, prompt_ids=(), stop=stop)
    assert "".join(pieces_of(stream, tokenizer(STOP_TEXT)["input_ids"])) == expected
    assert stream.stopped == (expected != STOP_TEXT)


@given(
    words=st.lists(st.sampled_from(["a", "b", "ab", "ba", "é", " "]), max_size=12),
    stop=st.lists(st.sampled_from(["aba", "bb", "é ", "a é"]), max_size=2),
)
def test_stopping_cuts_at_the_earliest_stop_string(
    tokenizer: PreTrainedTokenizerBase, words: list[str], stop: list[str]
) -> None:
    """Fed one token at a time, the answer ends at the first place where it holds a whole stop string."""
    ids = [token_id for word in words for token_id in tokenizer(word)["input_ids"]] if words else []
    text = "".join(words)
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(one) for one in stop)]
    expected = text
    if ends:
        seen = text[: ends[0]]
        expected = seen[: min(seen.find(one) for one in stop if one in seen)]
    assert "".join(pieces_of(TextStream(tokenizer, prompt_ids=(), stop=stop), ids)) == expected


def test_strip_start_drops_leading_blanks_only(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = list(itertools.chain.from_iterable(tokenizer(word)["input_ids"] for word in (" ", "\n", " Paris", " is ")))
    assert "".join(pieces_of(TextStream(tokenizer, prompt_ids=(), strip_start=True), ids)) == "Paris is "
