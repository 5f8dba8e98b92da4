"""Shows on stderr how far a command is."""

from __future__ import annotations

import sys
import time

EARLY_S = 5.0
"""the time that is left is not estimated before so many seconds have passed"""


class ProgressLine:
    """One line that is overwritten. Where stderr is no terminal but a log, one line for each part
    of the work instead, when it begins."""

    def __init__(self) -> None:
        self.begin, self.first, self.of, self.done = time.perf_counter(), 0, 0, 0
        self.parts: set[str] = set()

    def __call__(self, text: str, done: int, of: int, part: str = "") -> None:
        """Shows that `done` of `of` steps are done. `text` says what is being done; `part` is what
        a log names (default: the text)."""
        if of != self.of or done < self.done:  # another count: the clock starts again
            self.begin, self.first, self.of = time.perf_counter(), done, of
        self.done, part = done, part or text
        if sys.stderr.isatty():
            end = "" if done < of else "\n"
            line = f"\r{done}/{of} {text:<60.60} {self.left():<22}"
            print(line, end=end, file=sys.stderr, flush=True)
        elif part not in self.parts:
            print(f"{done}/{of} {part} {self.left()}".rstrip(), file=sys.stderr, flush=True)
        self.parts.add(part)

    def left(self) -> str:
        """Returns about how long the rest takes, in words; empty where nobody can say."""
        passed, done = time.perf_counter() - self.begin, self.done - self.first
        if passed < EARLY_S or not done or self.done >= self.of:
            return ""
        seconds = passed / done * (self.of - self.done)
        amount = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
        return f"about {amount} left"
