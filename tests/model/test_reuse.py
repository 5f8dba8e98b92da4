"""A prompt that begins like an earlier one takes over its keys and values, and not one bit of the
reply changes."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from kinds import model, prompts

from glm_core.backends import registry
from glm_core.model.generate import Decoder, generate
from glm_core.model.generation import Generation
from glm_core.model.prompt import Prompt, causal
from glm_core.model.sample import Sampling

CHUNK = 4
ASK = Sampling(max_tokens=4, seed=1, logprobs=2)


def run(decoder: Decoder) -> None:
    """Steps until all replies are complete."""
    while any(decoder.live):
        decoder.step()


def ask(decoder: Decoder, prompt: Prompt) -> Generation:
    generation = decoder.add(prompt, ASK)
    run(decoder)
    return generation


def replies(seed: int, num_slots: int) -> list[tuple[Generation, Prompt]]:
    """Runs prompts that share beginnings and come and go at random, and returns their replies."""
    draw, built = random.Random(seed), model("glm-4")
    decoder = Decoder(built, num_slots, chunk=CHUNK, reuse=True)
    asked: list[tuple[Generation, Prompt]] = []
    for _ in range(30):
        kept = draw.choice(asked)[1].tokens[: draw.randrange(24)] if asked else ()
        rest = tuple(draw.randrange(1, 50) for _ in range(draw.randrange(1, 9)))
        if decoder.free:
            prompt = causal([*kept, *rest])
            asked.append((decoder.begin(prompt, ASK), prompt))
        if draw.random() < 0.1:
            decoder.cancel(draw.choice(asked)[0])
        decoder.step()
    run(decoder)
    return asked


@pytest.mark.parametrize(("backend", "num_slots"), [("reference", 1), ("cpu", 3)])
def test_no_bit_of_a_reply_changes(backend: str, num_slots: int) -> None:
    """The log probabilities of every token are those of a decoder that keeps nothing. The
    reference's products depend on the number of rows, so it decodes one at a time."""
    with registry.use(backend):
        plain = Decoder(model("glm-4"), 1, chunk=CHUNK)
        reused = 0
        for generation, prompt in replies(0, num_slots):
            if generation.finish != "cancelled":
                alone = ask(plain, prompt)
                assert (generation.tokens, generation.logprobs) == (alone.tokens, alone.logprobs)
                assert (generation.reused or 0) % CHUNK == alone.reused == 0
                reused += generation.reused or 0
        assert reused > 16


def test_what_is_reused() -> None:
    """Whole chunks, and never the last token; of any slot, running or free."""
    decoder = Decoder(model("glm-4"), 3, chunk=CHUNK, reuse=True)
    first = causal(range(1, 13))
    assert ask(decoder, first).reused == 0
    assert ask(decoder, first).reused == 8
    assert ask(decoder, causal([*first.tokens, 13])).reused == 12
    assert ask(decoder, causal([*first.tokens[:7], 40, 41, 42])).reused == 4
    assert ask(decoder, causal([2, *first.tokens])).reused == 0
    other = dataclasses.replace(first, adapter="other")
    assert decoder._reuse.choose([0, 1, 2], other) >= 0
    assert all(decoder._reuse._shared(slot, other) == 0 for slot in range(3))
    running = decoder.begin(causal([30] * 9), ASK)
    late = decoder.begin(causal([30] * 10), ASK)
    run(decoder)
    assert (running.reused, late.reused) == (0, 8)
    decoder.clear()
    assert ask(decoder, first).reused == 0


def test_a_conversation_stays_in_its_slot() -> None:
    """What goes on where it was leaves the other slots as they are; a new beginning takes the slot
    that was used longest ago."""
    decoder = Decoder(model("glm-4"), 2, chunk=CHUNK, reuse=True)
    turns = [causal(range(1, n)) for n in (10, 14, 18)]
    other = causal([40] * 10)
    assert [ask(decoder, turns[0]).slot, ask(decoder, other).slot] == [0, 1]
    assert [(g.slot, g.reused) for g in (ask(decoder, t) for t in turns[1:])] == [(0, 8), (0, 12)]
    assert ask(decoder, causal([30] * 9)).slot == 1
    assert ask(decoder, turns[2]).reused == 16


def test_a_blank_filling_prompt_is_read_again() -> None:
    """Its tokens see those after them, so no beginning is the same."""
    built = model("glm-130b")
    decoder = Decoder(built, 2, chunk=CHUNK, reuse=True)
    for prompt in prompts("glm-130b"):
        for _ in range(2):
            generation = ask(decoder, prompt)
            assert generation.reused == decoder._reuse.num_held(generation.slot) == 0
            assert generation.tokens == generate(built, [prompt], ASK)[0].tokens


def test_numbers_that_are_not_finite_are_not_kept() -> None:
    built = model("glm-4")
    decoder = Decoder(built, 1, chunk=CHUNK, reuse=True)
    weight = built.blocks[0].mlp.down.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
    assert ask(decoder, causal(range(1, 10))).error
    with torch.no_grad():
        weight.copy_(before)
    assert ask(decoder, causal(range(1, 10))).reused == 0
