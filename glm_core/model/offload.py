"""Computes a model whose layers do not all fit into the device's memory: some stay, the others pass
through a few buffers. While one layer computes, a thread fetches the next ones from file or from
main memory, on an accelerator with a stream of its own."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from glm_core.dispatch import REGISTRY
from glm_core.errors import ConfigError
from glm_core.model.glm import GLM, Attention

Fetch = Callable[[int, nn.Module], None]
"""writes the weights of a layer into a block of the same tensors; called from a thread"""
PROBE_BYTES = 256 << 20
"""bytes copied to measure a link"""


class _Fetching(NamedTuple):
    """A layer that is being fetched into a buffer, or is there already."""

    layer: int
    buffer: nn.Module
    done: Future[None]


class LayerStream:
    """Layers that pass through buffers, always in the order of `layers`, round after round. At the
    start the buffers hold the first of them."""

    def __init__(self, layers: Sequence[int], buffers: Sequence[nn.Module], fetch: Fetch) -> None:
        self._layers, self._slots, self._fetch = list(layers), list(buffers), fetch
        self._copies = _CopyStream(next(iter(tensors(buffers[0]).values())).device)
        self._worker = ThreadPoolExecutor(1, "glm-core layers")
        self._ahead: deque[_Fetching] = deque()
        for layer, buffer in zip(self._layers, buffers, strict=False):
            there: Future[None] = Future()
            there.set_result(None)
            self._ahead.append(_Fetching(layer, buffer, there))

    def call(self, layer: int, *inputs: Any) -> Any:
        """Returns what the layer makes of Block.forward's arguments. Raises what fetching it
        raised; a later call fetches it again."""
        block = self._take(layer)
        try:
            return block(*inputs)
        finally:
            self._refill(block, after=self._ahead[-1].layer if self._ahead else layer)

    def _take(self, layer: int) -> nn.Module:
        first = self._ahead[0] if self._ahead else None
        if first is None or first.layer != layer or _failed(first.done):
            self._restart(layer)
        self._ahead[0].done.result()
        block = self._ahead.popleft().buffer
        assert isinstance(block.attention, Attention)
        block.attention.layer = layer
        return block

    def _restart(self, layer: int) -> None:
        """Fetches from `layer` on: a call was interrupted, or fetching failed."""
        wait([f.done for f in self._ahead])
        self._ahead.clear()
        before = self._layers[self._layers.index(layer) - 1]
        for buffer in self._slots:
            self._refill(buffer, after=self._ahead[-1].layer if self._ahead else before)

    def _refill(self, buffer: nn.Module, after: int) -> None:
        place = (self._layers.index(after) + 1) % len(self._layers)
        layer, used = self._layers[place], self._copies.mark()
        task = self._worker.submit(self._copies.run, used, self._fetch, layer, buffer)
        self._ahead.append(_Fetching(layer, buffer, task))


def _failed(done: Future[None]) -> bool:
    return done.done() and done.exception() is not None


class _CopyStream:
    """A second stream of a device; nothing on the CPU, and on devices whose one queue keeps the
    order of what is submitted."""

    def __init__(self, device: torch.device) -> None:
        module = None if device.type == "cpu" else torch.get_device_module(device.type)
        self._module: Any = module if hasattr(module, "Stream") else None
        self._stream = self._module.Stream(device) if self._module else None

    def mark(self) -> Any:
        """Returns an event behind the work that was submitted to the device so far."""
        if self._stream is None:
            return None
        event = self._module.Event()
        event.record()
        return event

    def run(self, used: Any, fetch: Fetch, layer: int, buffer: nn.Module) -> None:
        """Fetches a layer, after the event: until then its buffer may be in use. Returns when it is
        there."""
        with contextlib.ExitStack() as stack:
            if self._stream is not None:
                stack.enter_context(self._module.stream(self._stream))
                self._stream.wait_event(used)
            fetch(layer, buffer)
            if self._stream is not None:
                self._stream.synchronize()


class StreamedBlock(nn.Module):
    """A layer of the model whose weights are in memory only while it computes."""

    def __init__(self, stream: LayerStream, layer: int) -> None:
        super().__init__()
        self._stream, self._layer = stream, layer

    def forward(self, *inputs: Any) -> Any:
        return self._stream.call(self._layer, *inputs)


def tensors(block: nn.Module) -> dict[str, Tensor]:
    """Returns all tensors of a layer by name: weights, codes, scales, biases."""
    return {**dict(block.named_parameters()), **dict(block.named_buffers())}


def streamed_layers(num_layers: int, resident: int) -> list[int]:
    """Returns which layers are streamed if so many stay: spread evenly, so that fetching goes on
    while the others compute."""
    streamed = num_layers - resident
    return [
        i
        for i in range(num_layers)
        if (i + 1) * streamed // num_layers > i * streamed // num_layers
    ]


def stream(model: GLM, layers: Sequence[int], buffers: Sequence[nn.Module], fetch: Fetch) -> None:
    """Replaces these layers of the model by streamed ones. buffers: hold the first of them, and
    from then on any of them in turn."""
    c = model.config
    if c.num_experts and len({i < c.num_dense_layers for i in layers}) > 1:
        raise ConfigError(
            "offload: the layers to be streamed differ, some are dense and some have experts; give "
            "them more memory, or quantize the model"
        )
    for buffer in buffers:
        buffer.requires_grad_(False)
    source = LayerStream(layers, buffers, fetch)
    for layer in layers:
        model.blocks[layer] = StreamedBlock(source, layer)


def stream_from_host(
    model: GLM, layers: Sequence[int], num_buffers: int, device: torch.device
) -> None:
    """Moves a model from main memory to the device, but for these layers: they stay, page-locked
    where the device has streams, and are copied to it at every step."""
    hosts = {i: model.blocks[i] for i in layers}
    buffers = [duplicate(hosts[i], device) for i in layers[:num_buffers]]
    for layer in layers:
        model.blocks[layer] = nn.Identity()
    model.to(device)
    for host in hosts.values():
        page_lock(host, device)

    def fetch(layer: int, buffer: nn.Module) -> None:
        copy_block(hosts[layer], buffer)

    stream(model, layers, buffers, fetch)


def duplicate(block: nn.Module, device: torch.device) -> nn.Module:
    """Returns a copy of a layer on the device."""
    same = {id(op): op for op in REGISTRY.values()}  # an op is one object
    return copy.deepcopy(block, same).to(device)


def staged(fetch: Fetch, host: nn.Module) -> Fetch:
    """Returns a fetch into the device's memory by way of `host`, a block in main memory."""

    def through(layer: int, buffer: nn.Module) -> None:
        fetch(layer, host)
        copy_block(host, buffer)

    return through


def copy_block(source: nn.Module, target: nn.Module) -> None:
    """Copies all tensors of a layer, without waiting where the device has streams."""
    given = tensors(source)
    with torch.no_grad():
        for name, tensor in tensors(target).items():
            tensor.copy_(given[name], non_blocking=given[name].is_pinned())


def page_lock(block: nn.Module, device: torch.device) -> nn.Module:
    """Moves a layer to page-locked memory, from which copies to the device run beside its
    computing; returns it."""
    if device.type != "cpu" and hasattr(torch.get_device_module(device.type), "Stream"):
        for tensor in tensors(block).values():
            tensor.data = tensor.data.pin_memory()
    return block


def link_gb_s(device: torch.device) -> float:
    """Measures what a copy from main memory to the device reaches, best of three."""
    module = torch.get_device_module(device.type)
    host, there = (torch.empty(PROBE_BYTES, dtype=torch.uint8, device=d) for d in ("cpu", device))
    if hasattr(module, "Stream"):
        host = host.pin_memory()
    best_s = math.inf
    for _ in range(3):
        begin = time.perf_counter()
        there.copy_(host)
        module.synchronize()
        best_s = min(best_s, time.perf_counter() - begin)
    return PROBE_BYTES / best_s / 1e9
