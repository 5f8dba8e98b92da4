"""A failing device gives one line that names step, backend, op and way out, and a hang ends the
process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toy

from glm_core import ops
from glm_core.backends import registry
from glm_core.backends.base import Backend
from glm_core.diagnose import device_errors
from glm_core.errors import ConfigError, DeviceError, TrainingError, UnsupportedOpError
from glm_core.training.run import run
from glm_core.versions import AcceleratorError


def failing(error: Exception, at: int) -> Backend:
    """References; the global norm's call number `at`, once a step, raises."""
    backend, calls = Backend(name="weak", device_type="cpu", verified="in this test"), [0]
    backend.references_only = True

    @backend.implements(ops.global_norm)
    def global_norm(tensors):  # type: ignore[no-untyped-def]  # as a kernel may be
        calls[0] += 1
        if calls[0] == at:
            raise error
        return ops.global_norm.reference(tensors)

    return backend


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            torch.OutOfMemoryError("8192 bytes wanted\nstack of the driver"),
            "step 5: backend weak, op global_norm: OutOfMemoryError: 8192 bytes wanted; use a "
            "smaller train.micro_batch or a smaller model; last checkpoint: ",
        ),
        (
            AcceleratorError("CUDA error: device lost"),
            f"step 5: backend weak, noticed in op global_norm: {AcceleratorError.__name__}: CUDA "
            "error: device lost; reset the device, then resume",
        ),
        (NotImplementedError("no Half"), "NotImplementedError: no Half; use another train.dtype"),
    ],
    ids=["memory", "lost", "dtype"],
)
def test_training_names_step_op_and_last_checkpoint(
    error: Exception, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "usable", lambda name: failing(error, 5))
    with pytest.raises(DeviceError) as caught:
        run(toy.config(), tmp_path, sampler=toy.Sampler())
    assert told in str(caught.value)
    assert str(caught.value).endswith(f"{tmp_path}/checkpoints/step-00000003.safetensors")
    assert caught.value.__cause__ is error
    assert isinstance(caught.value, TrainingError)  # exit code 1


def test_no_checkpoint_is_said_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "usable", lambda name: failing(torch.OutOfMemoryError("x"), 1))
    with pytest.raises(DeviceError, match="last checkpoint: none"):
        run(toy.config(), tmp_path, sampler=toy.Sampler())


def test_generation_that_runs_out_of_memory_says_what_to_do() -> None:
    memory = device_errors.GENERATION_MEMORY
    with pytest.raises(DeviceError) as caught, device_errors.explained("weak", "chat", memory):
        raise torch.OutOfMemoryError("1 GiB wanted")
    assert str(caught.value) == f"chat: backend weak: OutOfMemoryError: 1 GiB wanted; {memory}"


@pytest.mark.parametrize(
    "error",
    [UnsupportedOpError("strict"), ConfigError("bad"), ValueError("x"), RuntimeError("shapes")],
)
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, device_errors.explained("weak", "step 1"):
        raise error
    assert caught.value is error


def test_strict_is_the_same_error_out_of_compile() -> None:
    bare = Backend(name="bare", device_type="cpu", verified="in this test")
    compiled = torch.compile(ops.geglu.__call__, fullgraph=True, backend="eager")
    with (
        pytest.raises(UnsupportedOpError) as caught,
        device_errors.explained("bare", "step 1"),
        registry.use(bare, strict=True),
    ):
        compiled(torch.ones(2, 4))
    assert str(caught.value).startswith("op geglu on backend bare: no kernel for this op; drop")


HANG = """
import ctypes, threading
from glm_core import ops
from glm_core.diagnose import watchdog
from glm_core.backends.base import Backend
from glm_core.backends.registry import use
backend = Backend(name="slow", device_type="cpu", verified="in this test", references_only=True)
@backend.implements(ops.geglu)
def geglu(x):
    {wait}
with watchdog.guard({seconds}, "backend slow", "reset it"):
    for step in range(100):
        watchdog.beat(f"step {{step}}")
    with use(backend):
        ops.geglu(None)
"""


def ended(wait: str, seconds: float) -> str:
    done = subprocess.run(
        [sys.executable, "-c", HANG.format(wait=wait, seconds=seconds)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    return done.stderr


def test_a_hang_ends_and_names_the_op() -> None:
    told = ended("threading.Event().wait()", 1.5).strip()
    assert told == (
        "glm-core: backend slow: step 99: no progress for 1.5 s, inside op geglu; reset it"
    )


def test_a_hang_that_holds_the_interpreter_ends_too() -> None:
    told = ended("ctypes.PyDLL(None).pause()", 0.2)
    assert "Timeout (0:00:01.4" in told
    assert "geglu" in told, "the stack is shown"


def test_without_a_limit_nothing_is_guarded() -> None:
    from glm_core.diagnose import watchdog

    with watchdog.guard(0, "backend slow", "reset it"):
        watchdog.beat("step 1")
    with watchdog.guard(60, "backend slow", "reset it"):
        watchdog.beat("step 1")
