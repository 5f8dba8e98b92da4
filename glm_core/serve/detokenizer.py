"""Converts token ids to text as they are generated, and stops at stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

INCOMPLETE = "\ufffd"
"""what a tokenizer decodes from the first bytes of a character"""
CONTEXT_TOKENS = 4
"""tokens that are decoded again with those after them: a decoder's text depends on what is before,
such as the blank that it strips from the first word"""


class Detokenizer:
    """Returns text piece by piece. Characters whose bytes are incomplete, and text that may begin a
    stop string, are held back. The pieces, joined, are the text before the stop string that is
    complete first."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stop_strings: Sequence[str] = (),
        strip_start: bool = False,
    ) -> None:
        """strip_start: drops whitespace at the start (ChatGLM3 and GLM-4 put a newline before every
        reply, and their authors' chat strips it)."""
        self._decode, self._stop_strings = decode, [s for s in stop_strings if s]
        self._strip_start = strip_start
        """until the first visible character"""
        self._ids: list[int] = []
        """the latest tokens; they begin with a character"""
        self._ends = [0]
        """places in `_ids` where a character ends with a token"""
        self._num_known = 0
        """characters of the text of `_ids` that are in `_held` or returned"""
        self._held = ""
        """decoded text that is not returned yet"""
        self.stopped = False
        """whether a stop string came; no more text is returned"""

    def feed(self, tokens: Sequence[int], last: bool = False) -> str:
        """Returns the text that is known after `tokens`; with `last`, all the text that is left."""
        text = self._next_text(tokens, last)
        if self._strip_start:
            text = text.lstrip()
            self._strip_start = not text
        return text

    def _next_text(self, tokens: Sequence[int], last: bool) -> str:
        if self.stopped:
            return ""
        for token in tokens:
            self._ids.append(token)
            self._held += self._decode_new(last=False)
        if last:
            self._held += self._decode_new(last=True)
        # the stop string that ends first, however many tokens came at once
        found = ((i + len(s), i) for s in self._stop_strings if (i := self._held.find(s)) >= 0)
        _, begin = min(found, default=(0, -1))
        if begin >= 0:
            self.stopped, text, self._held = True, self._held[:begin], ""
            return text
        overlaps = (_overlap(self._held, s) for s in self._stop_strings)
        end = len(self._held) - (0 if last else max(overlaps, default=0))
        text, self._held = self._held[:end], self._held[end:]
        return text

    def _decode_new(self, last: bool) -> str:
        """Returns the text that is known since the last call. Bytes at the end that are not a
        character yet are kept back, however many tokens they take; with `last` they are text."""
        text = self._decode(self._ids)
        complete = text if last else text.rstrip(INCOMPLETE)
        new, self._num_known = complete[self._num_known :], max(self._num_known, len(complete))
        if new and complete == text:
            self._forget()
        return new

    def _forget(self) -> None:
        """Keeps the tokens that are needed as context of the next ones. A cut inside a character
        would change the text of those that stay."""
        self._ends.append(len(self._ids))
        begin = max(end for end in self._ends if end <= max(len(self._ids) - CONTEXT_TOKENS, 0))
        if begin:
            self._ids = self._ids[begin:]
            self._ends = [end - begin for end in self._ends if end >= begin]
            self._num_known = len(self._decode(self._ids))


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
