"""Writes a checkpoint in another layout, dtype or tensor-parallel degree, tensor by tensor.

safetensors files are streamed: memory holds one tensor. SAT shards go through torch.save: memory
holds one shard. The folder gets its name only when it is complete."""

from __future__ import annotations

import dataclasses
import functools
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
from glm_core.model.quantize import (
    Quantization,
    codes_of,
    heads_quantization,
    split_heads,
    undivided_widths,
)
from glm_core.pretrained.weights import heads
from glm_core.pretrained.weights.configs import write_config
from glm_core.pretrained.weights.files import safetensors_header
from glm_core.pretrained.weights.layouts import Layout, find_layout
from glm_core.pretrained.weights.reading import (
    ACTIVATION_BITS,
    BITS,
    SCALE,
    Checkpoint,
    is_ignored,
    is_linear,
)
from glm_core.pretrained.weights.sharding import require_divides, shard_shape, to_heads

COMPANIONS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "ice_text.model",
    "generation_config.json",
    "chat_template.jinja",
)
"""files of the tokenizer, the chat template and the stop tokens, copied unchanged"""
Progress = Callable[[int, int, str], None]
"""called after each tensor with the number done, the number in all, and its name"""


@dataclasses.dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor to be written; `make` reads and converts its values."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """The form in which a checkpoint is written."""

    layout: Layout
    num_ranks: int = 1
    dtype: torch.dtype | None = None
    """dtype of everything that is not quantized; None keeps the stored dtypes"""
    dequantize: bool = False
    """whether stored int8 and int4 codes become floating point"""
    quantize: Quantization | None = None
    """how linears in floating point (stored so, or dequantized) are quantized; None: they are
    not"""
    shard_bytes: int = 5_000_000_000
    """size that a safetensors file does not exceed, unless one tensor is larger"""


def convert(
    source: Checkpoint, path: str | Path, target: Target, progress: Progress = lambda *_: None
) -> list[Path]:
    """Writes `source` into the new folder `path` and returns the files written. Raises
    CheckpointError if the layout cannot hold the model or the folder exists."""
    path = Path(path)
    _require_possible(source, target)
    if path.exists():
        raise CheckpointError(f"{path}: exists; choose a new folder")
    config_name, config_text = _config(source, target)
    source.require_equal_copies()
    part = path.with_name(path.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        _write(source, part, target, progress)
        (part / config_name).write_text(config_text, encoding="utf-8")
        _copy_companions(source, part)
        part.rename(path)
    except OSError as error:
        raise CheckpointError(f"{path}: not written ({error}); make room, then repeat") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return sorted(f for f in path.rglob("*") if f.is_file())


def _copy_companions(source: Checkpoint, folder: Path) -> None:
    for name in COMPANIONS:
        if (file := source.files.home / name).is_file():
            shutil.copyfile(file, folder / name)


def _require_possible(source: Checkpoint, target: Target) -> None:
    """Raises CheckpointError if the target's layout cannot hold the source."""
    layout, name = target.layout, target.layout.name
    if target.num_ranks > 1 and not layout.sharded:
        raise CheckpointError(f"layout {name} has no tensor-parallel shards; use 1 rank")
    require_divides(source.config, target.num_ranks, f"layout {name}")
    if layout.qkv == "heads" and source.config.num_kv_heads != source.config.num_heads:
        raise CheckpointError(
            f"layout {name} has no grouped queries, the model has "
            f"num_kv_heads={source.config.num_kv_heads}; use chatglm2, glm or glm-core"
        )
    _require_quantizable(source, target)
    if source.bits is None or target.dequantize:
        return
    if not layout.quantized:
        raise CheckpointError(f"layout {name} has no quantized form; add --dequantize")
    if name != "glm-core" and source.num_ranks > target.num_ranks:
        raise CheckpointError(
            f"layout {name} has one scale a row, but {source.num_ranks} ranks scaled their columns "
            f"separately; use {source.num_ranks} ranks or a multiple, glm-core, or --dequantize"
        )


def _require_quantizable(source: Checkpoint, target: Target) -> None:
    """Raises CheckpointError if the layout cannot hold such codes, or widths do not divide."""
    how, layout = target.quantize, target.layout
    if how is None:
        return
    if source.bits is not None and not target.dequantize:
        raise CheckpointError(
            f"{source.files.path}: holds int{source.bits} codes already; add --dequantize to "
            "quantize their values again"
        )
    if not layout.quantized:
        raise CheckpointError(f"layout {layout.name} has no quantized form; use glm-core")
    if layout.name != "glm-core" and (how.group or how.activation_bits == 8):
        raise CheckpointError(
            f"layout {layout.name} has one scale a row and no int8 activations; use glm-core"
        )
    if undivided := undivided_widths(source.config, how):
        raise CheckpointError(undivided)


def _write(source: Checkpoint, folder: Path, target: Target, progress: Progress) -> None:
    if target.layout.sharded:
        _write_shards(source, folder, target, progress)
        return
    planned = list(_plan(source, target, 0))
    files = _packed(planned, target.shard_bytes)
    done, file_of_key = 0, {}
    for i, tensors in enumerate(files):
        name = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        name = name if len(files) > 1 else "model.safetensors"
        for tensor in _stream(folder / name, tensors):
            done += 1
            file_of_key[tensor.key] = name
            progress(done, len(planned), tensor.key)
    if len(files) > 1:
        total = sum(t.num_bytes for t in planned)
        index = {"metadata": {"total_size": total}, "weight_map": file_of_key}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=1), encoding="utf-8"
        )


def _write_shards(source: Checkpoint, folder: Path, target: Target, progress: Progress) -> None:
    """Writes one file a rank, and `latest`, as SAT and DeepSpeed do."""
    inner = folder / "1"
    inner.mkdir()
    (folder / "latest").write_text(inner.name, encoding="utf-8")
    for rank in range(target.num_ranks):
        planned, state = list(_plan(source, target, rank)), {}
        for i, tensor in enumerate(planned):
            # torch.save writes the whole storage of a view
            state[tensor.key] = tensor.make().clone(memory_format=torch.contiguous_format)
            done = rank * len(planned) + i + 1
            progress(done, len(planned) * target.num_ranks, f"{tensor.key} of rank {rank}")
        torch.save({"module": state}, inner / f"mp_rank_{rank:02d}_model_states.pt")


def _plan(source: Checkpoint, target: Target, rank: int) -> Iterator[PlannedTensor]:
    """Yields every tensor of one rank's file, in the model's order."""
    for name in source.shapes:
        yield from _parameter(source, target, name, rank)
    if source.layout is target.layout and source.num_ranks == target.num_ranks:
        for key, stored in source.files.ranks[rank].items():
            if is_ignored(source, key):
                yield PlannedTensor(key, stored.shape, stored.dtype, stored.read)


def _parameter(source: Checkpoint, target: Target, name: str, rank: int) -> Iterator[PlannedTensor]:
    """Yields the tensors that hold one of our parameters: one, or q, k and v, or weight and
    scale."""
    shape = shard_shape(name, source.shapes[name], source.config, target.num_ranks)
    before = target.layout.prefixes[0]
    parts = {before + k: s for k, s in target.layout.parts(name, shape, source.config).items()}
    key = next(iter(parts))
    if heads.is_heads(name) and target.quantize is not None:
        yield from _new_head_codes(source, name, before, target.quantize)
    elif source.in_parts(name) and not target.dequantize:
        for part, codes in zip(source.stored(name), source.stored(name, scale=True), strict=True):
            for s in (part, codes):
                yield PlannedTensor(s.key, s.shape, s.dtype, s.read)
    elif source.quantized(name) and not target.dequantize:
        yield from _stored_codes(source, target, name, rank, key)
    elif target.quantize is not None and is_linear(name):
        yield from _new_codes(source, target, name, rank, key, target.quantize)
    else:
        yield from _floating_point(source, target, name, rank, parts)


def _stored_codes(
    source: Checkpoint, target: Target, name: str, rank: int, key: str
) -> Iterator[PlannedTensor]:
    """Yields the codes and the scale of a weight as they are stored."""
    size, reorder = target.num_ranks, _reorder(source, target, name)
    *rows, columns = shard_shape(name, source.shapes[name], source.config, size)
    scale_shape = tuple(source.scale(name, rank, size).shape)
    scale_dtype = source.stored(name, scale=True)[0].dtype
    yield PlannedTensor(
        key,
        (*rows, columns * (source.bits or 8) // 8),
        torch.int8,
        lambda: reorder(source.tensor(name, rank, size)),
    )
    yield PlannedTensor(
        key + SCALE, scale_shape, scale_dtype, lambda: reorder(source.scale(name, rank, size))
    )


def _new_codes(
    source: Checkpoint, target: Target, name: str, rank: int, key: str, how: Quantization
) -> Iterator[PlannedTensor]:
    """Yields the codes and the scale of a weight."""
    size, reorder = target.num_ranks, _reorder(source, target, name)
    shape = shard_shape(name, source.shapes[name], source.config, size)
    yield from _codes(key, shape, lambda: reorder(source.dense(name, rank, size)), how)


def _new_head_codes(
    source: Checkpoint, name: str, before: str, how: Quantization
) -> Iterator[PlannedTensor]:
    """Yields the same of each of the two parts that a parameter is stored in. before: stands before
    every key."""
    c = source.config
    widths = (c.head_dim - c.rope_head_dim, c.value_head_dim)
    for i, (part, shape) in enumerate(
        zip(heads.part_names(name), heads.part_shapes(c), strict=True)
    ):

        def make(i: int = i) -> Tensor:
            return split_heads(source.dense(name), widths, how)[i][0]

        yield from _codes(before + part, shape, make, heads_quantization(shape[-1], how))


def _codes(
    key: str, shape: tuple[int, ...], make: Callable[[], Tensor], how: Quantization
) -> Iterator[PlannedTensor]:
    """Yields the codes and the scale of what `make` returns. It is quantized once, when its codes
    are made."""
    *rows, columns = shape
    scales: list[Tensor] = []

    def make_codes() -> Tensor:
        codes, scale = codes_of(make(), how)
        scales.append(scale)
        return codes

    scale_shape = (*rows, columns // how.group) if how.group else tuple(rows)
    yield PlannedTensor(key, (*rows, columns * how.bits // 8), torch.int8, make_codes)
    yield PlannedTensor(key + SCALE, scale_shape, torch.float16, scales.pop)


def _floating_point(
    source: Checkpoint, target: Target, name: str, rank: int, parts: dict[str, tuple[int, ...]]
) -> Iterator[PlannedTensor]:
    """Yields a parameter in floating point, in one tensor or in several. It is read once for all of
    them, and let go of with the last."""
    size, reorder = target.num_ranks, _reorder(source, target, name)
    stored_dtype = source.stored(name, scale=source.quantized(name))[0].dtype
    dtype = stored_dtype if name.endswith("router.bias") else target.dtype or stored_dtype
    rest: list[Tensor] = []

    def make(shape: tuple[int, ...], last: bool) -> Tensor:
        if not rest:
            whole = reorder(source.dense(name, rank, size))
            rest.append(whole.flatten(0, -2) if whole.dim() > len(shape) else whole)
        length = math.prod(shape[:-1]) if len(shape) > 1 else shape[0]
        value, left = rest[0][:length], rest[0][length:]
        rest[:] = [] if last else [left]
        return value.to(dtype).view(shape)

    final = list(parts)[-1]
    for key, shape in parts.items():
        yield PlannedTensor(key, shape, dtype, functools.partial(make, shape, key == final))


def _reorder(source: Checkpoint, target: Target, name: str) -> Callable[[Tensor], Tensor]:
    """Returns the function that puts rows in our order into the layout's order."""
    if target.layout.qkv == "heads" and ".qkv." in name:
        return lambda t: to_heads(t, source.config.num_heads // target.num_ranks)
    return lambda t: t


def _packed(planned: list[PlannedTensor], limit: int) -> list[list[PlannedTensor]]:
    """Groups consecutive tensors into files of at most `limit` bytes."""
    files: list[list[PlannedTensor]] = []
    room = 0
    for tensor in planned:
        if not files or tensor.num_bytes > room:
            files.append([])
            room = limit
        files[-1].append(tensor)
        room -= tensor.num_bytes
    return files


def _stream(file: Path, tensors: list[PlannedTensor]) -> Iterator[PlannedTensor]:
    """Writes a safetensors file tensor by tensor; yields each after it is written."""
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
    """Returns name and text of the config file: the source's own file if the layout is the same and
    nothing in it changes."""
    files = source.files
    changed = target.dequantize or target.dtype is not None or target.quantize is not None
    same = source.layout is target.layout and not changed
    if same and files.config_file is not None and files.config_file.suffix == ".json":
        return files.config_file.name, files.config_file.read_text(encoding="utf-8")
    written = target.dtype or source.stored("final_norm.weight")[0].dtype
    dtype = str(written).removeprefix("torch.")
    config = write_config(target.layout, source.config, files.config, dtype)
    how = target.quantize
    if how is not None:
        config[BITS] = how.bits
        if how.activation_bits != 16:
            config[ACTIVATION_BITS] = how.activation_bits
    elif source.bits is not None and not target.dequantize:
        config |= {k: v for k, v in files.config.items() if k == ACTIVATION_BITS}
        config[BITS] = source.bits
    name = "model_config.json" if "model_class" in target.layout.header else "config.json"
    return name, json.dumps(config, indent=1, ensure_ascii=False) + "\n"


def target(name: str, **options: Any) -> Target:
    """Returns a target by the name of its layout. Raises CheckpointError for an unknown one."""
    return Target(layout=find_layout(name), **options)
