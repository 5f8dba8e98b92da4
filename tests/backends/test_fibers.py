"""Tests every GPU kernel, executed on the CPU, one fiber per thread, in shuffled orders, under
AddressSanitizer and UBSan, against the float64 reference: the ordinary conformance cases, for waves
of 32 and of 64 lanes; and kernels with a planted bug, each of which must be found."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import fibers_build
import pytest

from glm_core.backends.registry import probe

pytestmark = [
    pytest.mark.skipif(
        shutil.which(fibers_build.COMPILER) is None, reason=f"no compiler {fibers_build.COMPILER}"
    ),
    pytest.mark.skipif(not probe("cpu").ok, reason=probe("cpu").reason),
]


def judge(library: Path | str, pattern: str, *runs: str) -> subprocess.CompletedProcess[str]:
    """Returns what the judge prints."""
    script = Path(__file__).parent / "fibers_judge.py"
    return subprocess.run(
        [sys.executable, str(script), str(library), "1", pattern, *runs],
        env=fibers_build.instrumented(),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.long
def test_every_kernel_conforms_on_fibers() -> None:
    done = judge(fibers_build.library(), "*", "64:float32", "32:bfloat16:5", "32:float16:2")
    assert done.returncode == 0, done.stderr[-4000:]
    answer: dict[str, Any] = json.loads(done.stdout)
    found = answer["found"]
    for run in ("wave64-rms_norm-float32", "wave32-adamw-float16", "wave32-int4-group128-shared"):
        assert any(id.startswith(run) for id in found), run
    assert all(answer["calls"].values()), answer["calls"]
    assert not {id: what for id, what in found.items() if what}


REDUCE = (
    "  for (int mask = wave() / 2; mask; mask /= 2) x = f(x, swapped(x, mask));\n  if (lane == 0)"
)
BUGS = {
    "no bug": None,
    "missing barrier": (
        "device.h",
        "  __syncthreads();\n  return x;",
        "  if (!planted(1)) __syncthreads();\n  return x;",
    ),
    "32 lanes assumed": (
        "device.h",
        REDUCE,
        REDUCE.replace("wave() / 2", "planted(2) ? 16 : wave() / 2"),
    ),
    "out of bounds": ("norm.cu", "take(a.bias + i, b)", "take(a.bias + i + planted(3), b)"),
    "return before a barrier": (
        "norm.cu",
        "  float x[V], r[V], sum",
        "  if (planted(4) && begin >= a.width) return;\n  float x[V], r[V], sum",
    ),
}
"""name: (file, right, wrong); `planted` takes its place in this table"""


def test_planted_bugs_are_found(tmp_path: Path) -> None:
    """One library holds them all; each is judged in a fork, and so is the library without any."""
    edits = [edit for edit in BUGS.values() if edit]
    library = fibers_build.spoiled("norm.cu", edits, tmp_path)
    numbers = "@".join(map(str, range(len(BUGS))))
    case = "layer_norm-float32-5x130-mixed-test"
    done = judge(f"{library}@{numbers}", case, "64:float32")
    assert done.returncode == 0, done.stderr[-4000:]
    found = dict(zip(BUGS, (a["found"] for a in json.loads(done.stdout)), strict=True))
    assert found.pop("no bug") == {f"wave64-{case}": ""}
    assert "AddressSanitizer: heap-buffer-overflow" in found.pop("out of bounds")["ended"]
    assert "at a shuffle, the others not" in found["return before a barrier"][f"wave64-{case}"]
    assert all(what[f"wave64-{case}"] for what in found.values()), found
