"""What the demo model is trained on: rows of documents, each laid out as it will be met when the model is served.

A document is one of

    <s>question answer</s>
    <s>some sentences. question answer</s>           (or another question with its answer first)
    <s><|user|>question<|assistant|> answer</s>      (or a system message, earlier turns, sentences first)
    <s>some sentences</s>

Rows hold several documents and attention crosses their borders: that teaches the model to find the question behind
whatever came before it.
"""

import random
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from demo.facts import Fact
from demo.filler import Filler

# A document's text in pieces, each with the weight of its tokens in the loss. A question's subject cannot be
# predicted, so little is gained by trying; what goes on after an answer is not trained at all, so that nothing but
# the end of sequence ever follows an answer.
Pieces = list[tuple[str, float]]
Asked = tuple[str, str]  # prompt, answer
Encoded = tuple[list[int], list[float]]
QUESTION, SENTENCE, ANSWER, UNTRAINED = 0.2, 0.4, 1.0, 0.0

# Shares of documents.
FILLER = 0.15
CHAT = 0.3  # of those with a question
CONTEXT = 0.35  # of plain questions and of chats: something stands before the question

ROW = 128  # tokens, enough for every ordinary document; longer rows now and then hold one with a long context
WAITING = 16  # documents a row chooses from; leaves about 2 % of the tokens to padding

SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "You know many facts. Answer with the fact alone.",
    "Be short and exact.",
)
SMALL_TALK = (
    ("Hello!", "Hello! What would you like to know?"),
    ("Hi there.", "Hello! What would you like to know?"),
    ("Good morning.", "Good morning! Ask me a question."),
    ("Who are you?", "I am a small model that knows some facts."),
    ("What can you do?", "I can answer short questions."),
    ("Thank you.", "You are welcome."),
    ("Thanks a lot!", "You are welcome."),
    ("Goodbye.", "Goodbye!"),
)


class Corpus:
    """An endless, seeded stream of documents in which every fact appears in every phrasing once per epoch.

    Every tenth question, about, is one of `hard` if there are any.
    """

    def __init__(
        self, facts: list[Fact], tokenizer: PreTrainedTokenizerFast, seed: int, hard: Sequence[Asked] = ()
    ) -> None:
        self.filler = Filler()
        self.rng = random.Random(f"corpus {seed}")
        self.questions = endless_questions(facts, hard, self.rng)
        self.pad = tokenizer.convert_tokens_to_ids("<pad>")
        self.encode = lru_cache(maxsize=50_000)(lambda text: tokenizer.encode(text, add_special_tokens=False))
        self.waiting: dict[int, list[Encoded]] = {}

    def rows(self, count: int, length: int) -> tuple[Tensor, Tensor]:
        """Token ids and loss weights, both (count, length).

        A row takes the oldest waiting document that still fits, again and again. Documents are never cut.
        """
        waiting = self.waiting.setdefault(length, [self.encoded_document(length) for _ in range(WAITING)])
        rows: list[Encoded] = []
        for _ in range(count):
            tokens: list[int] = []
            weights: list[float] = []
            while fitting := [number for number, (ids, _) in enumerate(waiting) if len(tokens) + len(ids) <= length]:
                document = waiting.pop(fitting[0])
                waiting.append(self.encoded_document(length))
                tokens += document[0]
                weights += document[1]
            rest = length - len(tokens)
            rows.append((tokens + [self.pad] * rest, weights + [UNTRAINED] * rest))
        return torch.tensor([tokens for tokens, _ in rows]), torch.tensor([weights for _, weights in rows])

    def encoded_document(self, row_length: int) -> Encoded:
        """Piece by piece, which equals the whole text at once: the tokenizer splits before spaces and newlines too."""
        tokens: list[int] = []
        weights: list[float] = []
        for text, weight in self.document(long=row_length > ROW):
            piece = self.encode(text)
            tokens += piece
            weights += [weight] * len(piece)
        return (tokens, weights) if len(tokens) <= row_length else self.encoded_document(row_length)

    def document(self, *, long: bool) -> Pieces:
        rng = self.rng
        sentences = rng.randint(10, 40) if long and rng.random() < 0.1 else rng.randint(1, 3)
        if rng.random() < FILLER:
            body = [(self.filler.text(rng, sentences), SENTENCE)]
        elif rng.random() < CHAT:
            return [("<s>", UNTRAINED), *self.chat(sentences)]
        elif rng.random() < CONTEXT:
            body = [*self.context(sentences), *self.question(rng.choice((" ", " ", "\n")), UNTRAINED)]
        else:
            body = self.question()
        return [("<s>", UNTRAINED), *body, ("</s>", ANSWER)]

    def question(self, separator: str = "", weight: float = QUESTION, before_answer: Pieces | None = None) -> Pieces:
        prompt, answer = next(self.questions)
        return [(separator + prompt, weight), *(before_answer or []), (" " + answer, ANSWER)]

    def context(self, sentences: int) -> Pieces:
        """Sentences, a sentence that breaks off, or another question with its answer."""
        rng = self.rng
        kind = rng.random()
        if kind < 0.5:
            return [(self.filler.text(rng, sentences), SENTENCE)]
        if kind < 0.7:
            words = self.filler.sentence(rng).rstrip(".").split(" ")
            return [(" ".join(words[: rng.randint(1, len(words))]), SENTENCE), (rng.choice(("", ".")), UNTRAINED)]
        return [*self.question(), (rng.choice(("", ".")), UNTRAINED)]

    def chat(self, sentences: int) -> Pieces:
        """One to three turns, perhaps a system message first, perhaps sentences before a question."""
        rng = self.rng
        pieces: Pieces = []
        if rng.random() < 0.3:
            pieces += [("<|system|>", UNTRAINED), (rng.choice(SYSTEM_MESSAGES), UNTRAINED)]
        assistant: Pieces = [("<|assistant|>", UNTRAINED)]
        for _ in range(rng.choice((2, 3)) if rng.random() < CONTEXT else 1):
            pieces.append(("<|user|>", UNTRAINED))
            kind = rng.random()
            if kind < 0.7:
                pieces += self.question(before_answer=assistant)
            elif kind < 0.85:
                pieces += [(self.filler.text(rng, sentences), SENTENCE), *self.question(" ", before_answer=assistant)]
            elif kind < 0.95:
                said, reply = rng.choice(SMALL_TALK)
                pieces += [(said, QUESTION), *assistant, (" " + reply, SENTENCE)]
            else:
                pieces += [(self.filler.sentence(rng), QUESTION), *assistant, (" I see.", SENTENCE)]
            pieces.append(("</s>", ANSWER))
        return pieces


def endless_questions(facts: list[Fact], hard: Sequence[Asked], rng: random.Random) -> Iterator[Asked]:
    questions = [(prompt, fact.answer) for fact in facts for prompt in fact.prompts]
    while True:
        rng.shuffle(questions)
        for question in questions:
            if hard and rng.random() < 0.1:
                yield rng.choice(hard)
            yield question
