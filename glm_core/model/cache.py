"""Holds the keys and values of generated sequences in static memory, one slot per sequence.

Shapes: B rows of a call, L tokens of a row, S tokens that a slot holds, K kv heads, E head dim, Q
tensors of a layer: keys and values, or the latents of latent attention (K = 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from glm_core.config import ModelConfig


class Cache:
    """Keys and values, or latents, of `slots` sequences of at most `length` tokens, allocated once.
    Storage is [slots, K, S, E], so that a head's keys are contiguous; attention sees transposed
    views."""

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        length: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        further: int = 0,
    ) -> None:
        """further: layers of multi-token prediction that keep keys and values too."""
        self.slots, self.length = slots, length
        c = config
        shape = (c.num_layers + further, c.cache_parts, slots, c.key_heads, length, c.key_dim)
        # zeros: a reference multiplies what it hides by 0, which leaves a NaN a NaN
        self.memory = torch.zeros(shape, dtype=dtype, device=device)
        """[layers, Q, slots, K, S, E]: keys, then values"""

    @property
    def num_bytes(self) -> int:
        """Returns the bytes of the whole cache, which never grows."""
        return self.memory.numel() * self.memory.element_size()

    def window(self, first: int, places: Tensor, shared: bool = False) -> Window:
        """Returns the cache as one call sees it: row b uses slot `first` + b, and its tokens go to
        `places` [B, L]. shared: all rows use slot `first`, at places of their own."""
        slots = 1 if shared else len(places)
        return Window(self.memory[:, :, first : first + slots], places)

    def copy(self, sources: list[int], targets: list[int], length: int) -> None:
        """Copies the first `length` tokens of the slots `sources` into the slots `targets`, all at
        once."""
        self.memory[:, :, targets, :, :length] = self.memory[:, :, sources, :, :length]


class Window:
    """A cache as one call of the model sees it."""

    def __init__(self, memory: Tensor, places: Tensor) -> None:
        """memory [layers, Q, B, K, S, E] with a slot for each row of places [B, L], or with one
        slot for all of them: then a row sees what the others write in the same call."""
        self._memory, self._places = memory, places
        self._rows = torch.arange(len(places), device=places.device)[:, None]

    @property
    def num_keys(self) -> int:
        """S"""
        return self._memory.shape[4]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k, v [B, L, K, E] to the call's places and returns views [B, S, K, E] of all keys
        and values."""
        keys, values = self._memory[layer].transpose(2, 3)  # [B, S, K, E]
        return self._written(keys, k), self._written(values, v)

    def append_latent(self, layer: int, latent: Tensor) -> Tensor:
        """Does the same for latents [B, L, 1, E] -> [B, S, 1, E]."""
        return self._written(self._memory[layer, 0].transpose(1, 2), latent)  # [B, S, 1, E]

    def _written(self, kept: Tensor, new: Tensor) -> Tensor:
        """Writes new [B, L, K, E] into kept [slots, S, K, E] and returns what each row sees."""
        if len(kept) > 1:
            kept[self._rows, self._places] = new
            return kept
        # the same for one slot, in a fifth of the time of an index with two tensors
        kept[0].index_copy_(0, self._places.flatten(), new.flatten(0, 1))
        return kept.expand(len(self._places), -1, -1, -1)
