"""The trainer's arithmetic, its errors, and the main loop around it."""

from __future__ import annotations

import dataclasses
import errno
import functools
import itertools
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from torch import Tensor

from glm_core import config, ops
from glm_core.backends import registry
from glm_core.backends.base import Backend
from glm_core.config import TrainConfig
from glm_core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    TrainingError,
    UnsupportedOpError,
)
from glm_core.session import Fallback
from glm_core.spec import unsupported
from glm_core.training import checkpoint
from glm_core.training.batches import global_batch
from glm_core.training.metrics import Metrics
from glm_core.training.optimizer import Optimizer
from glm_core.training.run import run
from glm_core.training.trainer import Trainer

# --- batches -------------------------------------------------------------------------------------


def gradients(dtype: str, split: int, oracle: bool = False) -> dict[str, Tensor]:
    """Of 64 sequences in `split` micro-batches, from weights rounded to `dtype`; the oracle
    computes in float64."""
    trainer = Trainer(toy.config(dtype=dtype, loss_scale=1024.0), toy.Sampler())
    if oracle:
        trainer.model.double()
    trainer.backward([trainer.sampler.next(64 // split) for _ in range(split)])
    scale = trainer.loss_scale.scale
    return {
        n: p.grad.double() / scale
        for n, p in trainer.model.named_parameters()
        if p.grad is not None
    }


def error(values: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float((values[n] - t).square().sum()) for n, t in truth.items()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_accumulated_gradients_are_the_big_batchs(dtype: str) -> None:
    truth = gradients(dtype, 1, oracle=True)
    big = error(gradients(dtype, 1), truth)
    for split in (4, 32):
        assert error(gradients(dtype, split), truth) <= 2 * big
    # what it must not be: every micro-batch's own mean, averaged
    trainer = Trainer(toy.config(dtype=dtype), toy.Sampler())
    means = {n: torch.zeros_like(t) for n, t in truth.items()}
    for _ in range(4):
        trainer.model.zero_grad()
        trainer.backward([trainer.sampler.next(16)])
        for n, p in trainer.model.named_parameters():
            assert p.grad is not None
            means[n] += p.grad.double() / trainer.loss_scale.scale / 4
    assert error(means, truth) > 2 * big


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_many_small_gradients_are_summed_in_float32(dtype: str) -> None:
    """In the working dtype 64 micro-batches would be 1.6 times as far off as one batch."""
    truth = gradients(dtype, 1, oracle=True)
    assert error(gradients(dtype, 64), truth) < error(gradients(dtype, 1), truth)


def test_loss_is_the_mean_over_targets_for_every_split() -> None:
    trainer = Trainer(toy.config(), toy.Sampler())
    batch = trainer.sampler.next(8)
    logits = trainer.model.logits(batch.tokens, batch.positions, batch.key_start, batch.key_end)
    each = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels.flatten(), reduction="none"
    )
    expected = float((each * batch.loss_weight.flatten()).sum().detach() / batch.loss_weight.sum())
    for split in (1, 2, 4):
        trainer.sampler.restore({"index": 0})
        loss = float(trainer.backward([trainer.sampler.next(8 // split) for _ in range(split)]))
        assert loss == pytest.approx(expected, rel=1e-6)


def test_batch_ramp_is_glm_130bs() -> None:
    """192, rising by 24 over 5 493 164 samples to 4224: 168 steps of 32 697.4 samples each."""
    c = TrainConfig(
        micro_batch=24, global_batch=4224, ramp_from=192, ramp_increment=24, ramp_samples=5_493_164
    )
    assert global_batch(c, 0) == global_batch(c, 32_697) == 192
    assert global_batch(c, 32_698) == 216
    assert global_batch(c, 5_493_163) == 4200
    assert global_batch(c, 5_493_164) == global_batch(c, 10**9) == 4224
    seen, sizes = 0, [192]
    while sizes[-1] < 4224:
        seen += sizes[-1]
        sizes.append(global_batch(c, seen))
    assert {b - a for a, b in itertools.pairwise(sizes)} == {0, 24}
    assert set(sizes) == set(range(192, 4225, 24))


def test_ramp_counts_the_samples_that_were_seen() -> None:
    trainer = Trainer(toy.config(), toy.Sampler())
    results = [trainer.step() for _ in range(8)]
    assert [r.global_batch for r in results] == [2, 2, 2, 2, 4, 4, 6, 6]
    assert [r.tokens for r in results] == [r.global_batch * toy.L for r in results]
    assert trainer.samples_seen == trainer.sampler.state()["index"] == 28


def test_training_learns() -> None:
    trainer = Trainer(toy.config(steps=60, lr=1e-2), toy.Sampler())
    losses = [trainer.step().loss for _ in range(60)]
    assert losses[0] == pytest.approx(math.log(toy.V), abs=0.1)
    assert losses[-1] < 0.6 * losses[0]


# --- not finite ----------------------------------------------------------------------------------


class Infinite(torch.autograd.Function):
    """The identity, whose gradient is not."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * math.inf


broken = Backend(name="broken", device_type="cpu", verified="never", references_only=True)


@broken.implements(ops.geglu)
def geglu(x: Tensor) -> Tensor:
    y: Tensor = Infinite.apply(ops.geglu.reference(x))  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return y


def spoil(trainer: Trainer, what: str) -> None:
    weight = trainer.model.blocks[1].mlp.up.weight
    with torch.no_grad():
        if what == "weight":
            weight[3, 2] = math.inf
        if what == "overflow":
            weight.fill_(3e38)
    if what == "norm":
        loss = trainer.model.loss
        trainer.parallel.loss = trainer.model.loss = lambda *a: loss(*a) * 1e25  # type: ignore[method-assign]  # planted


FIRST, PARAMETER = "first not finite: op", "first parameter with such a gradient:"
PLACES = {
    "weight": f"the loss is nan; {FIRST} linear in blocks.1.mlp.up, forward, micro-batch 1 (its "
    f"weight is not finite either); {PARAMETER} final_norm.",
    "overflow": f"the loss is nan; {FIRST} linear in blocks.1.mlp.up, forward, micro-batch 1; "
    f"{PARAMETER} final_norm.",
    "backward": f"the gradient norm is nan; {FIRST} geglu in blocks.1.mlp, backward (gradient of "
    f"x), micro-batch 1; {PARAMETER} blocks.1.mlp.up.",
    "norm": f"the gradient norm is inf; {FIRST} global_norm; {PARAMETER} none; resume from the "
    "last checkpoint with a lower train.lr",
}


@pytest.mark.parametrize("what", PLACES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_not_finite_is_located_and_nothing_is_updated(dtype: str, what: str) -> None:
    trainer = Trainer(toy.config(dtype=dtype), toy.Sampler())
    trainer.step()
    spoil(trainer, what)
    before = {k: v.clone() for k, v in trainer.state()[0].items()}
    backend = broken if what == "backward" else "reference"
    with registry.use(backend), pytest.raises(TrainingError) as error:
        trainer.step()
    assert str(error.value).startswith(f"step 2: {PLACES[what]}")
    assert all(torch.equal(v, before[k]) for k, v in trainer.state()[0].items())


def test_not_finite_in_a_later_micro_batch() -> None:
    trainer = Trainer(toy.config(model={"tied_head": False}), toy.Sampler())
    batches = [trainer.sampler.next(2) for _ in range(3)]
    only_third = batches[2].tokens[0, 0]
    assert not any((b.tokens == only_third).any() for b in batches[:2])
    with torch.no_grad():
        trainer.model.embedding[only_third] = math.nan
    trainer.batches = lambda: batches  # type: ignore[method-assign,assignment]  # planted
    with pytest.raises(
        TrainingError, match=r"op embedding in the model, forward, micro-batch 3 \(its w"
    ):
        trainer.step()


def test_float16_skips_above_the_minimum_scale_and_stops_at_it() -> None:
    trainer = Trainer(toy.config(dtype="float16", loss_scale=4.0), toy.Sampler())
    with torch.no_grad():
        trainer.optimizer.named["embedding"].fill_(math.nan)
    results = [trainer.step() for _ in range(3)]
    assert [r.loss_scale for r in results] == [4.0, 4.0, 2.0]
    assert all(r.skipped and math.isnan(r.grad_norm) for r in results)
    with pytest.raises(
        TrainingError, match="step 4: the loss is nan; first not finite: op embedding"
    ):
        trainer.step()


class Nan(toy.Sampler):
    """Weights of the tenth sequence are not a number."""

    def next(self, micro_batch: int) -> Any:
        batch = super().next(micro_batch)
        if self.index > 10:
            batch.loss_weight[0, -1] = math.nan
        return batch


def test_a_run_that_stops_keeps_its_last_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="step 5: the loss is nan"):
        run(toy.config(), tmp_path, sampler=Nan())
    assert checkpoint.load(tmp_path)[1]["step"] == 3
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4]
    result = run(toy.config(), tmp_path, sampler=toy.Sampler(), resume=True)
    assert (result.steps, len(metrics(tmp_path))) == (12, 12)


# --- the main loop -------------------------------------------------------------------------------


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_run_writes_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new/run"
    result = run(toy.config(save_every=5), out, sampler=toy.Sampler())
    assert config.load(out / "config.toml") == toy.config(save_every=5)
    assert [m["step"] for m in metrics(out)] == list(range(1, 13))
    assert all(m["step_ms"] > 0 for m in metrics(out))
    names = ["latest", "step-00000010.safetensors", "step-00000012.safetensors"]
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == names
    assert (result.steps, result.interrupted, result.fallbacks) == (12, False, {})
    assert result.loss == metrics(out)[-1]["loss"]
    assert result.checkpoint == out / "checkpoints" / names[2]
    seconds = sum(m["step_ms"] for m in metrics(out)[1:]) / 1e3
    tokens = sum(m["tokens"] for m in metrics(out)[1:])
    assert result.tokens_per_s == pytest.approx(tokens / seconds, rel=1e-3)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines()[-1].startswith("12/12  loss ")


def test_a_run_is_never_written_over(tmp_path: Path) -> None:
    run(toy.config(steps=2), tmp_path, sampler=toy.Sampler())
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(
        ConfigError, match="holds a run already; resume it or choose another folder"
    ):
        run(toy.config(), tmp_path, sampler=toy.Sampler())
    result = run(toy.config(steps=2), tmp_path, sampler=toy.Sampler(), resume=True)
    assert (result.loss, result.steps, result.interrupted) == (None, 2, False)
    assert result.checkpoint.is_file()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_resume_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        run(toy.config(), tmp_path, sampler=toy.Sampler(), resume=True)
    assert list(tmp_path.iterdir()) == []


def signalling(at: int, number: int, times: int = 1) -> toy.Sampler:
    class Signalling(toy.Sampler):
        def next(self, micro_batch: int) -> Any:
            if self.index == at:
                for _ in range(times):
                    signal.raise_signal(number)
            return super().next(micro_batch)

    return Signalling()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_finishes_the_step_saves_and_returns(tmp_path: Path, number: int) -> None:
    whole = run(toy.config(), tmp_path / "whole", sampler=toy.Sampler())
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    result = run(toy.config(), tmp_path / "run", sampler=signalling(6, number))
    assert (result.steps, result.interrupted) == (4, True)
    assert checkpoint.load(tmp_path / "run")[1]["step"] == 4
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    result = run(toy.config(), tmp_path / "run", sampler=toy.Sampler(), resume=True)
    assert (result.steps, result.interrupted, result.loss) == (12, False, whole.loss)


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    # a suite started in the background inherits an ignored SIGINT
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(toy.config(), tmp_path, sampler=signalling(8, signal.SIGINT, times=2))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert checkpoint.load(tmp_path)[1]["step"] == 3
    assert [m["step"] for m in metrics(tmp_path)] == [1, 2, 3, 4]


def test_a_full_disk_while_writing_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Metrics, values: dict[str, Any]) -> None:
        if values["step"] == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, values)

    write = Metrics.write
    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "write", full)
        with pytest.raises(
            TrainingError, match=r"No space left on device; make it writable or make"
        ):
            run(toy.config(), tmp_path, sampler=toy.Sampler())
    assert run(toy.config(), tmp_path, sampler=toy.Sampler(), resume=True).steps == 12
    assert [m["step"] for m in metrics(tmp_path)] == list(range(1, 13))


# --- backends ------------------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs compiled, each once through AOT autograd. Inductor's C++ would take minutes and
    compiles the same graphs."""
    seen: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        seen.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count))
    return seen


@pytest.fixture
def partial(monkeypatch: pytest.MonkeyPatch) -> Backend:
    """A backend with one kernel, which refuses."""
    backend = Backend(name="partial", device_type="cpu", verified="never")
    refuse = lambda x: unsupported("odd widths only")  # noqa: E731
    backend.implements(ops.geglu, supports=refuse)(ops.geglu.reference)
    get = registry.get
    monkeypatch.setattr(registry, "get", lambda name: backend if name == "partial" else get(name))
    return backend


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_fallbacks_reach_the_result_with_their_reasons(
    tmp_path: Path, partial: Backend, graphs: list[Any], compiled: bool
) -> None:
    c = toy.config(backend="partial", steps=2, compile=compiled)
    fallbacks = run(c, tmp_path, sampler=toy.Sampler()).fallbacks
    assert len(graphs) == compiled
    assert fallbacks[Fallback("partial", "geglu", "odd widths only")] == (2 if compiled else 4)
    assert fallbacks[Fallback("partial", "adamw", "no kernel for this op")] == 4
    assert {f.op for f in fallbacks} == {
        "adamw",
        "add_layer_norm",
        "attention",
        "embedding",
        "geglu",
        "global_norm",
        "layer_norm",
        "linear",
        "linear_cross_entropy",
        "rope",
    }


def test_strict_refuses(tmp_path: Path, partial: Backend) -> None:
    c = toy.config(backend="partial", strict=True)
    with pytest.raises(UnsupportedOpError, match=r"on backend partial: .*; drop strict"):
        run(c, tmp_path, sampler=toy.Sampler())


def test_a_dtype_the_backend_lacks(partial: Backend) -> None:
    partial.dtypes = (torch.float32, torch.float16)
    c = toy.config(backend="partial", dtype="bfloat16")
    with pytest.raises(
        ConfigError, match="=bfloat16: backend partial computes in float32, float16;"
    ):
        Trainer(c, toy.Sampler())


def test_a_run_on_real_text_goes_on_with_the_same_batches(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    words = [f"word{(i * i) % 97} of {i % 13}" for i in range(4000)]
    text.write_text(". ".join(words))
    vocab = 300
    sizes = {"vocab": vocab, "max_length": 32}
    base = toy.config(model=sizes, steps=6, save_every=2, ramp_from=0)
    data = dataclasses.replace(base.data, path=str(text), vocab=vocab, length=32)
    c, cache = dataclasses.replace(base, data=data), tmp_path / "cache"
    run(c, tmp_path / "whole", cache_dir=cache)
    first = tmp_path / "whole/checkpoints/step-00000004.safetensors"
    run(c, tmp_path / "resumed", cache_dir=cache, resume=first)
    states = [checkpoint.load(tmp_path / name) for name in ("whole", "resumed")]
    assert states[0][1] == states[1][1]
    assert all(torch.equal(t, states[1][0][k]) for k, t in states[0][0].items())
    text.write_text("another text. " * 4000)
    with pytest.raises(DataError, match="sampler state: saved with corpus="):
        run(c, tmp_path / "other", cache_dir=cache, resume=first)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_compiled_is_eager_to_rounding(backend: str, graphs: list[Any]) -> None:
    """Distance from float64, over four steps, at most twice that of eager; one graph for all."""
    if backend not in registry.names() or not (probe := registry.probe(backend)).ok:
        pytest.skip(
            f"backend {backend}: {probe.reason if backend in registry.names() else 'absent'}"
        )

    def trained(**changes: Any) -> dict[str, Tensor]:
        oracle = not changes
        c = toy.config(warmup_steps=0, weight_decay=0.0, eps=1e-3, **changes)
        trainer = Trainer(c, toy.Sampler())
        if oracle:
            trainer.model.double()
            trainer.optimizer = Optimizer(trainer.model, c.train)
        with registry.use(trainer.backend):
            for _ in range(4):
                trainer.step()
        return {n: p.detach().double() for n, p in trainer.model.named_parameters()}

    truth = trained()
    eager = error(trained(backend=backend), truth)
    assert error(trained(backend=backend, compile=True), truth) <= 2 * eager
    assert len(graphs) == 1
