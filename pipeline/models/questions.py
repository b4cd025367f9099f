"""What a text asks: its end.

A model answers the end of what it reads, so the router's text signals read the end too: a subject that was named 300
tokens ago must not draw a later question to its edit, and an edited question must be found behind any other text.
"""

import re

# Not an end of a sentence: initials, and abbreviations that stand before names and numbers.
ABBREVIATION = re.compile(r"(?:^|[\s(.])(?:[A-Z]|Mr|Mrs|Ms|Dr|St|Jr|Sr|Prof|No|vs|Mt|Ft|Inc|Ltd|Co|Corp|Gen|Col|Lt)\.$")
SENTENCE_END = re.compile(r"(?<![.!?。？！])[.!?。？！]+[\"')\]”’]*(?=\s)|\n+")
FEWEST_WORDS = 4  # "It is" says nothing alone
FEWEST_QUESTION_WORDS = 3  # "Who leads Oslo?" does
ANSWER_WORDS = 12  # words behind a question that may still belong to it: "Answer in one word."
MOST_WORDS = 48  # of a text without any sentence end
CONTEXT_SENTENCES = 3
TURN = "\x1e"  # stands between the turns of a conversation: what is asked lies in the last one


def asked(text: str) -> str:
    """The last sentence of a text; with the question before it when that was just put, or when it is too short
    alone."""
    return " ".join(" ".join(_split(text)[1]).split()[-MOST_WORDS:])


def before_asked(text: str) -> str:
    """The few sentences before what is asked: what a pronoun in it may point back to."""
    return " ".join(_split(text)[0][-CONTEXT_SENTENCES:])


def sentences(text: str) -> list[str]:
    found, start = [], 0
    for end in SENTENCE_END.finditer(text):
        if end.group().startswith(".") and ABBREVIATION.search(text[max(start, end.start() - 8) : end.start() + 1]):
            continue
        found.append(text[start : end.end()].strip())
        start = end.end()
    return [sentence for sentence in (*found, text[start:].strip()) if sentence]


def _split(text: str) -> tuple[list[str], list[str]]:
    """Sentences before what is asked, and those that ask."""
    *earlier, last = text.split(TURN)
    context = [sentence for turn in earlier for sentence in sentences(turn)]
    before = sentences(last)
    end: list[str] = []
    while before:
        words = sum(len(sentence.split()) for sentence in end)
        question_put = any("?" in sentence for sentence in end)
        answers = words <= ANSWER_WORDS and _is_question(before[-1]) and not question_put
        if words >= (FEWEST_QUESTION_WORDS if question_put else FEWEST_WORDS) and not answers:
            break
        end.insert(0, before.pop())
    return context + before, end


def _is_question(sentence: str) -> bool:
    return sentence.rstrip("\"')]”’").endswith(("?", "？"))
