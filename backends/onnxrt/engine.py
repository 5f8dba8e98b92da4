"""Runs models in ONNX Runtime sessions of one provider, with torch tensors bound without a copy."""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glm_core.backends.onnxrt import store
from glm_core.backends.onnxrt.call import ELEMENT, SCALAR, Call, by_nbits
from glm_core.errors import GlmCoreError, UnsupportedOpError

CPU = "CPUExecutionProvider"
OPTIONS = {
    # else OpenVINO computes float32 graphs in bfloat16 wherever the processor has it
    "OpenVINOExecutionProvider": {"device_type": "CPU", "precision": "FP32"},
}
"""provider -> options that keep its arithmetic in the graph's own dtypes"""


class Port(NamedTuple):
    """An input or output of a model: its name, the index of the call's value, shape and dtype."""

    name: str
    position: int
    shape: list[int]
    dtype: torch.dtype


class Program:
    """An exported model in a session of its own. Raises UnsupportedOpError with the provider's own
    message where it refuses the model."""

    def __init__(self, exported: bytes, provider: str, threads: int) -> None:
        head, _, model = exported.partition(b"\n")
        plan = json.loads(head)
        ports = [_port(*facts) for facts in plan["inputs"]]
        self.tensors = [p for p in ports if p.name[0] == "t"]
        self.cotangents = [p for p in ports if p.name[0] == "g"]
        self.numbers = [p for p in ports if p.name[0] == "n"]
        self.steps: list[list[Any]] = plan["numbers"]
        self.results = [_port(*facts) for facts in plan["results"]]
        self.session = _session(model, provider, threads) if model else None
        self.nothing = torch.zeros(1)  # ONNX Runtime wants an address for empty tensors too

    def run(
        self, tensors: Sequence[Tensor], cotangents: Sequence[Tensor], numbers: Sequence[float]
    ) -> list[Tensor]:
        """Returns the results in new tensors. Inputs that are not contiguous are copied."""
        results = [torch.empty(port.shape, dtype=port.dtype) for port in self.results]
        if self.session is None:  # nothing has elements
            return results
        inputs = [(p, tensors[p.position].contiguous()) for p in self.tensors]
        inputs += [(p, cotangents[p.position].contiguous()) for p in self.cotangents]
        if self.numbers:
            known = evaluate(self.steps, numbers)
            inputs += [(p, torch.tensor(known[p.position], dtype=p.dtype)) for p in self.numbers]
        binding = self.session.io_binding()
        for port, tensor in inputs:
            address = tensor.data_ptr() or self.nothing.data_ptr()
            shape = port.shape or SCALAR
            binding.bind_input(port.name, "cpu", 0, ELEMENT[port.dtype], shape, address)
        outputs: dict[str, Tensor] = {}
        for port, result in zip(self.results, results, strict=True):
            if port.name and outputs.setdefault(port.name, result) is result:
                shape, address = port.shape or SCALAR, result.data_ptr()
                binding.bind_output(port.name, "cpu", 0, ELEMENT[port.dtype], shape, address)
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's exceptions have no base class but Exception
            raise GlmCoreError(f"ONNX Runtime: {str(error).strip().splitlines()[0]}") from error
        for port, result in zip(self.results, results, strict=True):
            if port.name and outputs[port.name] is not result:
                result.copy_(outputs[port.name])
        return results


def _port(name: str, position: int, shape: list[int], dtype: str) -> Port:
    return Port(name, position, shape, getattr(torch, dtype))


def _session(model: bytes, provider: str, threads: int) -> Any:
    """Returns a session that runs the whole model on the provider. Raises UnsupportedOpError where
    the provider does not take all of it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    options.log_severity_level = 4  # errors are raised, so logging them is noise
    # one pool per session: idle ones must not spin
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if provider != CPU:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    chosen = [(provider, OPTIONS.get(provider, {}))]
    try:
        # enable_fallback is the Python package's silent retry on the CPU, beside the runtime's own
        return onnxruntime.InferenceSession(model, options, providers=chosen, enable_fallback=0)
    except Exception as error:
        raise UnsupportedOpError(f"{provider}: {str(error).strip().splitlines()[0]}") from error


def evaluate(steps: Sequence[Sequence[Any]], numbers: Sequence[float]) -> list[float]:
    """Returns the call's numbers, then the numbers that the reference computes from them, in
    Python's own arithmetic."""
    values = list(numbers)
    for name, arguments in steps:
        function = getattr(operator, name, None) or getattr(torch, name)
        values.append(function(*(values[a[1]] if isinstance(a, list) else a for a in arguments)))
    return values


def program(call: Call, provider: str, threads: int) -> Program:
    """Returns the loaded model of a call, exported unless it is stored on disk. A call that cannot
    be exported raises UnsupportedOpError each time."""
    outcome = _attempt(call, provider, threads)
    if isinstance(outcome, UnsupportedOpError):
        raise type(outcome)(str(outcome))
    return outcome


# 512: every op of a model in both directions takes about 40; a decoder makes one per key length
@functools.lru_cache(maxsize=512)
def _attempt(call: Call, provider: str, threads: int) -> Program | UnsupportedOpError:
    special = by_nbits(call, provider)
    name = store.key(call) + ("-nbits" if special else "")
    model = store.load(name)
    try:
        if model is None:
            # imported here: onnx and the tracer take 0.5 s, which a warm cache saves
            from glm_core.backends.onnxrt import nbits
            from glm_core.backends.onnxrt.export import export

            model = nbits.export(call) if special else export(call)
            store.save(name, model)
        return Program(model, provider, threads)
    except UnsupportedOpError as error:
        return error
