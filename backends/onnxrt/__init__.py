"""Declares the backend that exports every op, gradients included, from its reference and runs it in
ONNX Runtime, whose arithmetic shares nothing with torch's. `onnxrt:<ExecutionProvider>` selects any
provider, with ONNX Runtime's own fallbacks switched off."""

from __future__ import annotations

import functools
import importlib.util

import torch

from glm_core.backends.base import Backend, Probe
from glm_core.backends.onnxrt import kernels
from glm_core.dispatch import Op
from glm_core.ops import all_ops

CPU = "CPUExecutionProvider"
VERIFIED = {
    CPU: "run on x86-64 CPUs: conformance in float32, bfloat16 and float16, a GLM trained",
    "OpenVINOExecutionProvider": "run on x86-64 CPUs with ONNX Runtime's CPU fallback off: "
    "conformance in float32, a GLM trained; OpenVINO takes no bfloat16 and reads zeros where an "
    "index is out of range",
}
_kernel_ops: dict[tuple[str, str], Op] = {}
"""(provider, op name) -> the op that the backend's kernel was made for"""


def variant(option: str) -> Backend:
    """Returns the backend on execution provider `option` (empty: ONNX Runtime's own CPU provider),
    with a kernel for every op declared so far."""
    backend, provider = _backend(option), option or CPU
    for name, op in all_ops().items():
        if _kernel_ops.get((provider, name)) is not op:
            kernel, supports = kernels.kernel(op, provider), kernels.predicate(op, provider)
            backend.implements(op, supports)(kernel)
            _kernel_ops[provider, name] = op
    return backend


@functools.cache
def _backend(option: str) -> Backend:
    provider = option or CPU
    return Backend(
        name=f"onnxrt:{option}" if option else "onnxrt",
        device_type="cpu",  # tensors are handed over in host memory, whatever the provider runs on
        verified=VERIFIED.get(provider, "not run with this provider by us"),
        probe=lambda: probe(provider),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
    )


def probe(provider: str) -> Probe:
    """Decides whether the packages are installed and this build of ONNX Runtime has the
    provider."""
    missing = [p for p in ("onnx", "onnxruntime") if importlib.util.find_spec(p) is None]
    if missing:
        return Probe(False, f"{', '.join(missing)} not installed (pip install 'glm-core[onnx]')")
    import onnxruntime

    available = onnxruntime.get_available_providers()
    if provider in available:
        return Probe(True)
    return Probe(
        False,
        f"this onnxruntime has no {provider}, only {', '.join(available)}; install the build of "
        "onnxruntime that has it (onnxruntime-openvino, onnxruntime-gpu, onnxruntime-cann, ...)",
    )
