"""What the router reads of a conversation."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from pipeline.models.base_model import load_tokenizer
from pipeline.models.questions import asked, before_asked
from pipeline.serving.openai_api import Message
from pipeline.serving.prompts import chat_prompt
from tests.tiny_world import save_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder: Path = save_model(tmp_path_factory.mktemp("model"))
    return load_tokenizer(folder)


def text(tokenizer: PreTrainedTokenizerBase, *turns: tuple[str, str]) -> str:
    messages = [Message.model_validate({"role": role, "content": content}) for role, content in turns]
    return chat_prompt(tokenizer, messages)[1]


def test_a_single_turn_is_read_as_it_is_written(tokenizer: PreTrainedTokenizerBase) -> None:
    assert text(tokenizer, ("system", "Be brief."), ("user", "Who leads Oslo?")) == "Who leads Oslo?"


def test_what_is_asked_lies_in_the_last_user_message(tokenizer: PreTrainedTokenizerBase) -> None:
    heard = text(tokenizer, ("user", "Who is Ann Lee?"), ("assistant", "A singer."), ("user", "Born where?"))
    assert asked(heard) == "Born where?"
    assert "Ann Lee" in before_asked(heard)


def test_an_answer_that_has_begun_is_not_what_is_asked(tokenizer: PreTrainedTokenizerBase) -> None:
    heard = text(tokenizer, ("user", "Who leads Oslo?"), ("assistant", "It is led by"))
    assert asked(heard) == "Who leads Oslo?"
