"""Options of what a model and its cache may take in memory, and how a model is loaded within
them."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

    from glm_core.model.fit import Fit, Sizes
    from glm_core.model.glm import GLM
    from glm_core.pretrained.weights.reading import Checkpoint
    from glm_core.pretrained.weights.streaming import LayerFiles


def add_memory(parser: argparse.ArgumentParser) -> None:
    """Adds --bits, --context, --memory, --offload and --bandwidth."""
    parser.add_argument(
        "--bits",
        type=int,
        metavar="N",
        help="8 or 4: quantize the layers' linears while they are read, a scale a row; memory "
        "holds one layer of the others at a time",
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="most tokens of a sequence, prompt and reply together (default: the model's, or less "
        "where memory has no room for it)",
    )
    parser.add_argument(
        "--memory",
        type=float,
        metavar="GB",
        help="memory of the device that weights and cache may use (default: what is free)",
    )
    parser.add_argument(
        "--offload",
        choices=["cpu", "disk"],
        help="where layers that do not fit into the device's memory are fetched from at every "
        "step: main memory, or the checkpoint's files",
    )
    parser.add_argument(
        "--bandwidth",
        type=float,
        metavar="GB/S",
        help="--offload: what the disk, or the link to the device, is taken to bring (default: "
        "measured)",
    )


def require_memory_options(args: argparse.Namespace) -> None:
    """Raises ConfigError for values that mean nothing."""
    from glm_core.errors import ConfigError
    from glm_core.model.quantize import Quantization

    if args.bits is not None:
        Quantization(bits=args.bits)
        if args.offload == "disk":
            raise ConfigError(
                "--bits: cannot be combined with --offload disk, which reads weights as they are "
                "stored; write a quantized checkpoint first (glm-core checkpoint convert --bits), "
                "or use --offload cpu"
            )
    if args.context is not None and args.context < 2:
        raise ConfigError(f"--context {args.context} has no room; give 2 tokens or more")
    for name in ("memory", "bandwidth"):
        value = getattr(args, name)
        if value is not None and not 0 < value < 1e9:
            raise ConfigError(f"--{name} {value:g}: must be positive, in GB")
    if args.bandwidth and not args.offload:
        raise ConfigError(
            "--bandwidth: is for --offload alone; leave it out, or add --offload disk"
        )
    if args.speculate and getattr(args, "beams", None):
        raise ConfigError("--speculate: cannot be combined with --beams; leave one out")
    if args.offload and (args.adapter or getattr(args, "lora", None)):
        raise ConfigError(
            "--offload: cannot be combined with --adapter or --lora; merge the adapter into the "
            "weights, or leave one out"
        )


def load_within_memory(
    args: argparse.Namespace,
    weights: Checkpoint,
    device: torch.device,
    slots: int | None,
    most_slots: int,
) -> tuple[GLM, Fit]:
    """Returns the model of an opened checkpoint on the device, and what the cache holds. What
    happens is decided, said on stderr, and refused (ConfigError) before any weight is read."""
    import torch

    from glm_core.config import require_dense
    from glm_core.model.fit import BUFFERS
    from glm_core.model.offload import link_gb_s, stream_from_host, streamed_layers
    from glm_core.model.runner import require_draft_layer
    from glm_core.pretrained.weights.sizes import sizes
    from glm_core.pretrained.weights.streaming import LayerFiles, load_streamed

    require_draft_layer(weights.config, args.speculate)
    if args.offload:
        require_dense(weights.config, "--offload")  # its buffers hold layers of one kind
    dtype, speculate = getattr(torch, args.dtype), args.speculate > 0
    size = sizes(weights, dtype, args.bits, args.head_bits, speculate)
    found = _fit(args, weights, size, device, slots, most_slots)
    layers = streamed_layers(size.num_layers, found.resident)
    if not layers:
        if args.offload:
            print(f"offload: all {size.num_layers} layers fit into memory", file=sys.stderr)
        return _loaded(weights, dtype, args.bits, device), found
    if args.offload == "disk":
        files = LayerFiles(weights)
        _say_cost(args, size, found, _from_disk(args, files, layers, size, found, device))
        return load_streamed(files, dtype, device, layers, BUFFERS), found
    _require_host_memory(size)
    gb_s = args.bandwidth or link_gb_s(device)
    _say_cost(args, size, found, Source("main memory", size.layer * len(layers), gb_s))
    model = _loaded(weights, dtype, args.bits, torch.device("cpu"))
    stream_from_host(model, layers, BUFFERS, device)
    return model, found


def _loaded(weights: Checkpoint, dtype: torch.dtype, bits: int | None, device: torch.device) -> GLM:
    """Returns the model, with `bits` with linears that were quantized as they were read. Raises
    ConfigError where they are codes already, and for widths that do not fit."""
    if bits is None:
        return weights.load(dtype, device, quantized=True)
    from glm_core.errors import ConfigError
    from glm_core.model.quantize import Quantization, build_quantized, undivided_widths

    how = Quantization(bits=bits)
    if weights.bits is not None:
        raise ConfigError(
            f"--bits {bits}: the checkpoint holds int{weights.bits} codes already; leave it out"
        )
    if undivided := undivided_widths(weights.config, how):
        raise ConfigError(f"--bits: {undivided}")
    model = build_quantized(weights.config, lambda name, _: weights.dense(name), how, dtype)
    return model.to(device)


def _fit(
    args: argparse.Namespace,
    weights: Checkpoint,
    size: Sizes,
    device: torch.device,
    slots: int | None,
    most_slots: int,
) -> Fit:
    """Returns what the options put into memory, and says so where it is less than the model can."""
    import torch

    from glm_core.errors import ConfigError
    from glm_core.measure.memory import free_bytes
    from glm_core.model.fit import fit
    from glm_core.pretrained.weights.sizes import sizes

    if args.offload == "cpu" and device.type == "cpu":
        raise ConfigError(
            f"--offload cpu: backend {args.backend} computes in main memory; use --offload disk"
        )
    longest, ways = weights.config.max_length, {}
    half = sizes(weights, torch.bfloat16, bits=args.bits)
    if size.token > half.token:
        ways["--dtype bfloat16"] = half
    if weights.bits is None and args.bits != 4:
        convert = "glm-core checkpoint convert --bits 4, then --dtype bfloat16"
        way = convert if args.offload == "disk" else "--bits 4 --dtype bfloat16"
        ways[way] = sizes(weights, torch.bfloat16, bits=4)
    found = fit(
        size,
        free_bytes(device) if args.memory is None else int(args.memory * 1e9),
        longest,
        slots=slots,
        context=args.context,
        most_slots=most_slots,
        offload=args.offload is not None,
        ways=ways,
    )
    if args.context is None and found.context < longest:
        print(
            f"memory: room for {found.slots} x {found.context} tokens; the model's context is "
            f"{longest}",
            file=sys.stderr,
        )
    return found


def _require_host_memory(size: Sizes) -> None:
    """Raises ConfigError where main memory cannot hold the model beside the device."""
    from glm_core.errors import ConfigError
    from glm_core.measure.memory import host_free_bytes
    from glm_core.model.fit import SHARE, gigabytes

    free = host_free_bytes()
    if free is not None and size.weights > free * SHARE:
        raise ConfigError(
            f"--offload cpu: the weights take {gigabytes(size.weights)} of main memory, and of "
            f"{gigabytes(free)} free only {gigabytes(free * SHARE)} may be used; use --offload disk"
        )


class Source(NamedTuple):
    """Where streamed layers come from."""

    name: str
    num_bytes: int
    """fetched at every step"""
    gb_s: float


def _from_disk(
    args: argparse.Namespace,
    files: LayerFiles,
    layers: list[int],
    size: Sizes,
    found: Fit,
    device: torch.device,
) -> Source:
    """Returns how fast layers come from the files: from the system's cache where main memory has
    room for them beside the model."""
    import torch

    from glm_core.measure.memory import host_free_bytes
    from glm_core.model.fit import SHARE
    from glm_core.planner.offload import CACHED

    num_bytes, dtype = files.num_bytes(layers), getattr(torch, args.dtype)
    if args.bandwidth:
        return Source("disk", num_bytes, args.bandwidth)
    held = size.layer  # the buffer through which layers reach an accelerator
    if device.type == "cpu":
        held = size.least(True) + max(found.resident, 0) * size.layer
        held += found.slots * found.context * size.token
    free = host_free_bytes()
    cached = free is not None and num_bytes <= free * SHARE - held
    return Source(CACHED if cached else "disk", num_bytes, files.gb_s(layers, dtype, cached=cached))


def _say_cost(args: argparse.Namespace, size: Sizes, found: Fit, source: Source) -> None:
    """Prints what fetching the layers costs."""
    from glm_core.planner.offload import OffloadCost

    cost = OffloadCost(
        size.num_layers - found.resident,
        size.num_layers,
        source.num_bytes,
        source.gb_s,
        source.name,
        args.bandwidth is None,
    )
    print(cost.text(found.slots), file=sys.stderr)
