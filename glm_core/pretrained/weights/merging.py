"""Adds a LoRA to the weights of a checkpoint while they are read, one matrix at a time."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from glm_core.errors import CheckpointError
from glm_core.model.adapters import AdapterConfig
from glm_core.pretrained.weights.reading import Checkpoint
from glm_core.pretrained.weights.sharding import cut


@dataclasses.dataclass(frozen=True)
class MergedCheckpoint(Checkpoint):
    """A checkpoint whose floating-point weights have the products of a LoRA added to them."""

    adapter: AdapterConfig
    state: dict[str, Tensor]
    """the adapter's tensors by our names"""

    def dense(self, name: str, rank: int = 0, size: int = 1) -> Tensor:
        """Returns a part of a parameter in floating point; a sum is formed and returned in
        float32, so that whoever stores it rounds it once."""
        weight = super().dense(name, rank, size)
        a = self.state.get(name.removesuffix("weight") + "lora_a")
        if a is None:
            return weight
        b = self.state[name.removesuffix("weight") + "lora_b"]
        product = self.adapter.alpha / self.adapter.rank * (b.float() @ a.float())
        part = cut(name, product, self.config, rank, size, 1, scale=False)
        return weight.float() + part


def merged(
    source: Checkpoint, config: AdapterConfig, state: dict[str, Tensor], *, dequantize: bool
) -> MergedCheckpoint:
    """Returns the checkpoint with a LoRA added. dequantize: whether its int8 and int4 codes will
    become floating point. Raises CheckpointError for a prefix, and for codes that stay."""
    path = source.files.path
    if config.kind != "lora":
        raise CheckpointError(
            f"{path}: a prefix is part of no weight, so it cannot be merged; give it as --adapter"
        )
    if source.bits is not None and not dequantize:
        raise CheckpointError(
            f"{path}: holds int{source.bits} codes, to which nothing can be added; add "
            "--dequantize (and --bits to quantize the sum again)"
        )
    fields = {f.name: getattr(source, f.name) for f in dataclasses.fields(Checkpoint)}
    return MergedCheckpoint(**fields, adapter=config, state=state)
