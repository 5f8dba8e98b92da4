"""Models in ONNX Runtime sessions of one provider; torch tensors bound to them without a copy."""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glm_core.backends.onnxrt import store
from glm_core.backends.onnxrt.call import Call
from glm_core.errors import GlmCoreError, UnsupportedOpError

CPU = "CPUExecutionProvider"
OPTIONS = {
    # else OpenVINO computes float32 graphs in bfloat16 wherever the processor has it
    "OpenVINOExecutionProvider": {"device_type": "CPU", "precision": "FP32"},
}
"""provider -> options that keep its arithmetic in the graph's own dtypes"""
DTYPES = {
    "float": torch.float32, "double": torch.float64, "float16": torch.float16,
    "bfloat16": torch.bfloat16, "bool": torch.bool, "uint8": torch.uint8, "int8": torch.int8,
    "int32": torch.int32, "int64": torch.int64,
}  # fmt: skip
ELEMENT = {
    torch.float32: 1, torch.uint8: 2, torch.int8: 3, torch.int32: 6, torch.int64: 7, torch.bool: 9,
    torch.float16: 10, torch.float64: 11, torch.bfloat16: 16,
}  # fmt: skip
"""onnx.TensorProto's numbers, so that a model from the disk runs without importing onnx"""


class Port(NamedTuple):
    """One input or output of a model."""

    name: str
    position: int
    shape: list[int]
    dtype: torch.dtype


class Program:
    """A model in a session of its own. Raises UnsupportedOpError with the provider's own words
    where it refuses."""

    def __init__(self, model: bytes, provider: str, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.use_deterministic_compute = True
        options.log_severity_level = 4  # what fails is raised
        # one pool per session: idle ones must not spin
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if provider != CPU:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        try:
            # enable_fallback is Python's own silent retry on the CPU, beside the runtime's
            self.session = onnxruntime.InferenceSession(
                model, options, providers=[(provider, OPTIONS.get(provider, {}))], enable_fallback=0
            )
        except Exception as error:  # ONNX Runtime's exceptions have no base class but Exception
            raise UnsupportedOpError(f"{provider}: {str(error).strip().splitlines()[0]}") from error
        self.steps = json.loads(self.session.get_modelmeta().custom_metadata_map["numbers"])
        ports = [_port(x) for x in self.session.get_inputs()]
        self.tensors = [p for p in ports if p.name[0] == "t"]
        self.cotangents = [p for p in ports if p.name[0] == "g"]
        self.numbers = [p for p in ports if p.name[0] == "n"]
        self.outputs = [_port(x) for x in self.session.get_outputs()]
        self.nothing = torch.zeros(1)  # ONNX Runtime wants an address for empty tensors too

    def run(
        self, tensors: Sequence[Tensor], cotangents: Sequence[Tensor], numbers: Sequence[float]
    ) -> list[Tensor]:
        """The results, in memory of their own. Inputs that are not contiguous are copied."""
        binding = self.session.io_binding()
        alive: list[Tensor] = []

        def bind(function: Any, port: Port, tensor: Tensor) -> None:
            alive.append(tensor)
            address = tensor.data_ptr() or self.nothing.data_ptr()
            function(port.name, "cpu", 0, ELEMENT[port.dtype], port.shape, address)

        for port in self.tensors:
            bind(binding.bind_input, port, tensors[port.position].contiguous())
        for port in self.cotangents:
            bind(binding.bind_input, port, cotangents[port.position].contiguous())
        if self.numbers:
            values = evaluate(self.steps, numbers)
            for port in self.numbers:
                bind(
                    binding.bind_input, port, torch.tensor(values[port.position], dtype=port.dtype)
                )
        results = [torch.empty(port.shape, dtype=port.dtype) for port in self.outputs]
        for port, result in zip(self.outputs, results, strict=True):
            bind(binding.bind_output, port, result)
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:
            raise GlmCoreError(f"ONNX Runtime: {str(error).strip().splitlines()[0]}") from error
        return results


def _port(argument: Any) -> Port:
    name = argument.name
    kind = DTYPES[argument.type.removeprefix("tensor(").removesuffix(")")]
    return Port(name, int(name[1:].split("_")[0]), list(argument.shape), kind)


def evaluate(steps: Sequence[Sequence[Any]], numbers: Sequence[float]) -> list[float]:
    """The call's numbers, then what the reference makes of them, in Python's own arithmetic."""
    values = list(numbers)
    for name, arguments in steps:
        function = getattr(operator, name, None) or getattr(torch, name)
        values.append(function(*(values[a[1]] if isinstance(a, list) else a for a in arguments)))
    return values


def program(call: Call, provider: str, threads: int) -> Program:
    """The loaded model of a call, exported unless it lies on the disk. Raises UnsupportedOpError,
    each time."""
    made = _attempt(call, provider, threads)
    if isinstance(made, UnsupportedOpError):
        raise type(made)(str(made))
    return made


# 512: every op of a model in both directions takes about 40; a decoder makes one per key length
@functools.lru_cache(maxsize=512)
def _attempt(call: Call, provider: str, threads: int) -> Program | UnsupportedOpError:
    name = store.key(call)
    model = store.load(name)
    try:
        if model is None:
            # imported here: onnx and the tracer take 0.5 s, which a warm cache saves
            from glm_core.backends.onnxrt.export import export

            model = export(call)
            store.save(name, model)
        return Program(model, provider, threads)
    except UnsupportedOpError as error:
        return error
