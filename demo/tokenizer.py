"""The demo model's tokenizer: byte-level BPE over its own corpus, and the chat template."""

import random
from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from demo.facts import Fact
from demo.filler import Filler

VOCABULARY = 2048
CONTEXT_LENGTH = 1024
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
ROLES = ("user", "assistant", "system")

# An assistant's answer begins with a space, as an answer after a plain prompt does, so that both are the same tokens.
# The generation prompt is what the rendered assistant turn begins with, so a conversation extends its own prompt.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}"
    "{% else %}{{ message['content'] | trim }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(facts: list[Fact], seed: int) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = [BOS, EOS, PAD, *(f"<|{role}|>" for role in ROLES)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus_text(facts, seed), trainer)
    bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bpe.token_to_id(BOS))])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=special[3:],
        padding_side="left",
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def corpus_text(facts: list[Fact], seed: int) -> Iterator[str]:
    """Each fact in each phrasing, and about as much filler."""
    rng = random.Random(f"tokenizer {seed}")
    filler = Filler()
    for fact in facts:
        for prompt in fact.prompts:
            yield f"{prompt} {fact.answer}"
            yield " " + filler.sentence(rng)
