"""Tokens as they come -> text as it may be shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"
MOST_BYTES = 4
"""tokens that one character can take when a tokenizer falls back to bytes"""


class TextStream:
    """Holds back characters whose bytes are not complete and text that may be the start of a stop
    string; all it gave, joined, is the text before the stop string that is complete first."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stops: Sequence[str] = (),
        spoken: bool = False,
    ) -> None:
        """spoken: it begins with the first visible character (ChatGLM3 and GLM-4 put a newline
        before every answer; their authors' chat strips it)."""
        self._decode, self._stops, self._silent = decode, [s for s in stops if s], spoken
        self._ids: list[int] = []
        self._shown = 0
        """tokens whose text is complete; those before them by a few are kept as context"""
        self._held = ""
        self.stopped = False
        """a stop string came; nothing follows"""

    def feed(self, tokens: Sequence[int], last: bool = False) -> str:
        """The text that can be shown now; with `last`, all that is left."""
        text = self._fed(tokens, last)
        if self._silent:
            text = text.lstrip()
            self._silent = not text
        return text

    def _fed(self, tokens: Sequence[int], last: bool) -> str:
        if self.stopped:
            return ""
        for token in tokens:
            self._ids.append(token)
            self._held += self._complete(last=False)
        if last:
            self._held += self._complete(last=True)
        # the one that is complete first, however many tokens came at once
        ends = ((i + len(s), i) for s in self._stops if (i := self._held.find(s)) >= 0)
        _, cut = min(ends, default=(0, -1))
        if cut >= 0:
            self.stopped, text, self._held = True, self._held[:cut], ""
            return text
        keep = 0 if last else max((_overlap(self._held, s) for s in self._stops), default=0)
        at = len(self._held) - keep
        text, self._held = self._held[:at], self._held[at:]
        return text

    def _complete(self, last: bool) -> str:
        before = self._decode(self._ids[: self._shown])
        text = self._decode(self._ids)
        waiting = len(self._ids) - self._shown
        if not last and text.endswith(UNFINISHED) and waiting < MOST_BYTES:
            return ""
        # decoders look at the tokens before, never far
        self._ids = self._ids[max(0, len(self._ids) - MOST_BYTES) :] if waiting else self._ids
        self._shown = len(self._ids)
        return text[len(before) :]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
