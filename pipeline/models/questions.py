"""What a text asks: its end.

A model answers the end of what it reads, so the router's text signals read the end too: a subject that was named 300
tokens ago must not draw a later question to its edit, and an edited question must be found behind any other text.
"""

import re

# Not an end of a sentence: initials, and abbreviations that stand before names and numbers.
ABBREVIATION = re.compile(r"(?:^|[\s(.])(?:[A-Z]|Mr|Mrs|Ms|Dr|St|Jr|Sr|Prof|No|vs|Mt|Ft|Inc|Ltd|Co|Corp|Gen|Col|Lt)\.$")
SENTENCE_END = re.compile(r"[.!?。？！]+[\"')\]”’]*(?=\s)|\n+")
FEWEST_WORDS = 4  # "It is" says nothing alone
ANSWER_WORDS = 12  # words behind a question that may still belong to it: "Answer in one word."
MOST_WORDS = 48  # of a text without any sentence end


def sentences(text: str) -> list[str]:
    found, start = [], 0
    for end in SENTENCE_END.finditer(text):
        if end.group().startswith(".") and ABBREVIATION.search(text[max(start, end.start() - 8) : end.start() + 1]):
            continue
        found.append(text[start : end.end()].strip())
        start = end.end()
    return [sentence for sentence in (*found, text[start:].strip()) if sentence]


def asked(text: str) -> str:
    """The last sentence of a text; with the question before it when that was just put, or when it is too short alone."""
    parts = sentences(text)
    if not parts:
        return text.strip()
    kept = [parts.pop()]
    while parts:
        words = len(" ".join(kept).split())
        follows_question = parts[-1].rstrip("\"')]”’").endswith(("?", "？")) and words <= ANSWER_WORDS
        question_put = any("?" in part for part in kept)
        if words >= FEWEST_WORDS and (question_put or not follows_question):
            break
        kept.insert(0, parts.pop())
    return " ".join(" ".join(kept).split()[-MOST_WORDS:])
