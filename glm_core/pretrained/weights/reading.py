"""Reads checkpoints of any layout and tensor-parallel degree by the names of our parameters.

The rows of a stored rank are put into our order first. Ranks are then merged or cut by the same
rule in every layout (layouts.SPLITS)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from torch import Tensor

from glm_core.config import ModelConfig
from glm_core.errors import CheckpointError
from glm_core.model.glm import GLM, QUANTIZED
from glm_core.model.quantize import (
    Quantization,
    QuantizedGroupedLinear,
    QuantizedHeads,
    QuantizedLinear,
    join_heads,
    values_of,
)
from glm_core.pretrained.weights import heads
from glm_core.pretrained.weights.configs import read_config
from glm_core.pretrained.weights.files import CheckpointFiles, StoredTensor, scan, some
from glm_core.pretrained.weights.layouts import LAYOUTS, Layout, detect, recognised
from glm_core.pretrained.weights.sharding import (
    cut,
    from_heads,
    merge,
    require_divides,
    shard_shape,
)

SCALE = "_scale"
ADAPTER = re.compile(r"lora_[abAB](\.|$)|(^|\.)prefix(_encoder)?\.")
"""what the keys of adapters contain"""
BITS, ACTIVATION_BITS = "quantization_bit", "quantization_activation_bits"
"""keys of config.json; the first is ChatGLM's, the second our own"""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose names, shapes and dtypes fit `config`; values are read on request.

    `name` is a parameter of our GLM. `rank` and `size` select one part of a parameter as it is cut
    for `size` tensor-parallel ranks, however many ranks are stored."""

    files: CheckpointFiles
    layout: Layout
    prefix: str
    """before every key of the layout"""
    config: ModelConfig
    shapes: dict[str, tuple[int, ...]]
    """shapes of our parameters, uncut"""
    bits: int | None
    """8 or 4 if the linears are quantized, else None"""

    @property
    def num_ranks(self) -> int:
        """Number of stored tensor-parallel ranks."""
        return len(self.files.ranks)

    def stored(self, name: str, rank: int = 0, scale: bool = False) -> list[StoredTensor]:
        """Returns the tensors of one stored rank that hold a parameter, or its scale."""
        suffix = SCALE if scale else ""
        names = heads.part_names(name) if self.in_parts(name) else [name]
        keys = [key for n in names for key in self.layout.keys(n, self.config)]
        return [self.files.ranks[rank][self.prefix + k + suffix] for k in keys]

    def quantized(self, name: str) -> bool:
        """Whether a parameter is stored as int8 or int4 codes."""
        return self.bits is not None and (is_linear(name) or self.in_parts(name))

    def in_parts(self, name: str) -> bool:
        """Whether a parameter is stored as the codes of its two parts (weights/heads.py)."""
        if self.bits is None or not heads.is_heads(name):
            return False
        return self.prefix + heads.part_names(name)[0] in self.files.ranks[0]

    def parts(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """Returns codes and scales of each of the two."""
        both = zip(self.stored(name), self.stored(name, scale=True), strict=True)
        return [(codes.read(), scale.read()) for codes, scale in both]

    def tensor(self, name: str, rank: int = 0, size: int = 1) -> Tensor:
        """Returns a part of a parameter in its stored dtype, packed codes if it is quantized. Reads
        only the stored ranks that hold it."""
        return self._sliced(name, rank, size, scale=False)

    def scale(self, name: str, rank: int = 0, size: int = 1) -> Tensor:
        """Returns the scales of a part of a quantized parameter: [F], or [F, G] for G groups of
        columns, such as those of G merged ranks."""
        return self._sliced(name, rank, size, scale=True)

    def dense(self, name: str, rank: int = 0, size: int = 1) -> Tensor:
        """Returns a part of a parameter in floating point."""
        if self.in_parts(name):
            bits = self.bits or 8
            return join_heads(*(values_of(c, s, bits, s.dtype) for c, s in self.parts(name)))
        tensor = self.tensor(name, rank, size)
        if not self.quantized(name):
            return tensor
        scale = self.scale(name, rank, size)
        return values_of(tensor, scale, self.bits or 8, scale.dtype)

    def _sliced(self, name: str, rank: int, size: int, scale: bool) -> Tensor:
        stored_ranks, c = self.num_ranks, self.config
        if stored_ranks % size == 0:
            each = stored_ranks // size
            ranks = range(rank * each, (rank + 1) * each)
            parts = [self._part(name, r, scale) for r in ranks]
            return merge(name, parts, c, size, scale)
        if size % stored_ranks == 0:
            each = size // stored_ranks
            part = self._part(name, rank // each, scale)
            return cut(name, part, c, rank % each, each, stored_ranks, scale)
        parts = [self._part(name, r, scale) for r in range(stored_ranks)]
        whole = merge(name, parts, c, 1, scale)
        return cut(name, whole, c, rank, size, 1, scale)

    def _part(self, name: str, rank: int, scale: bool) -> Tensor:
        """Returns what one stored rank holds of a parameter, rows in our order."""
        read = [s.read() for s in self.stored(name, rank, scale)]
        tensor = read[0] if len(read) == 1 else torch.cat(read)
        if tensor.dim() < len(self.shapes[name]) and ".experts_" in name and not scale:
            tensor = tensor.unflatten(0, (self.config.num_experts, -1))  # [X, F, D]
        if self.layout.qkv == "heads" and ".qkv." in name:
            tensor = from_heads(tensor, self.config.num_heads // self.num_ranks)
        return tensor

    def require_equal_copies(self) -> None:
        """Raises CheckpointError if ranks differ in a parameter that each of them holds whole."""
        for name, shape in self.shapes.items() if self.num_ranks > 1 else ():
            if shard_shape(name, shape, self.config, 2) != shape:
                continue
            first = self._part(name, 0, False)
            for rank in range(1, self.num_ranks):
                if not torch.equal(first, self._part(name, rank, False)):
                    copy = self.stored(name, rank)[0]
                    raise CheckpointError(
                        f"{copy.file}: {copy.key} differs from rank 0's, and every rank must hold "
                        "the same; the shards belong to different checkpoints: fetch them again"
                    )

    def load(
        self,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        quantized: bool = False,
        without: Collection[int] = (),
    ) -> GLM:
        """Returns the model with these weights, in `dtype` or the stored dtype. Quantized linears
        are dequantized, or with `quantized` stay quantized. A stored head that equals the embedding
        is tied to it. Parameters are filled one by one: memory holds the model and one tensor.
        without: layers that are not read, and stay on the device `meta`."""
        self.require_equal_copies()
        config = dataclasses.replace(self.config, tied_head=self._tied())
        with torch.device("meta"):
            model = GLM(config)
        left_out = tuple(f"blocks.{i}." for i in without)
        names = [
            n
            for n in self.shapes
            if not n.startswith(left_out) and (n != "head" or not config.tied_head)
        ]
        codes_kept = {n.rpartition(".")[0] for n in names if quantized and self.quantized(n)}
        for name in names:
            owner, _, leaf = name.rpartition(".")
            if owner not in codes_kept:
                value = self.dense(name)
                kept = ".router." in name  # float32, whatever the others are
                wanted = torch.float32 if kept else dtype or value.dtype
                value = value.to(device, wanted, copy=True).contiguous()
                setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(value))
        for owner in codes_kept:
            parent, _, leaf = owner.rpartition(".")
            linear = self._quantized_linear(owner, dtype, device)
            setattr(model.get_submodule(parent), leaf, linear)
        return model

    def _tied(self) -> bool:
        """Whether head and embedding are the same, in the config or by their values."""
        return self.config.tied_head or torch.equal(self.tensor("head"), self.tensor("embedding"))

    def _quantized_linear(
        self, owner: str, dtype: torch.dtype | None, device: str | torch.device
    ) -> torch.nn.Module:
        weight, bias = f"{owner}.weight", None
        if self.in_parts(weight):
            each = [self._linear_of(c, s, None, device) for c, s in self.parts(weight)]
            return QuantizedHeads(*each)
        if f"{owner}.bias" in self.shapes:
            bias = self.tensor(f"{owner}.bias")
            bias = bias.to(device, dtype or bias.dtype, copy=True)
        return self._linear_of(self.tensor(weight), self.scale(weight), bias, device)

    def _linear_of(
        self, codes: Tensor, scale: Tensor, bias: Tensor | None, device: str | torch.device
    ) -> QuantizedLinear:
        codes, scale = (t.to(device, copy=True).contiguous() for t in (codes, scale))
        width = codes.shape[-1] * 8 // (self.bits or 8)
        group = 0 if scale.dim() < codes.dim() else width // scale.shape[-1]
        how = Quantization(
            bits=self.bits or 8,
            group=0 if group % 32 else group,  # the columns of merged ranks need not be a group
            activation_bits=self.files.config.get(ACTIVATION_BITS, 16),
        )
        kind = QuantizedGroupedLinear if codes.dim() == 3 else QuantizedLinear
        return kind.of(codes, scale, bias, how)


def is_linear(name: str) -> bool:
    """Whether our parameter is a weight that quantized checkpoints store as codes."""
    return name.startswith("blocks.") and name.endswith(tuple(f"{n}.weight" for n in QUANTIZED))


def open_checkpoint(path: str | Path, config: ModelConfig | None = None) -> Checkpoint:
    """Opens a checkpoint: finds its files, layout and config and checks that names, shapes and
    dtypes fit. Reads no values.

    config: used instead of config.json (the original GLM and GLM-130B have none); its `tied_head`
    becomes False if a head is stored. Raises CheckpointError with everything that does not fit."""
    files = scan(path)
    keys = set().union(*files.ranks)
    if files.config.get("model_type") == "glm_moe_dsa":
        raise CheckpointError(
            f"{path}: is a glm_moe_dsa (GLM-5), whose attention chooses its keys by an indexer; "
            "that is not implemented: use a model up to GLM-4.7"
        )
    detected = detect(keys)
    if detected is None and any(ADAPTER.search(key) for key in keys):
        raise CheckpointError(
            f"{path}: it holds adapters without their base; give the base, and this as --adapter "
            "(glm-core checkpoint convert BASE OUT --merge ADAPTER adds a LoRA to its base)"
        )
    if detected is None:
        known = ", ".join(f"{item.name} ({item.about})" for item in LAYOUTS)
        raise CheckpointError(
            f"{path}: holds no GLM: none of its {len(keys)} tensors ({some(sorted(keys), 3)}) "
            f"belongs to a known layout; known: {known}"
        )
    layout, prefix = detected
    if config is None:
        if files.config_file is None:
            raise CheckpointError(
                f"{path}: layout {layout.name}, but no config.json or model_config.json is beside "
                "it; put one there or name a preset"
            )
        config = read_config(layout, files.config, files.config_file)
    stored_head = "head" in layout.names and prefix + layout.names["head"] in keys
    if config.tied_head and stored_head and prefix + layout.names["embedding"] not in keys:
        layout, stored_head = _embedding_is_head(layout), False
    _require_plausible(config, layout, len(keys), path)
    config = dataclasses.replace(
        config,
        tied_head=config.tied_head and not stored_head,
        num_mtp_layers=_num_mtp_layers(config, layout, prefix, keys),
    )
    require_divides(config, len(files.ranks), str(path))
    shapes = _shapes(config, path)
    bits = _bits(layout, prefix, files, config, shapes)
    checkpoint = Checkpoint(files, layout, prefix, config, shapes, bits)
    if problems := list(_mismatches(checkpoint)):
        raise CheckpointError(
            f"{path}: does not fit layout {layout.name} with {config.num_layers} layers of width "
            f"{config.hidden}: {'; '.join(problems)}; check that config and files belong together "
            "and are complete"
        )
    return checkpoint


def _num_mtp_layers(config: ModelConfig, layout: Layout, prefix: str, keys: set[str]) -> int:
    """Returns the stored layers of multi-token prediction: all that the config names, or none, as
    in folders that transformers has written."""
    layers = range(config.num_layers, config.num_layers + config.num_mtp_layers)
    needed = (
        layout.keys(f"blocks.{i}.{n}.weight", config)
        for i in layers
        for n in ("join", "input_norm")
    )
    stored = any(prefix + key in keys for names in needed for key in names)
    return config.num_mtp_layers if stored else 0


def _embedding_is_head(layout: Layout) -> Layout:
    """Returns the layout of a tied model whose one matrix is stored under the head's name."""
    others = {ours: theirs for ours, theirs in layout.names.items() if ours != "head"}
    return dataclasses.replace(layout, names={**others, "embedding": layout.names["head"]})


def _require_plausible(
    config: ModelConfig, layout: Layout, num_keys: int, path: str | Path
) -> None:
    """Refuses numbers of layers or experts that no files of this many tensors hold."""
    numbers = {
        "layers": config.num_layers,
        "layers of multi-token prediction": config.num_mtp_layers,
    }
    if any("{e}" in theirs for theirs in layout.names.values()):
        numbers["experts"] = config.num_experts
    for what, number in numbers.items():
        if number > num_keys:
            raise CheckpointError(
                f"{path}: config says {number} {what}, but the files hold only {num_keys} tensors; "
                "check that they belong together and are complete"
            )


def _shapes(config: ModelConfig, path: str | Path) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every parameter. Refuses sizes that no machine has."""
    try:
        with torch.device("meta"):
            model = GLM(config)
    except (RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path}: config describes an impossible model: {error}") from None
    return {n: tuple(p.shape) for n, p in model.named_parameters()}


def _bits(
    layout: Layout,
    prefix: str,
    files: CheckpointFiles,
    config: ModelConfig,
    shapes: dict[str, tuple[int, ...]],
) -> int | None:
    """Returns 8 or 4 if the linears' weights are stored with scales, else None."""
    # a product of every model, whose columns ranks do not cut
    name = f"blocks.0.attention.{'kv_a' if config.kv_latent else 'qkv'}.weight"
    key = layout.keys(name, config)[0]
    table = files.ranks[0]
    if not layout.quantized or prefix + key + SCALE not in table or prefix + key not in table:
        return None
    columns = shapes[name][1]
    return 4 if table[prefix + key].shape[-1:] == (columns // 2,) else 8


def _mismatches(c: Checkpoint) -> Iterator[str]:
    """Reports what is missing, unexpected or of another shape or dtype, over all ranks."""
    missing, wrong, unexpected = [], [], []
    for rank, table in enumerate(c.files.ranks):
        expected = {
            key: value for name in c.shapes for key, value in _expected(c, name, rank).items()
        }
        where = f" on rank {rank}" if c.num_ranks > 1 else ""
        missing += [key + where for key in expected if key not in table]
        for key, stored in table.items():
            shape, kind = expected.get(key, (None, ""))
            if shape is None:
                if not is_ignored(c, key) and not is_training_state(c, key):
                    unexpected.append(f"{key} in {stored.file.name}")
            elif stored.shape != shape:
                wrong.append(
                    f"{key} in {stored.file.name} is {list(stored.shape)}, expected {list(shape)}"
                )
            elif (stored.dtype == torch.int8) != (kind == "int8") or not (
                stored.dtype.is_floating_point or kind == "int8"
            ):
                wrong.append(f"{key} in {stored.file.name} is {stored.dtype}, expected {kind}")
    for problem, keys in (("missing", missing), ("of another kind", wrong)):
        if keys:
            yield f"{len(keys)} {problem} ({some(keys)})"
    if unexpected:
        yield f"{len(unexpected)} unexpected ({some(unexpected)}{_other_layouts(c, unexpected)})"


def _expected(c: Checkpoint, name: str, rank: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns the keys that a rank must hold for a parameter, with their shapes and dtypes in
    words."""
    if c.in_parts(name):
        pairs = zip(heads.part_names(name), heads.part_shapes(c.config), strict=True)
        return {k: v for n, shape in pairs for k, v in _codes(c, c.prefix + n, shape, rank).items()}
    whole = shard_shape(name, c.shapes[name], c.config, c.num_ranks)
    parts = c.layout.parts(name, whole, c.config)
    if not c.quantized(name):
        return {c.prefix + key: (shape, "floating point") for key, shape in parts.items()}
    [key] = [c.prefix + key for key in parts]
    return _codes(c, key, whole, rank)


def _codes(
    c: Checkpoint, key: str, shape: tuple[int, ...], rank: int
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns the same for the codes of a matrix of this shape, and their scales."""
    *rows, columns = shape
    packed = (*rows, columns * (c.bits or 8) // 8)
    # glm-core stores the scales of groups, and of merged ranks, several for each row
    scales = c.files.ranks[rank].get(key + SCALE)
    grouped = c.layout.name == "glm-core" and scales is not None
    of_scales = scales.shape if grouped and scales and list(scales.shape[:-1]) == rows else rows
    return {key: (packed, "int8"), key + SCALE: (tuple(of_scales), "floating point")}


def is_ignored(c: Checkpoint, key: str) -> bool:
    """Whether a key holds no learned value, and is written again all the same."""
    return re.fullmatch(c.layout.ignored, key) is not None


def is_training_state(c: Checkpoint, key: str) -> bool:
    """Whether only a resumed run needs what a key holds; it is never written elsewhere."""
    return re.fullmatch(c.layout.training_state, key) is not None


def _other_layouts(c: Checkpoint, unexpected: list[str]) -> str:
    """Names the other layouts that unexpected keys belong to."""
    keys = {text.split(" in ")[0].removeprefix(c.prefix) for text in unexpected}
    own = recognised(c.layout, "", keys)
    names = [item.name for item in LAYOUTS if recognised(item, "", keys - own)]
    return (
        f"; these belong to layout {' or '.join(names)}: two checkpoints are mixed" if names else ""
    )
