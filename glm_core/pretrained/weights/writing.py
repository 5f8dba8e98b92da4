"""A checkpoint written in another layout, dtype or tensor-parallel degree, tensor by tensor.

safetensors files are streamed: memory holds one tensor. SAT shards go through torch.save: memory
holds one shard. The folder appears under its name only when it is complete."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm_core.errors import CheckpointError
from glm_core.model.quantize import Quantization
from glm_core.ops.quant import quantize
from glm_core.pretrained.weights.configs import write_config
from glm_core.pretrained.weights.layouts import Layout, layout
from glm_core.pretrained.weights.reading import (
    ACTIVATION_BITS,
    BITS,
    SCALE,
    Checkpoint,
    _ignored,
    is_linear,
)
from glm_core.pretrained.weights.slicing import require_divides, shard_shape, to_heads
from glm_core.pretrained.weights.stored import safetensors_header

BESIDE = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "ice_text.model",
    "generation_config.json",
    "chat_template.jinja",
)
"""what a model is talked to with; copied as it is"""
Report = Callable[[int, int, str], None]
"""called with tensors done, tensors in all, name"""


@dataclasses.dataclass(frozen=True, slots=True)
class Planned:
    """One tensor to be written."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What is to be written."""

    layout: Layout
    num_ranks: int = 1
    dtype: torch.dtype | None = None
    """of everything that is not quantized; None keeps what is stored"""
    dequantize: bool = False
    quantize: Quantization | None = None
    """the rule for linears that are stored in floating point, or are dequantized on the way"""
    shard_bytes: int = 5_000_000_000
    """largest safetensors file, unless one tensor is larger"""


def convert(
    source: Checkpoint, path: str | Path, target: Target, report: Report = lambda *_: None
) -> list[Path]:
    """Writes `source` into the folder `path` and returns its files. Raises CheckpointError where
    the layout cannot hold the model or the folder exists."""
    path = Path(path)
    _require_possible(source, target)
    if path.exists():
        raise CheckpointError(f"{path}: exists; choose a new folder")
    config = _config(source, target)
    source.require_equal_copies()
    part = path.with_name(path.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        _write(source, part, target, report)
        (part / config[0]).write_text(config[1], encoding="utf-8")
        _copy_beside(source, part)
        part.rename(path)
    except OSError as error:
        raise CheckpointError(f"{path}: not written ({error}); make room, then repeat") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return sorted(f for f in path.rglob("*") if f.is_file())


def _copy_beside(source: Checkpoint, folder: Path) -> None:
    path = source.files.path
    for name in BESIDE:
        found = (path if path.is_dir() else path.parent) / name
        if found.is_file():
            shutil.copyfile(found, folder / name)


def _require_possible(source: Checkpoint, target: Target) -> None:
    item, name = target.layout, target.layout.name
    if target.num_ranks > 1 and not item.sharded:
        raise CheckpointError(f"layout {name} has no tensor-parallel shards; use 1 rank")
    require_divides(source.config, target.num_ranks, f"layout {name}")
    if item.qkv == "heads" and source.config.num_kv_heads != source.config.num_heads:
        raise CheckpointError(
            f"layout {name} has no grouped queries, the model has "
            f"num_kv_heads={source.config.num_kv_heads}; use chatglm2, glm or glm-core"
        )
    _require_quantizable(source, target)
    if source.bits is None or target.dequantize:
        return
    if not item.quantized:
        raise CheckpointError(f"layout {name} has no quantized form; dequantize on the way")
    if name != "glm-core" and source.num_ranks > target.num_ranks:
        raise CheckpointError(
            f"layout {name} has one scale a row, but {source.num_ranks} ranks scaled their columns "
            f"separately; use {source.num_ranks} ranks or a multiple, glm-core, or dequantize"
        )


def _require_quantizable(source: Checkpoint, target: Target) -> None:
    """Before anything is written: does the layout take such codes, and do the widths divide?"""
    how, item, c = target.quantize, target.layout, source.config
    if how is None:
        return
    if source.bits is not None and not target.dequantize:
        raise CheckpointError(
            f"{source.files.path}: holds int{source.bits} codes already; add --dequantize to "
            "quantize what they stand for again"
        )
    if not item.quantized:
        raise CheckpointError(f"layout {item.name} has no quantized form; use glm-core")
    if item.name != "glm-core" and (how.group or how.activation_bits == 8):
        raise CheckpointError(
            f"layout {item.name} has one scale a row and activations as they are; use glm-core"
        )
    widths = {"hidden": c.hidden, "num_heads * head_dim": c.num_heads * c.head_dim, "ffn": c.ffn}
    if bad := [f"{k}={v}" for k, v in widths.items() if v % (how.group or 8 // how.bits)]:
        raise CheckpointError(
            f"{how.bits} bits in groups of {how.group or 'a row'} do not divide {', '.join(bad)}; "
            "use a smaller group, or 0 for one scale a row"
        )


def _write(source: Checkpoint, folder: Path, target: Target, report: Report) -> None:
    if target.layout.sharded:
        _write_shards(source, folder, target, report)
        return
    planned = list(_plan(source, target, 0))
    files = _packed(planned, target.shard_bytes)
    done, places = 0, {}
    for i, tensors in enumerate(files):
        name = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        name = name if len(files) > 1 else "model.safetensors"
        for tensor in _stream(folder / name, tensors):
            done += 1
            places[tensor.key] = name
            report(done, len(planned), tensor.key)
    if len(files) > 1:
        total = sum(t.num_bytes for t in planned)
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _write_shards(source: Checkpoint, folder: Path, target: Target, report: Report) -> None:
    """SAT's and DeepSpeed's form: `latest`, then one file a rank."""
    inner = folder / "1"
    inner.mkdir()
    (folder / "latest").write_text(inner.name)
    for rank in range(target.num_ranks):
        planned, state = list(_plan(source, target, rank)), {}
        for i, tensor in enumerate(planned):
            # a part must not drag the storage it was cut from into the file
            state[tensor.key] = tensor.make().clone(memory_format=torch.contiguous_format)
            done = rank * len(planned) + i + 1
            report(done, len(planned) * target.num_ranks, f"{tensor.key} of rank {rank}")
        torch.save({"module": state}, inner / f"mp_rank_{rank:02d}_model_states.pt")


def _plan(source: Checkpoint, target: Target, rank: int) -> Iterator[Planned]:
    """Everything that one rank's file holds, in the model's order."""
    for name in source.shapes:
        yield from _parameter(source, target, name, rank)
    if source.layout is target.layout and source.num_ranks == target.num_ranks:
        for key, stored in source.files.ranks[rank].items():
            if _ignored(source, key):
                yield Planned(key, stored.shape, stored.dtype, stored.read)


def _parameter(source: Checkpoint, target: Target, name: str, rank: int) -> Iterator[Planned]:
    """The tensors that hold one parameter of ours: one, or q, k and v, or weight and scale."""
    size, stored = target.num_ranks, source.stored(name)[0]
    shape = shard_shape(name, source.shapes[name], source.config, size)
    keys = [target.layout.prefixes[0] + key for key in target.layout.keys(name)]
    order = _order(source, target, name)
    if source.quantized(name) and not target.dequantize:
        packed = (shape[0], shape[1] * (source.bits or 8) // 8)
        scale = source.stored(name, scale=True)[0]
        grouped = source.scale(name, rank, size).shape
        yield Planned(keys[0], packed, torch.int8, lambda: order(source.tensor(name, rank, size)))
        yield Planned(
            keys[0] + SCALE,
            tuple(grouped),
            scale.dtype,
            lambda: order(source.scale(name, rank, size)),
        )
        return
    if target.quantize is not None and is_linear(name):
        yield from _quantized(
            keys[0], shape, target.quantize, lambda: order(source.dense(name, rank, size))
        )
        return
    kept = source.stored(name, scale=True)[0].dtype if source.quantized(name) else stored.dtype
    dtype = target.dtype or kept
    begin = 0
    for key, rows in zip(keys, _lengths(source, keys, shape[0]), strict=True):
        part = slice(begin, begin := begin + rows)
        yield Planned(
            key,
            (rows, *shape[1:]),
            dtype,
            lambda part=part: order(source.dense(name, rank, size))[part].to(dtype),  # type: ignore[misc]
        )


def _quantized(
    key: str, shape: tuple[int, ...], how: Quantization, read: Callable[[], Tensor]
) -> Iterator[Planned]:
    """Codes and scale of a weight that is read and quantized once, when its codes are written."""
    scales: list[Tensor] = []

    def codes() -> Tensor:
        made, scale = quantize(read(), how.bits, how.group)
        scales.append(scale)
        return made

    rows, columns = shape
    grouped = (rows, columns // how.group) if how.group else (rows,)
    yield Planned(key, (rows, columns * how.bits // 8), torch.int8, codes)
    yield Planned(key + SCALE, grouped, torch.float16, lambda: scales.pop())


def _order(source: Checkpoint, target: Target, name: str) -> Callable[[Tensor], Tensor]:
    """Our row order to the layout's."""
    if target.layout.qkv == "heads" and ".qkv." in name:
        return lambda t: to_heads(t, source.config.num_heads // target.num_ranks)
    return lambda t: t


def _lengths(source: Checkpoint, keys: list[str], rows: int) -> list[int]:
    c = source.config
    heads = (c.num_heads, c.num_kv_heads, c.num_kv_heads)
    return [rows] if len(keys) == 1 else [h * c.head_dim for h in heads]


def _packed(planned: list[Planned], limit: int) -> list[list[Planned]]:
    """Consecutive tensors into files of at most `limit` bytes."""
    files: list[list[Planned]] = []
    room = 0
    for tensor in planned:
        if not files or tensor.num_bytes > room:
            files.append([])
            room = limit
        files[-1].append(tensor)
        room -= tensor.num_bytes
    return files


def _stream(file: Path, tensors: list[Planned]) -> Iterator[Planned]:
    """Writes a safetensors file tensor by tensor; yields each when it is written."""
    with file.open("wb") as out:
        table = ((t.key, t.dtype, t.shape) for t in tensors)
        out.write(safetensors_header(table, {"format": "pt"}))
        for tensor in tensors:
            value = tensor.make().contiguous()
            if value.shape != tensor.shape or value.dtype != tensor.dtype:
                raise CheckpointError(f"{tensor.key}: changed while it was read; convert again")
            out.write(value.reshape(-1).view(torch.uint8).numpy().data)
            yield tensor
        out.flush()
        os.fsync(out.fileno())


def _config(source: Checkpoint, target: Target) -> tuple[str, str]:
    """Name and text of the config file: the source's own where the layout stays and nothing in it
    changes."""
    theirs = source.files
    changed = target.dequantize or target.dtype is not None or target.quantize is not None
    same = source.layout is target.layout and not changed
    if same and theirs.config_file is not None:
        return theirs.config_file.name, theirs.config_file.read_text(encoding="utf-8")
    kept = target.dtype or source.stored("final_norm.weight")[0].dtype
    dtype = str(kept).removeprefix("torch.")
    config = write_config(target.layout, source.config, theirs.config, dtype)
    how = target.quantize
    if how is not None:
        config[BITS] = how.bits
        if how.activation_bits != 16:
            config[ACTIVATION_BITS] = how.activation_bits
    elif source.bits is not None and not target.dequantize:
        config |= {k: v for k, v in theirs.config.items() if k == ACTIVATION_BITS}
        config[BITS] = source.bits
    name = "model_config.json" if "model_class" in target.layout.header else "config.json"
    return name, json.dumps(config, indent=1, ensure_ascii=False) + "\n"


def target(name: str, **options: Any) -> Target:
    """A target by the layout's name. Raises CheckpointError for an unknown one."""
    return Target(layout=layout(name), **options)
