"""Measures a step of the real trainer: tokens/s, MFU and HFU, memory, and where the time goes."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from glm_core.backends import registry
from glm_core.backends.base import Backend, Peak
from glm_core.bench import breakdown
from glm_core.config import RunConfig, TrainConfig
from glm_core.data.open import open_sampler
from glm_core.data.sampler import Batch as SampledBatch
from glm_core.dispatch import Op, intercept, run
from glm_core.measure import ceilings
from glm_core.measure.memory import resident_peak_bytes
from glm_core.measure.noise import NoiseWatch, irregularities
from glm_core.measure.rows import Row
from glm_core.measure.timing import gemm, gemm_flops, interleave
from glm_core.planner.cost import Work, model_flops
from glm_core.training.batches import Batch
from glm_core.training.parallel import SingleProcess
from glm_core.training.trainer import Trainer

MFU = (
    "MFU = sequences x 3 (l (2 s W + 4 s^2 H E) + 2 s h V) / (seconds x peak): every pair of "
    "tokens counted, nothing else (Chowdhery et al. 2022, appendix B; Korthikanti et al. 2022, "
    "eq. 7)"
)
HFU = (
    "HFU = FLOPs of every op called, from its cost function, visible pairs only / (seconds x peak)"
)


class RandomText:
    """Draws causal sequences of random tokens, new ones for every micro-batch."""

    def __init__(self, vocab: int, length: int) -> None:
        self.vocab, self.length = vocab, length
        self.generator = torch.Generator().manual_seed(0)

    def next(self, micro_batch: int) -> SampledBatch:
        with breakdown.loading():
            ids = torch.randint(
                self.vocab, (micro_batch, self.length + 1), generator=self.generator
            )
            place = torch.arange(self.length).expand(micro_batch, -1)
            zeros = torch.zeros_like(place, dtype=torch.int32)
            return SampledBatch(
                tokens=ids[:, :-1].contiguous(),
                labels=ids[:, 1:].contiguous(),
                loss_weight=torch.ones(micro_batch, self.length),
                positions=torch.stack((place, torch.zeros_like(place)), 1),
                key_start=zeros,
                key_end=(place + 1).int(),
            )

    def state(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def restore(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])


class Marked:
    """Marks the time of a sampler as data loading."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def next(self, micro_batch: int) -> Batch:
        with breakdown.loading():
            batch: Batch = self.inner.next(micro_batch)
        return batch

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = self.inner.state()
        return state

    def restore(self, state: dict[str, Any]) -> None:
        self.inner.restore(state)


def measure(config: RunConfig, rounds: int, on_text: bool = False) -> Row:
    """Returns one row. The peer is a matrix product of the same dtype in the same rounds.

    on_text: the config's data is read, tokenised and packed; else tokens are random."""
    sampler = _sampler(config, on_text)
    parallel = SingleProcess(config)
    trainer = Trainer(config, sampler, parallel)
    backend, dtype = trainer.backend, trainer.dtype
    peak, machine_facts, watch = (
        ceilings.peak(backend, dtype),
        ceilings.machine_with_device(backend),
        NoiseWatch(),
    )
    with registry.use(backend, strict=config.train.strict) as session:
        calls = {
            "step": ceilings.finished(backend, trainer.step),
            "gemm": ceilings.finished(backend, _product(backend, dtype)),
        }
        timing = interleave(calls, rounds)
        with parallel.eager():
            hardware = count(trainer)
        parts = breakdown.measure(trainer.step, backend)
    seconds = timing["step"].seconds
    figures = _figures(config, timing["step"].median_s, hardware, peak) | {
        "parts_s": parts,
        "memory_peak_bytes": memory_peak(backend)[0],
        "memory_peak_of": memory_peak(backend)[1],
        "data": "text" if on_text else "random tokens",
        "gemm_tflops": gemm_flops() / timing["gemm"].median_s / 1e12,
        "fallbacks": {f"{f.op}: {f.reason}": n for f, n in session.fallbacks.items()},
    }
    return Row(
        bench="step",
        key=_key(config),
        backend=backend.name,
        dtype=config.train.dtype,
        shape=f"{config.train.global_batch}x{config.data.length}",
        seconds=seconds,
        peer="gemm",
        peer_seconds=timing["gemm"].seconds,
        flops=hardware,
        peak=peak._asdict(),
        figures=figures,
        machine=machine_facts,
        notes=(
            *watch.notes(),
            *irregularities(seconds),
            *breakdown.note(parts, timing["step"].median_s),
        ),
    )


def _sampler(config: RunConfig, on_text: bool) -> Any:
    if not on_text:
        return RandomText(config.model.vocab, config.data.length)
    positions = config.model.positions
    return Marked(open_sampler(config.data, config.train.seed, ".cache", positions=positions))


def _product(backend: Backend, dtype: torch.dtype) -> Any:
    if backend.device_type == "cpu":
        return gemm(dtype)
    a, b = (torch.randn(1024, 1024, device=backend.device()).to(dtype) for _ in range(2))
    return lambda: torch.mm(a, b)


def _key(config: RunConfig) -> str:
    c, t = config.model, config.train
    sizes = f"{c.num_layers}x{c.hidden}x{c.ffn}, vocab {c.vocab}"
    batch = f"{t.global_batch}x{config.data.length} by {t.micro_batch}"
    return f"step {t.backend} {t.dtype} {sizes}, batch {batch}" + (", compiled" * t.compile)


def count(trainer: Trainer) -> float:
    """Returns the FLOPs of one step, from the cost functions of the ops it calls."""
    total = 0.0

    def counted(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal total
        cost = op.cost(*args, **kwargs)
        total += cost.flops + (cost.backward_flops if torch.is_grad_enabled() else 0)
        return run(op, args, kwargs)

    with intercept(counted):
        trainer.step()
    return total


def _figures(config: RunConfig, seconds: float, hardware: float, peak: Peak) -> dict[str, Any]:
    t, length = config.train, config.data.length
    model = model_flops(Work(model=config.model, seq=length)) * t.global_batch
    possible = seconds * peak.tflops * 1e12
    return {
        "tokens_s": t.global_batch * length / seconds,
        "mfu": model / possible,
        "hfu": hardware / possible,
        "model_flops": model,
        "hardware_flops": hardware,
        "formula": [MFU, HFU],
    }


def memory_peak(backend: Backend) -> tuple[int, str]:
    """Returns (bytes, of what): what the device counts, else the process's resident set."""
    if backend.device_type != "cpu":
        return backend.memory_peak_bytes(), "device memory allocated"
    return resident_peak_bytes(), "resident set of the process, torch and weights included"


def with_dtype(config: RunConfig, dtype: str) -> RunConfig:
    """Returns the same run in another working dtype."""
    train: TrainConfig = dataclasses.replace(config.train, dtype=dtype)  # type: ignore[arg-type]  # TrainConfig checks it
    return dataclasses.replace(config, train=train)
