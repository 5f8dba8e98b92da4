"""Holds the files that `glm-core backend new` writes: a package that plugs in by entry point and
passes conformance as it is. Each file is a string.Template of $name and $device."""

FILES = {
    "pyproject.toml": """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "glm-core-$name"
version = "0.1"
requires-python = ">=3.10"
dependencies = ["glm-core"]

[project.entry-points."glm_core.backends"]
$name = "glm_core_$name"

[tool.setuptools]
packages = ["glm_core_$name"]
""",
    "glm_core_$name/__init__.py": '''\
"""Declares the glm_core backend `$name`. Shapes: F ffn width."""

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


def normal_cdf(x: Tensor) -> Tensor:
    return (1 + torch.erf(x * 0.5**0.5)) / 2


class GeGLU(torch.autograd.Function):
    """GeGLU and its gradient in plain torch; replace both by the device's kernels. Backward needs
    only x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        a, b = x.float().chunk(2, -1)  # [..., F]
        return (a * (b * normal_cdf(b))).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        [x], dy = ctx.saved_tensors, grads[0].float()
        a, b = x.float().chunk(2, -1)  # [..., F]
        slope = normal_cdf(b) + b * torch.exp(-b * b / 2) * (2 * torch.pi) ** -0.5
        return torch.cat((dy * b * normal_cdf(b), dy * a * slope), -1).to(x.dtype)


def contiguous(x: Tensor) -> Support:
    """Decides whether the kernel takes x. If not, the reference runs and glm_core reports the
    reason."""
    if x.is_contiguous():
        return SUPPORTED
    return unsupported(f"x is not contiguous: stride {x.stride()}")


@backend.implements(ops.geglu, supports=contiguous)
def geglu(x: Tensor) -> Tensor:
    """Maps x [..., 2F] to [..., F]; `glm-core ops geglu` prints the formula."""
    y: Tensor = GeGLU.apply(x)
    return y
''',
    "tests/test_conformance.py": '''\
"""Runs every conformance case of `$name`; ops without a kernel are skipped with that reason."""

from glm_core.conformance.plugin import Check, conformance


@conformance("$name")
def test_conformance(case: Check) -> None:
    case.check()
''',
}
