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


ALL = """
import json, runpy, sys
for sys.argv in json.loads(sys.argv[1]):
    runpy.run_path(sys.argv[0], run_name="__main__")
    print()
"""
"""runs commands one after another in one process, which imports torch and Triton once"""


def answers(cache: Path, *commands: list[str]) -> list[Any]:
    """Returns what scripts of this folder print."""
    here = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{here}", "OMP_NUM_THREADS": "1"}
    paths = [[str(here / script), *words] for script, *words in commands]
    done = subprocess.run(
        [sys.executable, "-c", ALL, json.dumps(paths)],
        env=env | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


STALE = release("triton") < (3, 8) and release("numpy") >= (2, 4)
"""whether this Triton's interpreter takes arrays of one element for numbers, which this numpy does
not"""


EXPERTS = (
    "permute-float32-5x33-9-top3-strided-grad",
    "unpermute-bfloat16-5x7-top2-gapped-grad",
    "route-float32-4x2-12-top3-groups4of2-tied-test",
    "grouped_linear-bfloat16-5x9-7-4experts-gapped-grad",
    "quantized_grouped_linear-float32-5x96-33-3experts-int4-group32-test",
)
"""cases of the parts of a layer of experts, ties, groups and experts without rows among them;
`python triton_judge.py - experts` judges all"""


@pytest.mark.long
def test_kernels_conform_in_the_interpreter(tmp_path: Path) -> None:
    samples = ("2x1x4x16-cache13", "1x9x2x16-huge")
    cases = [f"attention-float32-{s}-{mode}" for s in samples for mode in ("test", "grad")]
    cases += ["attention-float32-2x3x6x36-mqa-values32-static40-test"]  # values of another size
    cases += [f"attention-float16-2x6x2x8-empty-rows-{mode}" for mode in ("test", "grad")]
    experts = () if STALE else EXPERTS
    commands = [
        ["triton_judge.py", "float32,float16", "attention", *cases],
        ["triton_judge.py", "bfloat16,float16", "products", *experts],
        *([] if STALE else [["triton_judge.py", "float32,bfloat16", "2"]]),
    ]
    attention, products, *rows = answers(tmp_path, *commands)
    # cases; ways to split the keys; models whose keys are kept; latents
    assert len(attention) == len(cases) + 3 + 4 + 1
    assert len(products) >= 2 * 6 + 2  # cases of two dtypes; products of several blocks
    assert set(experts) <= set(products)
    assert [len(r) for r in rows] == ([] if STALE else [8 * 2 * (2 + 1)])  # ops, modes, cases
    for found in (attention, products, *rows):
        assert not {id: what for id, what in found.items() if what}


def test_kernels_build_ahead_of_time(tmp_path: Path) -> None:
    """Attention spills nothing and takes lengths as data. `python triton_build.py` and `python
    attention_build.py` build for the other chips."""
    wanted = ["cuda-90", "hip-gfx90a"] if release("triton") >= (3, 5) else ["cuda-90"]
    attention, built = answers(
        tmp_path,
        ["attention_build.py", "cuda-90", "128", "bfloat16"],
        ["triton_build.py", *wanted],
    )
    assert attention.pop("data") == ["keys", "parts", "queries", "splits"]
    assert len(attention) == 6
    for name, used in attention.items():
        assert used["spilled_bytes"] == 0, name
        assert not used["faults"], name
        assert used["shared_bytes"] <= 99 * 1024, name
    assert list(built) == wanted
    for target, kernels in built.items():
        assert len(kernels) == (9 if release("triton") >= (3, 6) else 7), target
        assert all(size for size, _ in kernels.values()), target
        assert not any(faults for _, faults in kernels.values()), (target, kernels)
