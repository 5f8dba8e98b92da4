"""A backend's whole decode steps give the bits of its ops, and are not used where ops are watched
or replaced."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from glm_core import dispatch, ops
from glm_core.backends import registry
from glm_core.backends.cpu import isas, select_isa
from glm_core.decode_step import DecodeStep, Rows
from glm_core.model.adapters import AdapterConfig, attach
from glm_core.model.glm import GLM
from glm_core.model.presets import preset
from glm_core.model.prompt import Prompt, causal
from glm_core.model.quantize import Quantization, convert, quantize_head
from glm_core.model.runner import DecodeRow, Runner, idle
from glm_core.model.stack import angles, stack
from glm_core.session import Fallback
from glm_core.spec import Support, unsupported

V, LENGTH = 61, 48
PRESETS = ("glm-base", "glm-130b", "chatglm-6b", "glm-4-9b", "glm-4-0414-9b")
HOW = {
    "plain": None,
    "int4": Quantization(bits=4),
    "int4-group32-a8": Quantization(bits=4, group=32, activation_bits=8),
    "int8-group128-a8": Quantization(bits=8, group=128, activation_bits=8),
}


def built(name: str, dtype: torch.dtype = torch.float32, how: Quantization | None = None) -> GLM:
    """Returns a small model in the shapes of a published one: two layers, grouped heads if it has
    them, and an ffn width that is no multiple of a vector."""
    kv = 2 if preset(name).num_kv_heads != preset(name).num_heads else 4
    small = preset(
        name,
        num_layers=2,
        hidden=128,
        num_heads=4,
        num_kv_heads=kv,
        head_dim=32,
        ffn=384,
        vocab=V,
        max_length=LENGTH,
    )
    model = GLM(small).init_weights(3).to(dtype).requires_grad_(False)
    for p in model.parameters():
        if p.ndim == 1:  # biases of zero and norms of one would hide one left out
            p.add_(torch.linspace(-0.1, 0.1, len(p), dtype=p.dtype))
    for _ in convert(model, how) if how else ():
        pass
    return model


def run(model: GLM, whole: bool, rows: int = 3) -> tuple[list[Tensor], Tensor]:
    """Runs four steps of `rows` sequences of different lengths, one of them idle once. Returns the
    logits, and what the cache holds at the end."""
    prompts = [
        Prompt(tuple(range(7, 12 + b)), sep=4, mask=2) if b % 2 else causal(range(9, 15 + b))
        for b in range(rows)
    ]
    runner, places = Runner(model, rows), [len(p.tokens) for p in prompts]
    for b, prompt in enumerate(prompts):
        runner.prefill(b, [prompt])
    seen: list[str] = []

    def watch(op: dispatch.Op, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        seen.append(op.name)
        return dispatch.run(op, args, kwargs)

    logits = []
    for step in range(4):
        fed = [DecodeRow(20 + step + b, prompts[b], places[b] + step) for b in range(rows)]
        if step == 2:
            fed[0] = idle(places[0] + step)
        with dispatch.intercept(None if whole else watch):
            logits.append(runner.decode(fed))
    assert bool(seen) is not whole
    assert not isinstance(runner._step, Support)
    return logits, runner.cache.memory


def assert_same(model: GLM, rows: int = 3) -> None:
    with registry.use("cpu", strict=True):
        (one, cache), (other, other_cache) = run(model, True, rows), run(model, False, rows)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert torch.equal(cache, other_cache)
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", PRESETS)
def test_bits_are_those_of_the_ops(name: str, dtype: torch.dtype) -> None:
    for how in HOW.values():
        assert_same(built(name, dtype, how))


@pytest.mark.parametrize("rows", [1, 8])
def test_any_number_of_rows_it_takes(rows: int) -> None:
    model = built("glm-4-9b", torch.bfloat16, HOW["int4-group32-a8"])
    quantize_head(model, 4)
    assert_same(model, rows)


def test_every_instruction_set_and_number_of_threads() -> None:
    model = built("glm-130b", how=HOW["int4-group32-a8"])
    threads, best = torch.get_num_threads(), isas()[-1]
    try:
        for isa in isas():
            select_isa(isa)
            results = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert_same(model)
                with registry.use("cpu", strict=True):
                    results.append(run(model, True)[0])
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    finally:
        select_isa(best)
        torch.set_num_threads(threads)


def step_of(model: GLM) -> DecodeStep | Support:
    """Returns the cpu backend's step for the model, or why there is none."""
    parts = stack(model, lambda: angles(model, LENGTH))
    return parts if isinstance(parts, Support) else registry.get("cpu").decode_step(parts)


def adapted(model: GLM) -> None:
    attach(model, AdapterConfig(kind="lora", rank=2))


def prefixed(model: GLM) -> None:
    attach(model, AdapterConfig(kind="ptuning"))


def hooked(model: GLM) -> None:
    model.blocks[1].mlp.register_forward_pre_hook(lambda *_: None)


def replaced(model: GLM) -> None:
    model.blocks[0].attention.core = lambda *args: ops.attention(*args)


def halved(model: GLM) -> None:
    model.half()


def grouped(model: GLM) -> None:
    for _ in convert(model, Quantization(bits=8, group=64)):
        pass


REFUSED = {
    adapted: "blocks.0.attention.qkv is a LoRA, not a Linear",
    prefixed: "the model has a prefix (P-Tuning)",
    hooked: "blocks.1.mlp has a hook",
    replaced: "blocks.0.attention.core is not the op attention",
    halved: "kernels take float32 and bfloat16, received torch.float16",
    grouped: "kernels take groups of 32 or a multiple of 128, received 64",
}


@pytest.mark.parametrize("change", REFUSED)
def test_not_for_what_only_the_ops_can_do(change: Callable[[GLM], None]) -> None:
    model = built("glm-4-9b")
    assert not isinstance(step_of(model), Support)
    change(model)
    refusal = step_of(model)
    assert isinstance(refusal, Support)
    assert REFUSED[change] in refusal.reason


@pytest.mark.parametrize("change", REFUSED)
def test_a_refusal_reaches_the_session_with_its_reason(change: Callable[[GLM], None]) -> None:
    model, prompt = built("glm-4-9b"), causal(range(6))
    change(model)
    runner = Runner(model, 1)
    with registry.use("cpu") as session:
        runner.prefill(0, [prompt])
        assert "decode_step" not in {f.op for f in session.fallbacks}
        for place in (6, 7):
            runner.decode([DecodeRow(7, prompt, place)])
    counts = {f.reason: n for f, n in session.fallbacks.items() if f.op == "decode_step"}
    assert counts == {step_of(model).reason: 2}


def test_other_backends_call_their_ops() -> None:
    model, prompt = built("glm-4-9b"), causal(range(6))
    parts = stack(model, lambda: angles(model, LENGTH))
    assert not isinstance(parts, Support)
    refusal = registry.get("onnxrt").decode_step(parts)
    assert refusal == unsupported("the backend takes no whole decode steps")
    assert isinstance(dispatch.session().backend.decode_step(parts), Support)  # outside of any use
    with registry.use("reference") as session:
        runner = Runner(model, 1)
        runner.prefill(0, [prompt])
        runner.decode([DecodeRow(7, prompt, 6)])
    assert not session.fallbacks  # it has references only


def test_more_rows_go_op_by_op() -> None:
    model = built("glm-4-9b")
    runner, prompt = Runner(model, 9), causal(range(5))
    with registry.use("cpu", strict=True) as session:
        for slot in range(9):
            runner.prefill(slot, [prompt])
        logits = runner.decode([DecodeRow(7, prompt, 5)] * 9)
        reason = "9 rows; one call takes 8 at most"
        assert session.fallbacks == {Fallback("cpu", "decode_step", reason): 1}
        assert runner.decode([DecodeRow(7, prompt, 5)]).sub(logits[:1]).abs().max() < 1e-4


def test_a_model_that_changed_between_prompts_is_looked_at_again() -> None:
    model, prompt = built("glm-4-9b"), causal(range(6))
    runner = Runner(model, 1)
    with registry.use("cpu", strict=True):
        runner.prefill(0, [prompt])
        before = runner.decode([DecodeRow(7, prompt, 6)])
        for _ in convert(model, Quantization(bits=4)):
            pass
        runner.prefill(0, [prompt])
        after = runner.decode([DecodeRow(7, prompt, 6)])
        fresh = Runner(model, 1)
        fresh.prefill(0, [prompt])
        assert torch.equal(fresh.decode([DecodeRow(7, prompt, 6)]), after)
    assert not torch.equal(before, after)


@pytest.mark.parametrize(
    ("wrong", "fact"),
    [
        ({"tokens": [V]}, "token 61 of row 0"),
        ({"tokens": [-1]}, "token -1 of row 0"),
        ({"positions": [LENGTH, 0]}, "position 48 of row 0"),
        ({"places": [LENGTH]}, "place 48 of row 0"),
        ({"key_start": [-1]}, "key_start -1 of row 0"),
        ({"key_end": [LENGTH + 1]}, "key_end 49 of row 0"),
    ],
)
def test_what_lies_outside_is_an_error(wrong: dict[str, list[int]], fact: str) -> None:
    runner = Runner(built("glm-4-9b"), 1)
    step, rows = step_of(runner.model), Rows([7], [3, 0], [0], [4], [3])
    assert callable(step)
    kept = runner.cache.memory.clone()
    with pytest.raises(IndexError, match=fact):
        step(rows._replace(**wrong), runner.cache.memory)
    assert torch.equal(kept, runner.cache.memory)
    for bad in (rows._replace(places=[3, 4]), rows._replace(positions=[3])):
        with pytest.raises(ValueError, match="need as many places"):
            step(bad, runner.cache.memory)
    with pytest.raises(ValueError, match="do not fit a cache"):
        step(rows, runner.cache.memory.double())


def test_numbers_that_are_not_finite_are_traced_to_their_op() -> None:
    model, prompt = built("glm-4-9b"), causal(range(6))
    runner = Runner(model, 1)
    with registry.use("cpu", strict=True):
        runner.prefill(0, [prompt])
        model.blocks[1].mlp.down.weight[3, 5] = float("nan")
        assert not runner.decode([DecodeRow(7, prompt, 6)]).isfinite().all()
        assert "op linear in blocks.1.mlp.down" in str(runner.explain(runner.last, 1))
