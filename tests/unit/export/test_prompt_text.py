"""From tokens back to what was asked: the text a router reads behind `generate` is the one it reads at the endpoint."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.export.prompt_text import PromptReader
from pipeline.models.base_model import BaseModel
from pipeline.models.prompts import plain_prompt_ids
from pipeline.serving.openai_api import Message
from pipeline.serving.prompts import chat_prompt

TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "qwen": "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "inst, no system": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('no') }}{% elif m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
}
SYSTEM, USER, REPLY = ("system", "Be short. Who is asked?"), ("user", "Who leads\nOslo?"), ("assistant", "Ada does.")
CHATS = {
    "one question": [USER],
    "a system message": [SYSTEM, USER],
    "two questions": [USER, REPLY, ("user", "Where was she born?")],
    "three, and a system message": [SYSTEM, USER, REPLY, ("user", "And now?"), REPLY, ("user", "Why is it?")],
}


CASES = [
    (template, chat)
    for template in (None, *TEMPLATES)
    for chat in CHATS
    if not (template == "inst, no system" and CHATS[chat][0] == SYSTEM)
]


@pytest.mark.parametrize(("template", "chat"), CASES)
def test_a_conversation_is_read_as_at_the_endpoint(
    template: str | None, chat: str, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = base.tokenizer
    if template is not None:
        monkeypatch.setattr(tokenizer, "chat_template", TEMPLATES[template])
    messages = [Message.model_validate({"role": role, "content": content}) for role, content in CHATS[chat]]
    prompt_ids, text = chat_prompt(tokenizer, messages)
    assert PromptReader(tokenizer).text(prompt_ids) == text


@given(prompt=st.text(min_size=1))
def test_plain_text_comes_back_as_it_was(base: BaseModel, prompt: str) -> None:
    text = base.tokenizer.decode(base.tokenizer(prompt)["input_ids"], skip_special_tokens=True)
    assert PromptReader(base.tokenizer).text(plain_prompt_ids(prompt, base.tokenizer)) == text


def test_a_prompt_of_another_template_is_one_text(base: BaseModel) -> None:
    prompt = "<|user|>Who leads Oslo?<|model|>"
    assert PromptReader(base.tokenizer).text(plain_prompt_ids(prompt, base.tokenizer)) == prompt
