"""What `glm-core backend new` writes: a package that plugs in by entry point and passes conformance
as it is. Every file is a string.Template of $name and $device."""

FILES = {
    "pyproject.toml": """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "glm-core-$name"
version = "0.1"
requires-python = ">=3.11"
dependencies = ["glm-core"]

[project.entry-points."glm_core.backends"]
$name = "glm_core_$name"

[tool.setuptools]
packages = ["glm_core_$name"]
""",
    "glm_core_$name/__init__.py": '''\
"""The glm_core backend `$name`. D width."""

from typing import Any

import torch
from glm_core import ops
from glm_core.backends import reference
from glm_core.backends.base import Backend
from glm_core.spec import SUPPORTED, Support, unsupported
from torch import Tensor

backend = Backend(
    name="$name",
    device_type="$device",
    verified="nowhere yet; write here what was run on which device",
    probe=reference.variant("$device").probe,
)


class RmsNorm(torch.autograd.Function):
    """Forward beside backward, in torch: put the device's kernels in their place. Kept for
    backward: the arguments and 1 / rms of each row, float32 [..., 1]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale * weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        dy, unit = grads[0].float(), x.float() * scale
        dunit = dy * weight.float()
        dx = scale * (dunit - unit * (dunit * unit).mean(-1, keepdim=True))
        dweight = (dy * unit).sum_to_size(weight.shape)
        return dx.to(x.dtype), dweight.to(weight.dtype), None


def contiguous(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Support:
    """Which arguments the kernel takes; for others the reference runs and the reason is told."""
    if x.is_contiguous():
        return SUPPORTED
    return unsupported(f"x is not contiguous: stride {x.stride()}")


@backend.implements(ops.rms_norm, supports=contiguous)
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """x [..., D], weight [D] -> [..., D]; the formula is in `glm-core ops rms_norm`."""
    y: Tensor = RmsNorm.apply(x, weight, eps)
    return y
''',
    "tests/test_conformance.py": '''\
"""Every conformance case of every kernel of `$name`."""

import pytest
from glm_core.conformance import Case, run_case, select

from glm_core_$name import backend


@pytest.mark.parametrize("case", select(backend), ids=lambda case: case.id)
def test_conformance(case: Case) -> None:
    result = run_case(case, backend)
    if result.outcome == "unsupported":
        pytest.skip(result.reason)
    assert result.outcome == "pass", f"{result.reason}; {result.rerun}"
''',
}
