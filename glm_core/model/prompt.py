"""Describes a prompt: its tokens, which of them see which, and at which positions they and the
generated tokens stand.

A prompt is part A (the text with a blank) and the start of part B (what fills it), or plain text
for the causal members of the family. Blanks are handled as GLM-130B generates: generate.py,
fill_blanks and get_masks_and_position_ids."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Protocol

from glm_core.errors import PromptError

BLANK = re.compile(r"(\[[sg]?MASK\])")


class PromptTokenizer(Protocol):
    """The part of a tokenizer with GLM's blanks that prompts need."""

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
    """Tokens to be continued."""

    tokens: tuple[int, ...]
    sep: int = 0
    """length of part A, whose tokens all see each other; 0: causal"""
    mask: int | None = None
    """index of the blank in A, at whose position all of B stands; None: positions run on"""
    adapter: str = ""
    """the LoRA that continues it (model/loras.py); empty: the model alone"""

    def position(self, place: int) -> tuple[int, int]:
        """Returns rows 0 and 1 of the positions of the token at index `place`, in the prompt or
        generated."""
        if place < self.sep or not self.sep:
            return place, 0
        return (place if self.mask is None else self.mask), place - self.sep + 1

    def key_end(self, place: int) -> int:
        """Returns the end of the keys that the token at index `place` sees."""
        return max(place + 1, self.sep)


def causal(tokens: Sequence[int]) -> Prompt:
    """Returns the prompt of a text to be continued by a causal model (ChatGLM2 and later)."""
    return Prompt(tuple(tokens))


def encode(text: str, tokenizer: PromptTokenizer) -> list[int]:
    """Returns the text's ids, with blanks where it spells [MASK], [sMASK] or [gMASK]."""
    ids = {"[MASK]": tokenizer.mask, "[sMASK]": tokenizer.smask, "[gMASK]": tokenizer.gmask}
    return [
        i
        for part in BLANK.split(text)
        for i in ([ids[part]] if part in ids else tokenizer.encode(part) if part else [])
    ]


def part_a(tokens: Sequence[int], tokenizer: PromptTokenizer) -> list[int]:
    """Returns `tokens` as a complete part A: with [gMASK] at the end if it has no blank, with <eos>
    at the end if it does not end in a blank."""
    blanks = {tokenizer.mask, tokenizer.smask, tokenizer.gmask}
    a = list(tokens)
    if not blanks & set(a):
        return [*a, tokenizer.gmask]
    return a if a[-1] in blanks else [*a, tokenizer.eos]


def blank(a: Sequence[int], tokenizer: PromptTokenizer, positions: str) -> Prompt:
    """Returns the prompt that fills the first blank of part A. positions: the model's kind
    (ModelConfig.positions); with one row of positions, those of a [gMASK] run on. Raises
    PromptError if A has no blank."""
    blanks = {tokenizer.mask, tokenizer.smask, tokenizer.gmask}
    place = next((i for i, token in enumerate(a) if token in blanks), None)
    if place is None:
        raise PromptError("prompt: has no blank; write [MASK], [sMASK] or [gMASK] where it goes")
    runs_on = positions == "rope" and a[place] == tokenizer.gmask
    return Prompt((*a, tokenizer.sop), len(a), None if runs_on else place)


def fill_blank(a: Sequence[int], text: Sequence[int], tokenizer: PromptTokenizer) -> list[int]:
    """Returns part A with `text` in place of its first blank."""
    blanks = {tokenizer.mask, tokenizer.smask, tokenizer.gmask}
    place = next(i for i, token in enumerate(a) if token in blanks)
    return [*a[:place], *text, *a[place + 1 :]]
