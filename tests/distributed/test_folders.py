"""A published folder with experts, cut by a plan as it is read, gives transformers' logits and the
training step of one process, with its layer of multi-token prediction where it has one."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from expert_folders import batch, folder, peer, with_mtp
from folder_workers import ROWS, config
from plans import lack
from ranks import Ranks
from toy import Sampler

from glm_core.backends import registry
from glm_core.pretrained.weights.reading import open_checkpoint
from glm_core.training.parallel import SingleProcess
from glm_core.training.trainer import StepResult, Trainer

pytest.importorskip("transformers", reason="transformers is not installed")
PLANS = {
    2: ["dp=2,ep=2", "tp=2", "pp=2,micro_batches=2"],
    4: ["pp=2,dp=2,ep=2"],
}
KINDS = ("glm4_moe", "glm4_moe_lite")
EVEN = {"vocab_size": 84}


class Expected(NamedTuple):
    """What a folder's model computes."""

    logits: torch.Tensor
    """transformers'"""
    step: StepResult
    """one process's"""


Made = tuple[Path, dict[str, Expected]]
"""the folder of results, and what is expected of each kind"""


@pytest.fixture(scope="module")
def made(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Writes a folder of each kind; all plans read both, in one job for each number of
    processes."""
    out = tmp_path_factory.mktemp("folders")
    models = dict.fromkeys(KINDS, with_mtp(out / KINDS[0], False, torch.float32, **EVEN)[0])
    models[KINDS[1]] = peer("latent", **EVEN)
    folder(out / KINDS[1], models[KINDS[1]])
    expected = {}
    for kind, theirs in models.items():
        ours = open_checkpoint(out / kind).load(torch.float32)
        assert ours.config.num_mtp_layers == (kind == "glm4_moe")
        job = config(ours.config)
        with registry.use("reference"), torch.no_grad():
            logits = theirs(batch(rows=ROWS)[0]).logits
        with registry.use("reference"):
            step = Trainer(job, Sampler(), SingleProcess(job, model=ours)).step()
        expected[kind] = Expected(logits, step)
    for world, plans in PLANS.items():
        able = [plan for plan in plans if not lack(plan)]
        words = (able, [str(out / kind) for kind in KINDS], str(out))
        job = ranks.run("folder_workers.work", world, *words, folder=out)
        assert job.codes == [0] * world, job.told
    return out, expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("world", "plan"), [(world, plan) for world, plans in PLANS.items() for plan in plans]
)
def test_logits_and_step(made: Made, world: int, plan: str, kind: str) -> None:
    if reason := lack(plan):
        pytest.skip(reason)
    out, expected = made
    truth, step = expected[kind]
    rows = torch.zeros(ROWS, dtype=torch.bool)
    for rank in range(world):
        first, logits, loss, norm = torch.load(out / f"{kind}-{plan}-{rank}.pt")
        own = slice(first, first + len(logits))
        assert len(logits) == 0 or (logits - truth[own]).abs().max() < 1e-5 * truth.abs().max()
        assert loss == pytest.approx(step.loss, rel=1e-6)
        assert norm == pytest.approx(step.grad_norm, rel=1e-5)
        rows[own] = True
    assert rows.all()
