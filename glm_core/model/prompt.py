"""What a model of the family is asked: the tokens, what they see of each other, and where they and
the tokens to come stand.

A prompt is part A (with a blank) and the start of part B, or for the causal members of the family
just text. Blanks as GLM-130B generates: generate.py, fill_blanks and get_masks_and_position_ids."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Protocol

from glm_core.errors import PromptError

BLANK = re.compile(r"(\[[sg]?MASK\])")


class PromptTokenizer(Protocol):
    """What a prompt needs of a tokenizer with GLM's blanks."""

    mask: int
    gmask: int
    smask: int
    eos: int
    eop: int
    sop: int

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens to go on from."""

    tokens: tuple[int, ...]
    sep: int = 0
    """length of part A, whose tokens all see each other; 0: causal"""
    mask: int | None = None
    """place of the blank in A, whose position all of B keeps; None: positions run on"""

    def position(self, place: int) -> tuple[int, int]:
        """Rows 0 and 1 of the token at `place`, prompt or generated."""
        if place < self.sep or not self.sep:
            return place, 0
        return (place if self.mask is None else self.mask), place - self.sep + 1

    def key_end(self, place: int) -> int:
        """The token at `place` sees those before this one."""
        return max(place + 1, self.sep)


def causal(tokens: Sequence[int]) -> Prompt:
    """Text that is continued by a causal model (ChatGLM2 and later)."""
    return Prompt(tuple(tokens))


def encode(text: str, pieces: PromptTokenizer) -> list[int]:
    """The text's ids, with blanks where it spells [MASK], [sMASK] or [gMASK]."""
    ids = {"[MASK]": pieces.mask, "[sMASK]": pieces.smask, "[gMASK]": pieces.gmask}
    return [
        i
        for part in BLANK.split(text)
        for i in ([ids[part]] if part in ids else pieces.encode(part) if part else [])
    ]


def part_a(tokens: Sequence[int], pieces: PromptTokenizer) -> list[int]:
    """Part A of `tokens`: with [gMASK] at the end where there is no blank, with <eos> where the end
    is no blank."""
    blanks = {pieces.mask, pieces.smask, pieces.gmask}
    a = list(tokens)
    if not blanks & set(a):
        return [*a, pieces.gmask]
    return a if a[-1] in blanks else [*a, pieces.eos]


def blank(a: Sequence[int], pieces: PromptTokenizer, positions: str) -> Prompt:
    """The prompt that fills the first blank of part A. positions: the model's kind
    (ModelConfig.positions); only where there is one row do those of a [gMASK] run on. Raises
    PromptError where A has no blank."""
    blanks = {pieces.mask, pieces.smask, pieces.gmask}
    place = next((i for i, token in enumerate(a) if token in blanks), None)
    if place is None:
        raise PromptError("prompt: has no blank; write [MASK], [sMASK] or [gMASK] where it goes")
    runs_on = positions == "rope" and a[place] == pieces.gmask
    return Prompt((*a, pieces.sop), len(a), None if runs_on else place)


def fill_blank(a: Sequence[int], answer: Sequence[int], pieces: PromptTokenizer) -> list[int]:
    """Part A with `answer` in place of its first blank."""
    blanks = {pieces.mask, pieces.smask, pieces.gmask}
    place = next(i for i, token in enumerate(a) if token in blanks)
    return [*a[:place], *answer, *a[place + 1 :]]
