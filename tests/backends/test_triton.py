"""Tests the Triton kernels without a device: their numbers in Triton's interpreter by the ordinary
conformance cases, and that they compile ahead of time for one chip of each maker."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from glm_core.backends.registry import probe

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="pip install triton"),
    pytest.mark.skipif(not probe("cpu").ok, reason=probe("cpu").reason),
]


def release(package: str) -> tuple[int, int]:
    """Returns an installed package's version, (0, 0) where it is missing."""
    try:
        major, minor = metadata.version(package).split(".")[:2]
    except metadata.PackageNotFoundError:
        return 0, 0
    return int(major), int(minor)


def answer(cache: Path, script: str, *words: str) -> Any:
    """Returns what a script of this folder prints."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / script), *words],
        env=env | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


STALE = release("triton") < (3, 8) and release("numpy") >= (2, 4)
"""whether this Triton's interpreter takes arrays of one element for numbers, which this numpy does
not"""


@pytest.mark.skipif(STALE, reason="this triton's interpreter does not run on numpy 2.4")
def test_kernels_conform_in_the_interpreter(tmp_path: Path) -> None:
    found = answer(tmp_path, "triton_judge.py", "float32,bfloat16", "2")
    assert len(found) == 8 * 2 * (2 + 1)  # ops, modes, cases of the dtypes
    assert not {id: what for id, what in found.items() if what}


def test_attention_conforms_in_the_interpreter(tmp_path: Path) -> None:
    samples = ("2x1x4x16-cache13", "1x9x2x16-huge")
    cases = [f"attention-float32-{s}-{mode}" for s in samples for mode in ("test", "grad")]
    cases += ["attention-float32-2x3x6x36-mqa-values32-static40-test"]  # values of another size
    halves = "2x6x2x8-empty-rows"  # in both dtypes
    found = answer(tmp_path, "triton_judge.py", "float32,float16", "attention", *cases, halves)
    # cases; ways to split the keys; models whose keys are kept; latents
    assert len(found) == len(cases) + 2 * 2 + 3 + 4 + 1
    assert not {id: what for id, what in found.items() if what}


def test_attention_spills_nothing_and_takes_lengths_as_data(tmp_path: Path) -> None:
    found = answer(tmp_path, "attention_build.py", "cuda-90", "128", "bfloat16")
    assert found.pop("data") == ["keys", "parts", "queries", "splits"]
    assert len(found) == 6
    for name, used in found.items():
        assert used["spilled_bytes"] == 0, name
        assert not used["faults"], name
        assert used["shared_bytes"] <= 99 * 1024, name


EXPERTS = (
    "permute-float32-5x33-9-top3-strided-grad",
    "unpermute-bfloat16-5x7-top2-gapped-grad",
    "route-float32-4x2-12-top3-groups4of2-tied-test",
    "grouped_linear-bfloat16-5x9-7-4experts-gapped-grad",
    "quantized_grouped_linear-float32-5x96-33-3experts-int4-group32-test",
)
"""cases of the parts of a layer of experts, ties, groups and experts without rows among them;
`python triton_judge.py - experts` judges all"""


def test_products_with_codes_and_experts_conform_in_the_interpreter(tmp_path: Path) -> None:
    experts = () if STALE else EXPERTS
    found = answer(tmp_path, "triton_judge.py", "bfloat16,float16", "products", *experts)
    assert len(found) >= 2 * 6 + 2  # cases of two dtypes; products of several blocks
    assert set(experts) <= set(found)
    assert not {id: what for id, what in found.items() if what}


def test_kernels_build_ahead_of_time(tmp_path: Path) -> None:
    """`python triton_build.py` builds for the other chips."""
    wanted = ["cuda-90", "hip-gfx90a"] if release("triton") >= (3, 5) else ["cuda-90"]
    found = answer(tmp_path, "triton_build.py", *wanted)
    assert list(found) == wanted
    for target, kernels in found.items():
        assert len(kernels) == (9 if release("triton") >= (3, 6) else 7), target
        assert all(size for size, _ in kernels.values()), target
        assert not any(faults for _, faults in kernels.values()), (target, kernels)
