"""Token ids in, printable text out, while the answer is still being written.

Two things make this more than decoding token by token: one character may be spread over several tokens, and text that
may yet turn into a stop string must not be shown. Joined, the pieces are the whole answer, so a streamed answer and an
unstreamed one cannot differ.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

# Prompt tokens decoded in front of the answer, so that sentencepiece tokenizers keep the blank before its first word
# (vLLM's INITIAL_INCREMENTAL_DETOKENIZATION_OFFSET).
CONTEXT_TOKENS = 5
REPLACEMENT = "\ufffd"  # what an unfinished UTF-8 character decodes to
LONGEST_CHARACTER = 4  # bytes, so as many tokens at most: what stands further back is decided
MOST_PENDING = 16  # tokens; bytes that never become a character would else be decoded again with every token


class TextStream:
    """Text of one answer; with `strip_start` it begins with a visible character. Once `stopped`, add nothing."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prompt_ids: Sequence[int],
        stop: Sequence[str] = (),
        strip_start: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._strip_start = strip_start
        # Ids of the last decoding window; its first `_shown` ids are already in the text.
        self._window = list(prompt_ids[-CONTEXT_TOKENS:])
        self._shown = len(self._window)
        self._held = ""  # decoded, but it may become a stop string
        self._certain = 0  # characters given out
        self.stopped = False

    @property
    def length(self) -> int:
        """Characters so far, those that are held back included; where the next token's text begins."""
        return self._certain + len(self._held)

    def add(self, token_id: int) -> str:
        """Text that is now certain; empty while a character or a possible stop string is unfinished."""
        self._window.append(token_id)
        text = self._undecoded(len(self._window))
        if not text.endswith(REPLACEMENT):
            return self._release(text, len(self._window))
        if len(self._window) - self._shown < MOST_PENDING:
            return ""
        decided = self._decided(text)
        return self._release(self._undecoded(decided), decided)

    def finish(self) -> str:
        """What was held back: the answer is over, so it can become neither a character nor a stop string."""
        text = self._release(self._undecoded(len(self._window)), len(self._window))
        if self.stopped:
            return text
        held, self._held = self._held, ""
        self._certain += len(held)
        return text + held

    def _undecoded(self, end: int) -> str:
        """Text of the window's tokens up to `end` that is not given out or held back yet."""
        return self._decode(self._window[:end])[len(self._decode(self._window[: self._shown])) :]

    def _decided(self, text: str) -> int:
        """Where the window can be cut with no character in two. Where it cannot (tokens that all begin and end inside
        characters), it is cut all the same."""
        last = len(self._window) - LONGEST_CHARACTER
        cuts = range(last, self._shown, -1)
        return next((cut for cut in cuts if text.startswith(self._undecoded(cut))), last)

    def _release(self, text: str, end: int) -> str:
        """`text` is that of the window's tokens up to `end`."""
        if text:
            self._window = self._window[self._shown :]
            self._shown = end - self._shown
        if self._strip_start:
            text = text.lstrip()
            self._strip_start = not text
        self._held += text
        starts = [start for stop in self._stop if (start := self._held.find(stop)) >= 0]
        if starts:
            self.stopped = True
            text, self._held = self._held[: min(starts)], ""
        else:
            certain = len(self._held) - max((_overlap(self._held, stop) for stop in self._stop), default=0)
            text, self._held = self._held[:certain], self._held[certain:]
        self._certain += len(text)
        return text

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


def _overlap(text: str, stop: str) -> int:
    """Longest end of `text` that is a proper beginning of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
