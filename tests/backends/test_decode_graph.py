"""Tests decode steps that are recorded once and replayed, on a simulated GPU: the CPU's kernels,
and a tape in place of torch.cuda's graphs. The tape replays the recorded operators with the same
tensors, so whatever a step took from Python or from a tensor's value stays as it was. No GPU ran
any of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tapes import Tapes
from torch import Tensor

from glm_core import dispatch
from glm_core.backends import registry
from glm_core.backends.cuda.decode_graph import GraphDecodeStep
from glm_core.backends.cuda.device import GpuBackend
from glm_core.backends.registry import get, probe, use
from glm_core.conformance import decode
from glm_core.decode_step import Rows
from glm_core.model.generate import generate
from glm_core.model.glm import GLM
from glm_core.model.presets import preset
from glm_core.model.prompt import Prompt, causal
from glm_core.model.quantize import Quantization, convert
from glm_core.model.runner import DecodeRow, Runner, idle
from glm_core.model.sample import Sampling
from glm_core.spec import unsupported

pytestmark = pytest.mark.skipif(not probe("cpu").ok, reason=probe("cpu").reason)
V, LENGTH = 61, 40


class SimulatedGpu(GpuBackend):
    """The GPU backends' decode steps with the CPU's kernels."""

    def graphs(self, device: torch.device) -> Tapes:
        return tapes_of[self.name]


tapes_of: dict[str, Tapes] = {}


@pytest.fixture
def gpu() -> SimulatedGpu:
    tapes_of["simulated"] = Tapes()
    return SimulatedGpu(
        name="simulated",
        device_type="cpu",
        verified="executed on the CPU",
        kernels=dict(get("cpu").kernels),
    )


def built(name: str, how: Quantization | None = None) -> GLM:
    """Returns a small model in the shapes of a published one."""
    kv = 2 if preset(name).num_kv_heads != preset(name).num_heads else 4
    sizes = {"num_layers": 2, "hidden": 64, "num_heads": 4, "head_dim": 16, "ffn": 96}
    small = preset(name, **sizes, num_kv_heads=kv, vocab=V, max_length=LENGTH)
    model = GLM(small).init_weights(3).requires_grad_(False)
    for _ in convert(model, how) if how else ():
        pass
    return model


def decoded(model: GLM, watch: bool) -> tuple[list[Tensor], Tensor]:
    """Returns the logits of four steps of three sequences of different lengths, one of them idle
    once, and the cache. watch: the ops are called one by one."""
    prompts = [causal(range(5)), Prompt(tuple(range(9)), sep=6, mask=2), causal(range(20, 27))]
    runner, logits = Runner(model, 3), []
    for b, prompt in enumerate(prompts):
        runner.prefill(b, [prompt])
    for step in range(4):
        fed = [DecodeRow(30 + step + b, p, len(p.tokens) + step) for b, p in enumerate(prompts)]
        if step == 2:
            fed[0] = idle(len(prompts[0].tokens) + step)
        run = dispatch.run if watch else None
        with dispatch.intercept(run):
            logits.append(runner.decode(fed))
    return logits, runner.cache.memory


@pytest.mark.parametrize("name", ["glm-base", "chatglm-6b", "glm-4-9b", "glm-4-0414-9b"])
def test_replayed_steps_have_the_bits_of_the_ops(name: str, gpu: SimulatedGpu) -> None:
    model = built(name, Quantization(bits=4, group=32) if name == "glm-4-9b" else None)
    with use(gpu, strict=True) as session:
        (one, cache), (other, other_cache) = decoded(model, False), decoded(model, True)
    assert (tapes_of["simulated"].recorded, tapes_of["simulated"].replayed) == (1, 3)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert torch.equal(cache, other_cache)
    assert not session.fallbacks


def without_a_cache(model: GLM, prompt: Prompt, count: int) -> list[int]:
    """Returns the greedy continuation by whole forward passes over all tokens so far."""
    tokens = list(prompt.tokens)
    for _ in range(count):
        n = len(tokens)
        whole = Prompt(tuple(tokens), sep=prompt.sep, mask=prompt.mask)
        positions = torch.tensor([prompt.position(i) for i in range(n)]).t()[None]
        end = torch.tensor([[min(whole.key_end(i), n) for i in range(n)]]).int()
        logits = model.logits(torch.tensor([tokens]), positions, torch.zeros_like(end), end)
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt.tokens) :]


@pytest.mark.parametrize("padded", [False, True], ids=["slots", "padded"])
def test_tokens_are_those_of_whole_passes(padded: bool, gpu: SimulatedGpu) -> None:
    model = built("glm-4-9b")
    prompts = [causal([(7 * n + i) % V for i in range(3 + 4 * n)]) for n in range(5)]
    with use(gpu, strict=True) as session:
        done = generate(
            model, prompts, Sampling(max_tokens=9, temperature=0), slots=3, padded=padded
        )
    tapes = tapes_of["simulated"]
    assert tapes.recorded <= (1 if padded else 3)
    assert tapes.replayed >= 7
    assert not session.fallbacks
    with use("reference"), torch.no_grad():
        for g, prompt in zip(done, prompts, strict=True):
            assert g.tokens == without_a_cache(model, prompt, 9)


def test_records_again_only_for_other_rows_caches_and_models(gpu: SimulatedGpu) -> None:
    model, prompt, tapes = built("glm-4-9b"), causal(range(6)), tapes_of["simulated"]
    runner = Runner(model, 2)
    with use(gpu, strict=True):

        def step(place: int, rows: int = 1) -> None:
            runner.prefill(0, [prompt])
            assert runner.decode([DecodeRow(7, prompt, place)] * rows).isfinite().all()

        for place in (6, 7, 8):
            step(place)
        assert tapes.recorded == 1
        step(6, rows=2)
        step(6, rows=1)
        step(7, rows=2)
        assert tapes.recorded == 2
        runner.cache.memory = torch.zeros_like(runner.cache.memory)
        step(6)
        assert tapes.recorded == 3
        for _ in convert(model, Quantization(bits=8)):
            pass
        step(6)
        assert tapes.recorded == 4


def test_what_cannot_be_recorded_goes_on_op_by_op_and_says_why(
    gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt = built("glm-4-9b"), causal(range(6))
    del gpu.kernels["swiglu"]
    for kernels, reason in (
        (gpu.kernels, "an op fell back to its reference; only kernels are recorded"),
        (get("cpu").kernels, "the step could not be recorded: out of graphs"),
    ):
        gpu.kernels = dict(kernels)
        runner = Runner(model, 1)
        with use(gpu) as session:
            runner.prefill(0, [prompt])
            for place in (6, 7):
                assert runner.decode([DecodeRow(7, prompt, place)]).isfinite().all()
        counts = {f.reason: n for f, n in session.fallbacks.items() if f.op == "decode_step"}
        assert counts == {reason: 2}

        def refuse(work: Callable[[], Tensor]) -> None:
            raise RuntimeError("out of graphs\nsee the manual")

        monkeypatch.setattr(tapes_of["simulated"], "record", refuse)


@pytest.mark.parametrize("name", ["glm-4.7", "glm-4.7-flash"])
def test_experts_and_latents_are_not_recorded(name: str, gpu: SimulatedGpu) -> None:
    step = decode.whole_step(decode.built(name, how=Quantization(bits=4)), gpu)
    reason = "layer 0 has experts, latent attention or norms of the heads, which are not recorded"
    assert step == unsupported(reason)


def test_a_step_that_reads_a_value_is_not_recorded() -> None:
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match="waits for the device"):
        Tapes().record(lambda: x * float(x.sum()))


@pytest.mark.parametrize(
    ("wrong", "fact"),
    [
        ({"tokens": [V]}, "token 61 of row 0"),
        ({"positions": [LENGTH, 0]}, "position 40 of row 0"),
        ({"places": [-1]}, "place -1 of row 0"),
        ({"key_end": [LENGTH + 1]}, "key_end 41 of row 0"),
    ],
)
def test_what_lies_outside_is_an_error(
    wrong: dict[str, list[int]], fact: str, gpu: SimulatedGpu
) -> None:
    runner = Runner(built("glm-4-9b"), 1)
    with use(gpu):
        runner.prefill(0, [causal(range(3))])
        runner.decode([DecodeRow(7, causal(range(3)), 3)])
    step, rows = runner._step, Rows([7], [3, 0], [0], [4], [3])
    assert isinstance(step, GraphDecodeStep)
    with pytest.raises(IndexError, match=fact):
        step(rows._replace(**wrong), runner.cache.memory)
    with pytest.raises(IndexError, match="2 rows: the cache has 1 slots"):
        step(Rows([7] * 2, [3, 0] * 2, [0] * 2, [4] * 2, [3] * 2), runner.cache.memory)


def test_both_gpu_backends_take_whole_steps() -> None:
    for name in ("cuda", "rocm"):
        assert type(registry.get(name)).decode_step is GpuBackend.decode_step
