"""Tests the ascend backend in a dry run with the real torch_npu over stub CANN libraries
(`npu_dry_run.py` in `.venv-npu`): its calls against torch_npu's schemas and meta kernels, whole
training steps forward and backward, host tensors refused. What it cannot show: numbers
(tests/backends/test_ascend.py has a model of them), layouts that only a kernel checks, speed."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import peer_environments
import pytest
import workers

from glm_core.backends.ascend.supports import NO_CALL

ROOT = Path(__file__).parents[2]
VENV = ROOT / ".venv-npu"

LACK = peer_environments.lack("npu")
pytestmark = pytest.mark.skipif(bool(LACK), reason=LACK)


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Returns what the dry run prints; one worker runs it, the others wait."""
    result = workers.common(tmp_path_factory) / "npu_dry_run.json"
    with workers.locked(result):
        if not result.exists():
            result.write_text(_dry_run())
    return json.loads(result.read_text())


def _dry_run() -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("ASCEND")}
    env = {
        **kept,
        "PYTHONPATH": str(ROOT),
        "LD_LIBRARY_PATH": str(VENV / "cann"),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "OMP_NUM_THREADS": "1",
    }
    command = [VENV / "bin/python", ROOT / "tests/peers/npu_dry_run.py"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout[done.stdout.index('{"torch_npu"') :]  # torch_npu prints warnings


def test_the_wheel_is_the_one_meant(found: Any) -> None:
    assert found["torch_npu"].startswith("2.13.0")
    assert found["torch"].startswith("2.13.0")
    assert found["chip"] == "Ascend910B3"


def test_device_calls_and_collectives(found: Any) -> None:
    device = found["device"]
    assert (device["device"], device["peak_bytes"], device["rng"]) == ("npu:0", 0, True)
    assert device["tflops"] == 294.9
    assert "hccl" in device["collectives"]
    assert device["probe"].startswith("no /dev/davinci*") or Path("/dev/davinci0").exists()


def test_the_model_has_the_wheels_schemas(found: Any) -> None:
    assert found["schemas"] == []


def test_every_call_fits_schema_and_meta_kernel(found: Any) -> None:
    wrong = {k: v for k, v in found["cases"].items() if v and not v.startswith("unsupported: ")}
    assert wrong == {}
    run = {k.partition("-")[0] for k, v in found["cases"].items() if not v}
    assert run == set(found["ops"]) - NO_CALL.keys()


INFERENCE = {"npu_weight_quant_batchmatmul", "npu_convert_weight_to_int4pack"}
EXPERTS = {"npu_grouped_matmul"}
"""operators of layers of experts, which the models of whole steps have not"""


def test_every_operator_is_called(found: Any) -> None:
    pairs = {
        "npu_rms_norm": "_backward",
        "npu_add_layer_norm": "_backward",
        "npu_gelu": "_backward",
        "npu_geglu": "_grad",
        "npu_swiglu": "_backward",
        "npu_rotary_mul": "_backward",
        "npu_fusion_attention": "_grad",
        "npu_cross_entropy_loss": "_backward",
    }
    named = {*pairs, *(name + suffix for name, suffix in pairs.items()), "npu_add_rms_norm"}
    assert named | INFERENCE | EXPERTS == set(found["calls"])


def test_whole_training_steps(found: Any) -> None:
    for name, step in found["steps"].items():
        assert "error" not in step, f"{name}: {step}"
        assert (step["wrong"], step["fallbacks"]) == ([], 0), name
        assert step["gradients"] >= 17, name
        calls = step["calls"]
        backward = {
            k: n for k, n in calls.items() if k.endswith(("_grad", "_backward")) and "norm" not in k
        }
        assert backward == {k: calls[k.rpartition("_")[0]] for k in backward}, name
    used = {k for step in found["steps"].values() for k in step["calls"]}
    assert used == set(found["calls"]) - INFERENCE - EXPERTS


def test_a_tensor_left_on_the_host_is_an_error(found: Any) -> None:
    assert len(found["strays"]) == 6
    for name, error in found["strays"].items():
        assert error.startswith(("HostTensor: ", "FakeTensorDeviceMismatchError: ")), name


def test_repairs_of_meta_kernels_are_still_needed(found: Any) -> None:
    assert all(r["before"] for r in found["repaired"].values()), found["repaired"]
