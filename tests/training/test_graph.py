"""Tests training whose micro-batches are recorded once and replayed: the references on the CPU,
with a tape in place of a GPU's graphs. No GPU ran any of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from markov import Markov, config
from tapes import Tapes
from torch import Tensor, nn

from glm_core.backends.base import Backend
from glm_core.backends.registry import use
from glm_core.bench import step
from glm_core.cli import main
from glm_core.config import Dtype, RunConfig
from glm_core.errors import ConfigError
from glm_core.training.graph import RecordedLoss
from glm_core.training.parallel import SingleProcess
from glm_core.training.trainer import StepResult, Trainer
from glm_core.versions import torch_has


class Recording(Backend):
    """The references, whose work a tape records. What a recording adds to are the gradients."""

    def __init__(self) -> None:
        super().__init__(name="simulated", device_type="cpu", verified="", references_only=True)
        self.tapes = Tapes(lambda: [p.grad for p in self.model.parameters() if p.grad is not None])
        self.model: nn.Module = nn.Identity()

    def graphs(self, device: torch.device) -> Tapes:
        return self.tapes


def trained(run: RunConfig, backend: Recording) -> tuple[list[StepResult], dict[str, Tensor]]:
    """Returns the steps, the second after an excursion into op by op, and the weights at the
    end."""
    parallel = SingleProcess(run, backend)
    trainer = Trainer(run, Markov(), parallel)
    backend.model = trainer.model
    steps = []
    with use(backend):
        for number in range(run.train.steps):
            if number == 1:
                parallel.locate_nonfinite(lambda: trainer.backward(trainer.batches()))
            steps.append(trainer.step())
    return steps, trainer.model.state_dict()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("micro_batch", [4, 2])
def test_replayed_steps_have_the_bits_of_steps_op_by_op(dtype: Dtype, micro_batch: int) -> None:
    plain = config(dtype, steps=4, micro_batch=micro_batch)
    if dtype != "float32" and micro_batch == 2 and not torch_has("grad_dtype"):
        pytest.skip("this torch sums micro-batches otherwise")
    run = dataclasses.replace(plain, train=dataclasses.replace(plain.train, graph=True))
    backend = Recording()
    want, want_weights = trained(plain, Recording())
    found, weights = trained(run, backend)
    assert found == want
    assert {n for n, w in weights.items() if not torch.equal(w, want_weights[n])} == set()
    calls = 4 * (4 // micro_batch)
    assert (backend.tapes.recorded, backend.tapes.replayed) == (1, calls - 1)


def test_another_shape_is_recorded_apart() -> None:
    model, inputs = nn.Linear(3, 1), (torch.ones(2, 3), torch.ones(4, 3))
    tapes = Tapes(lambda: [p.grad for p in model.parameters() if p.grad is not None])
    loss = RecordedLoss(model, lambda x: model(x).sum(), tapes)
    for x in (*inputs, *inputs):
        model.zero_grad(set_to_none=True)
        assert loss((x,)).item() == pytest.approx(model(x).sum().item())
        assert model.weight.grad is not None
        assert model.weight.grad.tolist() == [[float(len(x))] * 3]
    assert (tapes.recorded, tapes.replayed) == (2, 2)


def test_what_waits_for_the_device_is_told() -> None:
    run = config("float32", steps=1)
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, graph=True))
    backend = Recording()
    parallel = SingleProcess(run, backend)
    assert parallel.recorded is not None
    loss = parallel.model.loss

    def waits(*inputs: Tensor) -> Tensor:
        y = loss(*inputs)
        y.item()
        return y

    parallel.recorded._loss = waits
    with use(backend), pytest.raises(ConfigError, match=r"cannot be recorded: .*leave graph out"):
        Trainer(run, Markov(), parallel).step()


def test_the_bench_refuses_where_nothing_records() -> None:
    with pytest.raises(ConfigError, match="backend cpu records no graphs"):
        step.ours(config("float32").model, "float32", "cpu", graph=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--backend", "cpu", "--graph"], "backend cpu records no graphs; leave graph out"),
        (["--plan", "dp=2", "--graph"], "cannot be combined with train.graph=true"),
    ],
)
def test_where_nothing_records_it_is_refused(
    options: list[str], words: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one line of text\n" * 200)
    assert main(["train", "--data", str(text), "--out", str(tmp_path / "run"), *options]) == 2
    assert words in capsys.readouterr().err
