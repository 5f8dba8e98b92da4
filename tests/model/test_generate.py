"""Generation gives the same tokens with and without a cache, alone and in a batch; it stops, fills
blanks, and refuses bad input."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from kinds import GREEDY, KINDS, LENGTH, PIECES, V, model, prompts, whole

from glm_core import dispatch, ops
from glm_core.backends import registry
from glm_core.errors import ConfigError, GenerationError, PromptError
from glm_core.model.generate import Decoder, fill, generate, stream
from glm_core.model.prompt import blank, causal, encode, part_a
from glm_core.model.runner import DecodeRow, Runner
from glm_core.model.sample import Sampling, adjust, choose


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("kind", KINDS)
def test_cached_logits_are_those_without_a_cache(kind: str, backend: str) -> None:
    """Both are float32; each stays within twice the uncached call's error against float64."""
    built = model(kind)
    exact = model(kind).double()
    with registry.use(backend):
        for prompt in prompts(kind):
            runner, tokens = Runner(built, 1), [9, 30, 17]
            seen = [runner.prefill(0, [prompt])[0]]
            for i, token in enumerate(tokens):
                seen += [runner.decode([DecodeRow(token, prompt, len(prompt.tokens) + i)])[0]]
            for i, logits in enumerate(seen):
                truth = whole(exact, prompt, tokens[:i])
                rounding = float((whole(built, prompt, tokens[:i]) - truth).abs().max())
                floor = 8 * torch.finfo(torch.float32).eps * float(truth.abs().max())
                assert float((logits - truth).abs().max()) <= 2 * rounding + floor


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_do_not_depend_on_the_batch(kind: str, backend: str) -> None:
    """Alone, beside any others, padded on the left, with fewer slots than prompts: the tokens are
    the same, sampled ones too."""
    built, asked = model(kind), prompts(kind)
    settings = [
        dataclasses.replace(GREEDY, seed=i, temperature=t, top_p=0.9)
        for i, t in enumerate((0, 0.7, 1.0, 1.3))
    ]
    with registry.use(backend):
        alone = [generate(built, [p], s)[0].tokens for p, s in zip(asked, settings, strict=True)]
        assert len({tuple(t) for t in alone}) >= 3
        for options in ({}, {"slots": 2}, {"slots": 3}, {"padded": True}):
            together = generate(built, asked, settings, **options)
            assert [g.tokens for g in together] == alone, options


@pytest.mark.parametrize("kind", KINDS)
def test_only_linear_can_make_the_batch_matter(kind: str) -> None:
    """If products are computed one row at a time, a step's logits on `cpu` have the same bits alone
    and beside others."""

    def by_row(op: dispatch.Op, args: Any, kwargs: Any) -> Any:
        if op is not ops.linear or len(args[0]) == 1:
            return dispatch.run(op, args, kwargs)
        rows = [dispatch.run(op, (row[None], *args[1:]), kwargs) for row in args[0]]
        return torch.cat(rows)

    built, asked = model(kind), prompts(kind)
    fed = [DecodeRow(20 + i, p, len(p.tokens)) for i, p in enumerate(asked)]
    together = Runner(built, len(asked))
    with registry.use("cpu"), dispatch.intercept(by_row):
        for i, prompt in enumerate(asked):
            together.prefill(i, [prompt])
        logits = together.decode(fed)
        for i, prompt in enumerate(asked):
            alone = Runner(built, 1)
            alone.prefill(0, [prompt])
            assert torch.equal(alone.decode([fed[i]])[0], logits[i])


def test_slots_are_reused_and_idle_ones_disturb_nobody() -> None:
    built, asked = model("glm-130b"), prompts("glm-130b")
    alone = [generate(built, [p], GREEDY)[0].tokens for p in asked]
    decoder = Decoder(built, 3)
    first, second, third = (decoder.add(p, GREEDY) for p in asked[:3])
    decoder.step()
    decoder.cancel(first)
    decoder.cancel(second)
    assert decoder.free == 2
    decoder.step()  # slots 0 and 1 idle below slot 2
    late = decoder.add(asked[3], GREEDY)
    assert late.slot == 0
    while any(decoder.live):
        decoder.step()
    assert third.tokens == alone[2]
    assert late.tokens == alone[3]
    assert first.finish == "cancelled"
    assert decoder.step() == []


def test_memory_is_allocated_once() -> None:
    built = model("glm-4")
    runner = Runner(built, 5, length=20)
    c = built.config
    assert runner.cache.num_bytes == c.num_layers * 2 * 5 * 20 * c.num_kv_heads * c.head_dim * 4


@pytest.mark.parametrize("kind", KINDS)
def test_stream_gives_the_tokens_of_generate(kind: str) -> None:
    built, prompt = model(kind), prompts(kind)[0]
    settings = Sampling(max_tokens=9, seed=3)
    assert list(stream(built, prompt, settings)) == generate(built, [prompt], settings)[0].tokens


def test_stop_tokens_and_the_context_end_a_sequence() -> None:
    built, prompt = model("glm-130b"), prompts("glm-130b")[0]
    (free,) = generate(built, [prompt], GREEDY)
    assert (free.finish, len(free.tokens)) == ("length", 12)
    stop = free.tokens[5]
    at = free.tokens.index(stop)
    stopping = dataclasses.replace(GREEDY, stop=(stop,))
    (stopped,) = generate(built, [prompt], stopping)
    assert (stopped.finish, stopped.tokens) == ("stop", free.tokens[:at])
    (late,) = generate(built, [prompt], dataclasses.replace(stopping, min_tokens=at + 1))
    assert len(late.tokens) > at
    assert stop not in late.tokens[: at + 1]
    (full,) = generate(built, [prompt], Sampling(max_tokens=1000, temperature=0))
    assert (full.finish, len(full.tokens)) == ("length", LENGTH - len(prompt.tokens))


def test_padding_of_the_vocabulary_is_never_generated() -> None:
    done = generate(
        model("glm-4"),
        [causal([1])] * 9,
        [Sampling(seed=i, temperature=5.0) for i in range(9)],
        num_ids=7,
    )
    assert all(t < 7 for g in done for t in g.tokens)


# --- sampling ------------------------------------------------------------------------------------


def frequencies(logits: list[float], **settings: Any) -> list[float]:
    """How often each token is drawn over evenly spaced draws."""
    n = 1000
    drawn = choose(
        torch.tensor([logits]).expand(n, -1),
        [Sampling(**settings)] * n,
        [(i + 0.5) / n for i in range(n)],
    )
    return [drawn.count(i) / n for i in range(len(logits))]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1, -1, 2, 0.5]),
        ({"repetition_penalty": 2.0}, [0.5, -2, 1, 0.5]),  # of prompt 0 and reply 1, 2, 2
        ({"presence_penalty": 0.5}, [1, -1.5, 1.5, 0.5]),
        ({"frequency_penalty": 0.5}, [1, -1.5, 1, 0.5]),
        ({"presence_penalty": -1.0, "frequency_penalty": 0.25}, [1, -0.25, 2.5, 0.5]),
        ({"logit_bias": ((3, -100.0), (0, 1.0))}, [2, -1, 2, -99.5]),
        ({"min_tokens": 4, "stop": (0, 3)}, [-torch.inf, -1, 2, -torch.inf]),
        ({"min_tokens": 3, "stop": (0, 3)}, [1, -1, 2, 0.5]),
    ],
    ids=str,
)
def test_penalties_and_biases(settings: dict[str, Any], expected: list[float]) -> None:
    logits, sampling = torch.tensor([1.0, -1.0, 2.0, 0.5]), Sampling(**settings)
    before = logits.clone()
    adjust(logits, sampling, [0, 999], [1, 2, 2])
    assert logits.tolist() == expected
    assert sampling.adjusts or torch.equal(before, logits)


def test_log_probabilities_are_the_models_own() -> None:
    """They do not depend on penalties, temperature or the batch, and cover the stop token."""
    small, prompt = model("glm-4"), causal([1, 2])
    [plain] = generate(small, [prompt], Sampling(max_tokens=4, temperature=0, logprobs=2))
    assert [t.token for t in plain.logprobs] == plain.tokens
    assert all(t.top[0] == (t.token, t.logprob) and len(t.top) == 2 for t in plain.logprobs)
    [first, *_] = plain.logprobs
    forbid = ((first.token, -100.0),)
    stop = Sampling(max_tokens=4, temperature=0, logprobs=1, logit_bias=forbid, stop=(7,))
    both = generate(small, [prompt] * 2, [stop, Sampling(max_tokens=1, seed=3, temperature=9)])
    assert both[0].logprobs[0].token != first.token
    assert both[0].logprobs[0].top[0] == pytest.approx((first.token, first.logprob), abs=1e-5)
    assert not both[1].logprobs
    ends = Sampling(max_tokens=9, temperature=0, logprobs=0, stop=(first.token,))
    [ended] = generate(small, [prompt], ends)
    assert (ended.tokens, [t.token for t in ended.logprobs]) == ([], [first.token])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.75}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.81}, [0.526, 0.316, 0.158, 0]),
        ({"top_p": 0.01}, [1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.9}, [0.526, 0.316, 0.158, 0]),
        ({"top_k": 3, "top_p": 0.8}, [0.625, 0.375, 0, 0]),
        ({"min_p": 0.29}, [0.526, 0.316, 0.158, 0]),
        ({"min_p": 0.61, "top_p": 0.81}, [1, 0, 0, 0]),
        ({"temperature": 0.5}, [0.685, 0.247, 0.062, 0.007]),
        ({"temperature": 0}, [1, 0, 0, 0]),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(settings: dict[str, Any], expected: list[float]) -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log() + 3
    assert frequencies(logits.tolist(), **settings) == pytest.approx(expected, abs=2e-3)


def test_top_p_and_temperature_as_transformers() -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(4)) * 2
    theirs = process.TemperatureLogitsWarper(0.8)(None, logits)
    theirs = process.TopKLogitsWarper(20)(None, theirs)
    theirs = torch.softmax(process.TopPLogitsWarper(0.7)(None, theirs), -1)[0].tolist()
    ours = frequencies(logits[0].tolist(), temperature=0.8, top_k=20, top_p=0.7)
    assert ours == pytest.approx(theirs, abs=2e-3)


def test_seeds_matter_and_repeat() -> None:
    built, prompt = model("glm-130b"), prompts("glm-130b")[0]
    runs = [generate(built, [prompt], Sampling(max_tokens=10, seed=s))[0].tokens for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"seed": -1},
        {"min_tokens": 300},
        {"temperature": float("nan")},
    ],
    ids=str,
)
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Sampling(**wrong)


# --- blanks --------------------------------------------------------------------------------------


def test_positions_of_a_blank() -> None:
    """Follows the table of GLM (Du et al. 2022, figure 2): B stays at its blank, and row 1
    counts."""
    a = encode("ab[MASK]c", PIECES)
    prompt = blank(part_a(a, PIECES), PIECES, "rope_2d")
    assert prompt.tokens == (10, 11, 1, 12, 4, 6)
    rows = [prompt.position(i) for i in range(8)]
    assert rows == [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (2, 1), (2, 2), (2, 3)]
    assert [prompt.key_end(i) for i in range(8)] == [5, 5, 5, 5, 5, 6, 7, 8]


@pytest.mark.parametrize(("positions", "last"), [("rope", (4, 2)), ("rope_2d", (2, 2))])
def test_positions_after_gmask(positions: str, last: tuple[int, int]) -> None:
    prompt = blank(part_a(PIECES.encode("ab"), PIECES), PIECES, positions)
    assert prompt.tokens == (10, 11, 2, 6)
    assert prompt.position(4) == last


@pytest.mark.parametrize("kind", ["glm", "glm-130b", "chatglm-6b"])
def test_blanks_are_filled_from_left_to_right(kind: str) -> None:
    """Filling two blanks equals filling the first, writing it into the text, and filling the
    second."""
    built = model(kind)
    settings = dataclasses.replace(GREEDY, max_tokens=4)
    both = fill(built, part_a(encode("ab[MASK]cd[sMASK]e", PIECES), PIECES), settings, PIECES)
    a = part_a(encode("ab[MASK]cd[sMASK]e", PIECES), PIECES)
    specials = {1, 2, 3}
    (answer,) = generate(built, [blank(a, PIECES, built.config.positions)], settings)
    first = [t for t in answer.tokens if t not in specials]
    half = [*a[:2], *first, *a[3:]]
    (answer,) = generate(built, [blank(half, PIECES, built.config.positions)], settings)
    at = half.index(PIECES.smask)
    assert both == [*half[:at], *[t for t in answer.tokens if t not in specials], *half[at + 1 :]]
    assert both[:2] == PIECES.encode("ab")
    assert both[-2:] == [*PIECES.encode("e"), PIECES.eos]


def test_text_after_the_blank_matters() -> None:
    """The model reads part A in both directions."""
    built = model("glm-130b")
    answers = [
        generate(built, [blank(part_a(encode(t, PIECES), PIECES), PIECES, "rope")], GREEDY)[
            0
        ].tokens
        for t in ("ab[MASK]cd", "ab[MASK]xy")
    ]
    assert answers[0] != answers[1]


# --- bad input -----------------------------------------------------------------------------------


def test_bad_prompts() -> None:
    built = model("glm-130b")
    for prompt, told in [
        (causal([]), "empty"),
        (causal([1] * LENGTH), f"shorten it to {LENGTH - 1}"),
        (causal([1, V]), f"token {V} is not in the model's vocabulary of {V}"),
        (causal([-1]), "vocabulary"),
    ]:
        with pytest.raises(PromptError, match=told):
            generate(built, [prompt], GREEDY)
        with pytest.raises(PromptError, match=told):
            next(stream(built, prompt, GREEDY))
    with pytest.raises(PromptError, match="has no blank"):
        blank(PIECES.encode("abc"), PIECES, "rope")
    with pytest.raises(PromptError, match="has no blank"):
        fill(built, PIECES.encode("abc"), GREEDY, PIECES)
    with pytest.raises(PromptError, match="needs as many free slots"):
        Decoder(built, 1).add_padded([causal([1])] * 2, [GREEDY] * 2)


@pytest.mark.parametrize("frozen", [False, True])
def test_logits_that_are_not_finite_name_token_and_op(frozen: bool) -> None:
    built = model("glm-130b").requires_grad_(not frozen)
    prompt = prompts("glm-130b")[0]
    with torch.no_grad():
        built.blocks[1].mlp.up.weight[3, 5] = torch.nan
    with pytest.raises(GenerationError, match=r"token 1: .* op linear in blocks.1.mlp.up \(its we"):
        generate(built, [prompt], GREEDY)


def test_a_sequence_that_fails_leaves_the_others_alone() -> None:
    built = model("glm", tied_head=False)
    asked = prompts("glm")[:2]
    alone = generate(built, asked[1:], GREEDY)[0].tokens
    decoder = Decoder(built, 2)
    bad, good = (decoder.add(p, GREEDY) for p in asked)
    spoiled = [t for t in range(V) if t not in {*asked[1].tokens, *alone}]
    with torch.no_grad():
        built.embedding[spoiled] = torch.inf
    bad.tokens[-1] = spoiled[0]
    while any(decoder.live):
        decoder.step()
    assert good.tokens == alone
    assert bad.finish == "error"
    assert "op embedding" in str(bad.error)


# --- long prompts --------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 5, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_in_pieces_give_the_same(kind: str, chunk: int) -> None:
    """Holds alone and padded on the left; no call is longer than a chunk, or than part A."""
    built, asked = model(kind), prompts(kind)
    whole_calls, calls = Runner(built, len(asked)), []
    pieces = Runner(built, len(asked), chunk=chunk)
    pieces.model.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[1]))
    for given in ([p] for p in asked):
        expected = whole_calls.prefill(0, given)
        calls.clear()
        found = pieces.prefill(0, given)
        assert max(calls) <= max(chunk, given[0].sep)
        assert sum(calls) == len(given[0].tokens)
        assert float((found - expected).abs().max() / expected.abs().max()) < 3e-6
    expected, found = whole_calls.prefill(0, asked), pieces.prefill(0, asked)
    assert float((found - expected).abs().max() / expected.abs().max()) < 3e-6


def test_others_go_on_while_a_long_prompt_is_read() -> None:
    """A step reads one chunk, and every sequence that was there before gets a token in it. All
    tokens, and the contents of the cache, are those of sequences alone."""
    built = model("glm-4")
    short, long = causal([1, 2, 3]), causal([1 + i % 50 for i in range(30)])
    alone = [generate(built, [p], GREEDY)[0].tokens for p in (short, long)]
    decoder = Decoder(built, 3, chunk=4)
    gone = decoder.begin(long, GREEDY)
    decoder.step()
    first = decoder.add(short, GREEDY)  # slot 1
    decoder.cancel(gone)
    late = decoder.begin(long, GREEDY)  # slot 0, a row of each step that decodes slot 1
    for step in range(1, 9):
        decoder.step()
        assert (late.read, len(first.tokens)) == (min(4 * step, 30), 1 + step)
    read = Runner(built, 1, chunk=4)
    read.prefill(0, [long])
    held, expected = (
        r.cache.window(0, torch.zeros(1, 1).long())._memory[..., :30, :]
        for r in (decoder.runner, read)
    )
    torch.testing.assert_close(held, expected)
    while any(decoder.live):
        decoder.step()
    assert [first.tokens, late.tokens] == alone
    assert not gone.tokens
    again = decoder.begin(long, GREEDY)
    decoder.clear()
    decoder.step()
    assert (decoder.free, again.read) == (3, 0)
