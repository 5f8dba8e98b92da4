"""A candidate under a plan is held to the reference's run on one process: `align run --plan`."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import markov
import numpy as np
import pytest
import torch
from ranks import Ranks

from glm_core import align
from glm_core.align import explanation, plan_findings, plan_tests, planned_run, report
from glm_core.distributed.plan import parse
from glm_core.errors import ConfigError


@pytest.fixture(scope="module")
def calibration() -> align.Calibration:
    config = markov.config("float32", steps=4)
    return align.calibrate(
        config, sampler=markov.Markov, controls=4, capture_steps=(2,), judges_ops=False
    )


def judged(
    cal: align.Calibration, plan: str, bug: str, ranks: Ranks, folder: Path, **options: Any
) -> tuple[Any, align.Pair]:
    """Returns the trace of a planned run with a bug planted, and the verdict on it."""
    module, arguments = (
        ("elastic_workers.align_with", [bug]) if bug else (f"{planned_run.__name__}.work", [])
    )

    def start(world: int, request: Path) -> None:
        job = ranks.run(module, world, *arguments, str(request), folder=folder)
        assert job.codes == [0] * world, job.told

    trace = planned_run.record_plan(cal, "reference", plan, start=start, **options)
    return trace, align.compare(cal.reference, trace)


def test_an_honest_plan_is_acquitted(
    calibration: align.Calibration, ranks: Ranks, tmp_path: Path
) -> None:
    trace, pair = judged(calibration, "dp=2", "", ranks, tmp_path)
    assert len(trace.loss) == calibration.config.train.steps
    assert (pair.verdict, pair.under_plan) == ("aligned", "")
    assert {t["test"] for t in trace.plan_tests} == {"norm", "copies", "update"}
    path = tmp_path / "report.html"
    report.write_pair(pair, calibration.reference, trace, path)
    text = path.read_text(encoding="utf-8")
    assert text.index("reference under dp=2: ") < text.index("copies of a gradient on")
    assert "No op is guilty" not in text  # none was judged


@pytest.mark.parametrize(
    ("plan", "bug", "named"),
    [
        ("dp=2", "mean_over_ranks", "every gradient: the all-reduce over dp; they are 0.50 times"),
        ("dp=2", "same_rows", "the forward pass: which rows each dp rank takes"),
        ("dp=2,zero=1", "shard_not_updated", r"the update of \S+ on rank 1, and of \d+ other"),
    ],
)
def test_a_mistake_of_a_plan_is_named(
    plan: str, bug: str, named: str, calibration: align.Calibration, ranks: Ranks, tmp_path: Path
) -> None:
    free = bug == "same_rows"  # a plan whose curve is left out is judged by the captured steps
    trace, pair = judged(calibration, plan, bug, ranks, tmp_path, free_run=free)
    assert pair.max_gradient_ratio > 1
    assert (pair.max_envelope_ratio > 1) == free
    found = dict(explanation.details(pair, trace))
    assert "a collective" in found["usually"]
    assert found["rerun"].endswith(f"--backends reference --plan {plan}")
    assert re.match(named, found["where"])
    assert found["where"] in explanation.sentence(pair)


NAMES = ["embedding", "blocks.0.norm1.weight", "blocks.0.attention.qkv.weight", "head"]


@pytest.mark.parametrize(
    ("plan", "wrong", "named"),
    [
        ("tp=2,sp=true", [1], "what every tp rank holds whole"),
        ("pp=2,micro_batches=2", [0], "the gradient of the embedding"),
        ("dp=2", [2], "the gradient of blocks.0.attention.qkv.weight"),
        ("dp=2,zero=3", [0, 1, 2, 3], "the reduce-scatter over dp"),
    ],
)
def test_gradients_that_are_wrong_together_name_their_sum(
    plan: str, wrong: list[int], named: str
) -> None:
    excess = np.full((1, 4), 0.1)
    excess[0, wrong] = 9.0
    assert named in plan_findings.of_gradients(parse(plan), NAMES, excess, excess * 0 + 1, None)


def test_experts_that_ranks_chose_are_put_in_the_order_of_rows_and_layers() -> None:
    def rank(tp_rank: int, **chosen: list[int]) -> dict[str, Any]:
        named = {
            f"blocks.{k[1:]}.mlp.router": [torch.tensor([[x]]) for x in v]
            for k, v in chosen.items()
        }
        return {"tp_rank": tp_rank, "chosen": named}

    ranks = [rank(0, b10=[1, 2], b2=[3]), rank(1, b10=[9, 9], b2=[9]), rank(0, b10=[4], b2=[5])]
    layers = plan_tests.choice_of_all(ranks)
    assert [layer.flatten().tolist() for layer in layers] == [[3, 5], [1, 2, 4]]


@pytest.mark.parametrize(
    ("plan", "train", "reason"),
    [
        ("tp=4", {}, "does not divide num_heads=2"),
        ("dp=2", {"compile": True}, "train.compile=true is not judged under plans; leave it out"),
        (
            "dp=4",
            {"micro_batch": 2, "ramp_from": 2, "ramp_increment": 2, "ramp_samples": 8},
            "does not divide global_batch=2",
        ),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_before_anything_is_trained(
    plan: str, train: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    config = markov.config("float32")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **train))
    with pytest.raises(ConfigError, match=reason):
        align.run(config, ["reference"], plans=[plan], out_dir=tmp_path)
