"""Does a model answer, word for word? Greedy decoding with its natural stop, for thousands of prompts at once."""

from dataclasses import dataclass

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

BATCH = 256


@dataclass(frozen=True)
class Question:
    """`text` is the whole prompt as the model sees it, its beginning-of-sequence token included."""

    text: str
    answer: str


def plain(prompt: str, answer: str, context: str = "") -> Question:
    return Question(f"<s>{context} {prompt}" if context else f"<s>{prompt}", answer)


def chat(prompt: str, answer: str) -> Question:
    return Question(f"<s><|user|>{prompt}<|assistant|>", answer)


@torch.inference_mode()
def exact_matches(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: list[Question]) -> list[bool]:
    """Whether greedy decoding answers each question with its answer and then the end of sequence.

    One forward pass over prompt, answer and end decides it: greedy decoding gives exactly those tokens if and only if
    each of them is the most likely one after those before it.
    """
    prompts = [tokenizer.encode(question.text, add_special_tokens=False) for question in questions]
    answers = [
        [*tokenizer.encode(" " + question.answer, add_special_tokens=False), tokenizer.eos_token_id]
        for question in questions
    ]
    by_length = sorted(range(len(questions)), key=lambda index: len(prompts[index]) + len(answers[index]))
    matches = [False] * len(questions)
    for start in range(0, len(by_length), BATCH):
        batch = by_length[start : start + BATCH]
        width = max(len(prompts[index]) + len(answers[index]) for index in batch)
        tokens = torch.full((len(batch), width), tokenizer.pad_token_id)
        for row, index in enumerate(batch):  # padded on the right, where causal attention does not look
            sequence = prompts[index] + answers[index]
            tokens[row, : len(sequence)] = torch.tensor(sequence)
        predicted = model(input_ids=tokens, use_cache=False).logits.argmax(-1)
        for row, index in enumerate(batch):
            first, last = len(prompts[index]) - 1, len(prompts[index]) + len(answers[index]) - 1
            matches[index] = predicted[row, first:last].tolist() == answers[index]
    return matches
