"""Generates text: sequences come and go in the slots of one cache, and each step adds one token to
each.

A sequence's tokens depend on its own prompt, settings and seed alone; to the bit with kernels whose
rows do not depend on the number of rows (docs/generation.md names them)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from glm_core.errors import GenerationError, PromptError
from glm_core.model.generation import Generation
from glm_core.model.glm import GLM
from glm_core.model.prompt import Prompt, PromptTokenizer, blank, fill_blank
from glm_core.model.reuse import Reuse
from glm_core.model.runner import CHUNK, DecodeRow, Runner, idle
from glm_core.model.sample import Sampling, adjust, choose, report
from glm_core.model.speculate import Drafter


class Decoder:
    """Up to `slots` sequences that share the model's steps. A Runner in place of the model brings
    its own slots. num_ids: ids that the tokenizer knows; the vocabulary's padding beyond them is
    never generated. reuse: a prompt that begins like an earlier one takes over its keys and values
    (`Reuse`); the model must not change meanwhile. A runner that speculates drafts for a sequence
    that is alone."""

    def __init__(
        self,
        model: GLM | Runner,
        slots: int = 1,
        length: int | None = None,
        num_ids: int | None = None,
        chunk: int = CHUNK,
        reuse: bool = False,
    ) -> None:
        self.runner = model if isinstance(model, Runner) else Runner(model, slots, length, chunk)
        self._reuse = Reuse(self.runner, reuse)
        self._reading: list[Generation] = []
        self.num_ids = num_ids or model.config.vocab
        self._drafter = Drafter(self.runner, self.num_ids) if self.runner.speculate else None
        self.live: list[Generation | None] = [None] * self.runner.slots

    @property
    def free(self) -> int:
        """Returns the number of slots without a sequence."""
        return self.live.count(None)

    def begin(self, prompt: Prompt, sampling: Sampling) -> Generation:
        """Starts a sequence whose prompt will be read by the next steps. Raises PromptError."""
        self.runner.require_room(prompt)
        free = [slot for slot, live in enumerate(self.live) if live is None]
        slot = self._reuse.choose(free, prompt)
        generation = self.live[slot] = Generation(prompt, sampling, slot, 0)
        self._reading.append(generation)
        return generation

    def add(self, prompt: Prompt, sampling: Sampling) -> Generation:
        """Starts a sequence and reads its prompt, so that it has its first token or is finished.
        Raises PromptError."""
        generation = self.begin(prompt, sampling)
        while generation.reading:
            self._read(generation)
        return generation

    def add_padded(
        self, prompts: Sequence[Prompt], settings: Sequence[Sampling]
    ) -> list[Generation]:
        """Starts sequences with one call, padded on the left, in a decoder without any. The tokens
        are those of `add` up to rounding. Raises PromptError."""
        if len(prompts) > len(self.live) or any(self.live):
            raise PromptError(
                f"{len(prompts)} prompts: a padded batch needs as many free slots; "
                f"{self.free} of {len(self.live)} are free"
            )
        return self._start(prompts, settings, 0)

    def step(self) -> list[Generation]:
        """Reads about `chunk` tokens of waiting prompts, in the order they came, then generates one
        token for every sequence whose prompt is read, or several where drafts were right. Returns
        those sequences; finished ones have left their slots."""
        room, begun = self.runner.chunk, list(self._reading)
        for g in begun:
            while g.reading and room > 0:
                room -= self._read(g)
        going = [g for g in self.live if g and not g.reading]
        if self._drafter is not None and len(going) == 1:
            self._speculate(going[0], self._drafter)
        elif going:
            for g in going:
                self._forget_drafts(g.slot)
            rows = max(g.slot for g in going) + 1
            logits = self.runner.decode([self._row(slot) for slot in range(rows)])
            self._choose(logits[[g.slot for g in going]], going)
        return going

    def _speculate(self, g: Generation, drafter: Drafter) -> None:
        """Drafts tokens, lets the model check them, and takes those that it chooses too, and the
        one that it chooses after them."""
        left = min(g.sampling.max_tokens, self._room(g)) - len(g.tokens)
        drafts = drafter.propose(g, min(self.runner.speculate, left - 1))
        [last] = g.latest(1)
        fed = [last._replace(token=t, place=last.place + i + 1) for i, t in enumerate(drafts)]
        logits = self.runner.verify(g.slot, [last, *fed])
        self.runner.drafted += len(drafts)
        for i in range(len(logits)):
            self._choose(logits[i : i + 1], [g])
            if g.finish or i == len(drafts) or g.tokens[-1] != drafts[i]:
                break
            self.runner.accepted += 1
        drafter.keep(g.slot, i + 1)

    def _forget_drafts(self, slot: int) -> None:
        if self._drafter is not None:
            self._drafter.forget(slot)

    def _room(self, g: Generation) -> int:
        """Returns how many new tokens fit into the context."""
        return self.runner.length - len(g.prompt.tokens) - g.offset

    def _row(self, slot: int) -> DecodeRow:
        """Returns what the next decode step feeds to a slot. A row without a token writes behind
        what the slot holds."""
        g = self.live[slot]
        if g and not g.reading:
            return g.next()
        return idle(max(g.read if g else 0, self._reuse.num_held(slot)))

    def cancel(self, generation: Generation) -> None:
        """Ends a sequence early and frees its slot."""
        if not generation.finish:
            generation.finish = "cancelled"
            self._release(generation)

    def clear(self) -> None:
        """Frees all slots, and forgets what they hold."""
        self.live, self._reading = [None] * len(self.live), []
        for slot in range(len(self.live)):
            self._reuse.forget(slot)

    def _release(self, generation: Generation) -> None:
        self.live[generation.slot] = None
        if generation in self._reading:
            self._reading.remove(generation)
        if generation.error:  # what is not finite is no one's beginning
            self._reuse.forget(generation.slot)

    def _read(self, generation: Generation) -> int:
        """Reads the next chunk of a sequence's prompt, and after the last chunk generates the first
        token. Returns the number of tokens read."""
        g = generation
        if g.reused is None:
            g.reused = g.read = self._reuse.bring(g.slot, g.prompt)
            self._forget_drafts(g.slot)
        before = g.read
        logits, g.read = self.runner.read(g.slot, [g.prompt], before)
        if self._drafter is not None:
            self._drafter.read_prompt(g.slot)
        self._reuse.keep(g.slot, g.prompt, g.read)
        if not g.reading:
            self._reading.remove(g)
            self._choose(logits, [g])
        return g.read - before

    def _start(
        self, prompts: Sequence[Prompt], settings: Sequence[Sampling], first: int
    ) -> list[Generation]:
        longest = max(len(p.tokens) for p in prompts)
        logits = self.runner.prefill(first, prompts)
        started = [
            Generation(p, s, first + i, longest - len(p.tokens))
            for i, (p, s) in enumerate(zip(prompts, settings, strict=True))
        ]
        for g in started:
            g.read = len(g.prompt.tokens)
        self.live[first : first + len(started)] = started
        self._choose(logits, started)
        return started

    def _choose(self, logits: torch.Tensor, going: list[Generation]) -> None:
        """Chooses a token for each sequence. Logits that are not finite end only their own
        sequence."""
        logits = logits[:, : self.num_ids]
        finite = torch.isfinite(logits).all(-1).tolist()
        for g, is_finite in zip(going, finite, strict=True):
            if not is_finite:
                g.finish, g.error = "error", self._explain(g)
        plain = logits
        if any(g.sampling.adjusts for g in going):
            logits = logits.clone()
            for i, g in enumerate(going):
                adjust(logits[i], g.sampling, g.prompt.tokens, g.tokens)
        rows = [i for i, is_finite in enumerate(finite) if is_finite]
        chosen = choose(
            logits[rows], [going[i].sampling for i in rows], [going[i].draw() for i in rows]
        )
        for i, token in zip(rows, chosen, strict=True):
            g = going[i]
            if g.sampling.logprobs is not None:
                g.logprobs.append(report(plain[i], token, g.sampling.logprobs))
            if g.sampling.constraint is not None:
                g.sampling.constraint.accept(token)
            g.take(token, self._room(g))
        for g in going:
            if g.finish:
                self._release(g)

    def _explain(self, g: Generation) -> GenerationError:
        return self.runner.explain(self.runner.last, len(g.tokens) + 1)


def generate(
    model: GLM | Runner,
    prompts: Sequence[Prompt],
    sampling: Sampling | Sequence[Sampling],
    *,
    slots: int = 8,
    padded: bool = False,
    num_ids: int | None = None,
) -> list[Generation]:
    """Continues every prompt; with more prompts than `slots`, the others wait for a free one.
    padded: read all prompts in one call, padded on the left, instead of one by one. Raises
    PromptError for a prompt that cannot be continued, GenerationError for logits that are not
    finite."""
    settings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    decoder = Decoder(model, len(prompts) if padded else min(slots, len(prompts)), num_ids=num_ids)
    done = decoder.add_padded(prompts, settings) if padded and prompts else []
    waiting = list(zip(prompts, settings, strict=True))[len(done) :]
    for prompt, _ in waiting:
        decoder.runner.require_room(prompt)
    while waiting or any(decoder.live):
        while waiting and decoder.free:
            done.append(decoder.add(*waiting.pop(0)))
        decoder.step()
    if failed := next((g.error for g in done if g.error), None):
        raise failed
    return done


def stream(
    model: GLM | Runner, prompt: Prompt, sampling: Sampling, *, num_ids: int | None = None
) -> Iterator[int]:
    """Yields the tokens of `generate`, each as soon as it is known."""
    decoder = Decoder(model, num_ids=num_ids)
    generation, num_yielded = decoder.add(prompt, sampling), 0
    while True:
        yield from generation.tokens[num_yielded:]
        num_yielded = len(generation.tokens)
        if generation.error:
            raise generation.error
        if generation.finish:
            return
        decoder.step()


def fill(
    model: GLM | Runner,
    a: Sequence[int],
    sampling: Sampling,
    tokenizer: PromptTokenizer,
    num_ids: int | None = None,
) -> list[int]:
    """Returns part A with all its blanks filled from left to right; each blank sees the earlier
    ones filled (GLM-130B, fill_blanks_generation_api). <eop> and <eos> end a blank. Raises
    PromptError if A has no blank."""
    blanks = {tokenizer.mask, tokenizer.smask, tokenizer.gmask}
    prompt, tokens = blank(a, tokenizer, model.config.positions), list(a)
    while True:
        (generation,) = generate(model, [prompt], sampling, num_ids=num_ids)
        # a generated blank would be filled again, without end
        tokens = fill_blank(tokens, [t for t in generation.tokens if t not in blanks], tokenizer)
        if not blanks & set(tokens):
            return tokens
        prompt = blank(tokens, tokenizer, model.config.positions)
