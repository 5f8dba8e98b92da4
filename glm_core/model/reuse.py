"""Reuses the keys and values that a slot holds of an earlier prompt for a prompt that begins alike.

Only whole chunks are reused: they are read by the same calls whatever follows them, so every bit of
the result is that of a prompt read from its beginning. Memory does not grow, because the chunks lie
in the cache's own slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from glm_core.model.prompt import Prompt
from glm_core.model.runner import Runner


class Held(NamedTuple):
    """The beginning of a prompt that lies in a slot: whole chunks."""

    tokens: tuple[int, ...] = ()
    adapter: str = ""
    """the LoRA that its keys and values were computed with"""


class Reuse:
    """Knows which chunks lie in which slot of a runner, and finds those that a prompt shares."""

    def __init__(self, runner: Runner, enabled: bool) -> None:
        """enabled: False: nothing is kept."""
        self._runner, self._enabled = runner, enabled
        self._held = [Held()] * runner.slots
        self._order = list(range(runner.slots))
        """slots, the one that was used longest ago first"""

    def num_held(self, slot: int) -> int:
        """Returns how many places at the beginning of a slot must not be written to."""
        return len(self._held[slot].tokens)

    def choose(self, free: Sequence[int], prompt: Prompt) -> int:
        """Returns the free slot that a prompt goes to: one whose chunks it can use all, else an
        empty one, else the one that was used longest ago."""

        def price(slot: int) -> tuple[int, int]:
            lost = self.num_held(slot) - self._shared(slot, prompt)
            # of several slots that lose nothing, the one with most of the prompt
            return (self._order.index(slot), 0) if lost else (-1, -self.num_held(slot))

        slot = min(free, key=price)
        self._order.remove(slot)
        self._order.append(slot)
        return slot

    def bring(self, slot: int, prompt: Prompt) -> int:
        """Puts the longest beginning of a prompt that any slot holds into this one, and returns its
        number of tokens. At least one token of the prompt is left to be read."""
        source = max(range(len(self._held)), key=lambda s: (self._shared(s, prompt), s == slot))
        shared = self._shared(source, prompt)
        if shared and source != slot:
            self._runner.cache.copy([source], [slot], shared)
        self._held[slot] = Held(prompt.tokens[:shared], prompt.adapter)
        return shared

    def keep(self, slot: int, prompt: Prompt, num_read: int) -> None:
        """Notes that the first `num_read` tokens of a prompt have been read into a slot. Prompts
        whose tokens see those after them (part A of a blank-filling one) are not kept."""
        if self._enabled and not prompt.sep:
            whole = num_read - num_read % self._runner.chunk
            self._held[slot] = Held(prompt.tokens[:whole], prompt.adapter)

    def forget(self, slot: int) -> None:
        """Drops what a slot holds."""
        self._held[slot] = Held()

    def _shared(self, slot: int, prompt: Prompt) -> int:
        """Returns how many tokens of whole chunks the prompt has in common with a slot."""
        held, chunk = self._held[slot], self._runner.chunk
        if prompt.sep or held.adapter != prompt.adapter:
            return 0
        pairs = enumerate(zip(held.tokens, prompt.tokens, strict=False))
        most = min(len(held.tokens), len(prompt.tokens) - 1)
        alike = next((i for i, (a, b) in pairs if a != b), most)
        return min(alike, most) // chunk * chunk
