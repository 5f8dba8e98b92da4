"""Exact runs (docs/exact.md) are recorded as any other, and must have each other's bits."""

from __future__ import annotations

import dataclasses

import markov
import numpy as np
import pytest

from glm_core import align
from glm_core.align import explanation, jobs
from glm_core.config import RunConfig
from glm_core.errors import ConfigError


def config(micro_batch: int) -> RunConfig:
    """Four exact steps."""
    fast = markov.config("float32", steps=4, micro_batch=micro_batch)
    return dataclasses.replace(fast, train=dataclasses.replace(fast.train, exact=True))


def test_exact_runs_are_identical_or_diverged() -> None:
    """In micro-batches of four sequences and of one, where fast losses differ in last bits."""
    cal = align.calibrate(config(4), sampler=markov.Markov, controls=0, capture_steps=(2,))
    whole, parts = (align.record(config(n), "cpu", calibration=cal) for n in (4, 1))
    pair = align.compare(whole, parts)
    assert pair.verdict == "aligned", pair.reasons
    assert "the curves are identical, every loss to the bit" in explanation.sentence(pair)
    other = parts.loss.copy()
    other[2] = np.nextafter(other[2], 0)
    pair = align.compare(whole, dataclasses.replace(parts, loss=other))
    assert (pair.verdict, pair.first_step) == ("diverged", 3)
    assert "step 3: the loss deviates by" in pair.reasons[0]
    assert "exact runs by nothing" in pair.reasons[0]


def test_what_sums_in_no_fixed_order_is_refused_before_the_reference_trains() -> None:
    with pytest.raises(ConfigError, match="backend candidate sums in no fixed order"):
        align.record(config(4), markov.backend())
    with pytest.raises(ConfigError, match="single calls are judged in fast arithmetic"):
        align.bisect(config(4), "cpu")
    with pytest.raises(ConfigError, match="backend onnxrt sums in no fixed order"):
        jobs.check([config(4)], ["cpu", "onnxrt"], 6, [])
