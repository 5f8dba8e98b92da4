"""A backend's whole decode steps give the bits of its ops, and are not used where ops are watched
or replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from glm_core import dispatch, ops
from glm_core.backends import registry
from glm_core.backends.base import Backend
from glm_core.backends.cpu import isas, select_isa
from glm_core.cli import main
from glm_core.conformance import decode
from glm_core.conformance.decode import (
    LENGTH,
    PRESETS,
    STEPS,
    WEIGHTS,
    V,
    built,
    decoded,
    difference,
    prompts,
    whole_step,
)
from glm_core.decode_step import DecodeStep, Rows, Stack
from glm_core.model.adapters import AdapterConfig, attach
from glm_core.model.glm import GLM
from glm_core.model.prompt import causal
from glm_core.model.quantize import Quantization, convert, quantize_head
from glm_core.model.runner import DecodeRow, Runner
from glm_core.model.stack import angles, stack
from glm_core.session import Fallback
from glm_core.spec import Support, unsupported


def assert_same(model: GLM, rows: int = 3) -> None:
    with registry.use("cpu", strict=True):
        assert difference(model, rows) == ""
        logits, _ = decoded(model, prompts(rows), STEPS, whole=True)
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in logits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", PRESETS)
def test_bits_are_those_of_the_ops(name: str, dtype: str) -> None:
    cpu, case = registry.get("cpu"), f"decode_step-{dtype}-{name}"
    found = {w: decode.run(cpu, id=f"{case}-{w}").results[0] for w in WEIGHTS}
    if name == "glm-4.7-flash":  # torch's einsum multiplies there, with bits of its own
        refused = "blocks.0.attention.kv_b is a HeadsLinear, not a QuantizedHeads"
        assert found.pop("plain").reason == refused
    assert {r.outcome for r in found.values()} == {"pass"}


@pytest.mark.parametrize("rows", [1, 8])
def test_any_number_of_rows_it_takes(rows: int) -> None:
    model = built("glm-4-9b", torch.bfloat16, WEIGHTS["int4-group32-a8"])
    quantize_head(model, 4)
    assert_same(model, rows)


@pytest.mark.parametrize("name", ["glm-130b", "glm-4.7-flash"])
def test_every_instruction_set_and_number_of_threads(name: str) -> None:
    model = built(name, how=WEIGHTS["int4-group32-a8"])
    threads, best = torch.get_num_threads(), isas()[-1]
    try:
        for isa in isas():
            select_isa(isa)
            results = []
            for count in (1, 3):
                torch.set_num_threads(count)
                assert_same(model)
                with registry.use("cpu", strict=True):
                    results.append(decoded(model, prompts(3), STEPS, whole=True)[0])
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    finally:
        select_isa(best)
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["glm-4.7", "glm-4.7-flash"])
def test_layers_of_multi_token_prediction_are_left_alone(name: str) -> None:
    """They stand behind the layers of the model and of the cache."""
    model = built(name, how=WEIGHTS["int4"], num_mtp_layers=1)
    logits = []
    for whole in (True, False):
        runner, prompt = Runner(model, 1, speculate=1), causal(range(6))
        with registry.use("cpu", strict=True), dispatch.intercept(None if whole else called):
            runner.prefill(0, [prompt])
            logits.append(runner.decode([DecodeRow(7, prompt, 6)]))
        assert not runner.cache.memory[-1].any()
    assert torch.equal(*logits)


def called(op: dispatch.Op, args: Any, kwargs: Any) -> object:
    """Lets an op run; a step is not taken whole where somebody watches."""
    return dispatch.run(op, args, kwargs)


@pytest.mark.parametrize("change", [{"expert_groups": 4, "top_groups": 2}, {"q_latent": 0}])
def test_the_switches_of_routers_and_latents(change: dict[str, Any]) -> None:
    name = "glm-4.7-flash" if "q_latent" in change else "glm-4.7"
    assert_same(built(name, torch.bfloat16, WEIGHTS["int8-group128-a8"], **change), 2)


def step_of(model: GLM) -> Any:
    """Returns the cpu backend's step for the model, or why there is none."""
    return whole_step(model, registry.get("cpu"))


class PaddedPositions:
    """A decode step that takes the padded place for the rotary position (ComfyUI issue 15698)."""

    def __init__(self, right: DecodeStep) -> None:
        self.right, self.max_rows = right, right.max_rows

    def __call__(self, rows: Rows, cache: Tensor) -> Tensor:
        positions = list(rows.positions)
        positions[::2] = rows.places
        return self.right(rows._replace(positions=positions), cache)


class Wrong(Backend):
    """The cpu backend, whose decode step goes through `change`."""

    change: Callable[[DecodeStep], Any] = PaddedPositions

    def synchronize(self) -> None: ...

    def decode_step(self, stack: Stack) -> Any:
        right = registry.get("cpu").decode_step(stack)
        return right if isinstance(right, Support) else self.change(right)


def crash(right: DecodeStep) -> Any:
    raise OSError("no such kernel")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (PaddedPositions, "step 1, row 0: the logits are not those of the ops, off by "),
        (crash, "OSError: no such kernel"),
        (lambda right: unsupported("no room"), "no room"),
    ],
)
def test_the_command_finds_a_wrong_decode_step(
    change: Any, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cpu = registry.get("cpu")
    wrong = Wrong(name="wrong", device_type="cpu", verified="nowhere", dtypes=cpu.dtypes)
    wrong.kernels.update(cpu.kernels)
    monkeypatch.setattr(Wrong, "change", staticmethod(change))
    monkeypatch.setattr(registry, "usable", lambda name: wrong)
    refused = reason == "no room"
    command = ["conformance", "--backend", "wrong", "--decode", "--id", "*-float32-glm-4-9b-plain"]
    assert main(command) == (0 if refused else 1)
    out = capsys.readouterr().out
    assert reason in out
    rerun = "glm-core conformance --backend wrong --decode --id decode_step-float32-glm-4-9b-plain"
    assert (rerun in out) is not refused


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
