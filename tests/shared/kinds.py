"""Offers a small model of each kind of the family, a tokenizer of letters, and prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glm_core.config import ModelConfig
from glm_core.model.glm import GLM
from glm_core.model.prompt import Prompt, blank, causal, encode, part_a
from glm_core.model.sample import Sampling

V, LENGTH = 61, 48
GREEDY = Sampling(max_tokens=12, temperature=0)
KINDS: dict[str, dict[str, Any]] = {
    "glm": {"placement": "pre", "activation": "gelu", "positions": "learned_2d"},
    "glm-130b": {"qk_layer_scaling": True},
    "chatglm-6b": {"activation": "gelu", "positions": "rope_2d", "qk_layer_scaling": True},
    "glm-4": {
        "placement": "pre",
        "norm": "rms",
        "activation": "swiglu",
        "rope_fraction": 0.5,
        "rope_interleaved": True,
        "num_kv_heads": 2,
        "linear_bias": False,
        "tied_head": False,
    },
}


class Letters:
    """A tokenizer of single letters, with GLM's special tokens."""

    mask, gmask, smask, eos, eop, sop, vocab = 1, 2, 3, 4, 5, 6, V

    def encode(self, text: str) -> list[int]:
        return [10 + ord(c) - ord("a") for c in text]

    def decode(self, ids: Any) -> str:
        return "".join(chr(ord("a") + i - 10) for i in ids)


PIECES = Letters()


def model(kind: str, **changes: Any) -> GLM:
    """Returns a model with random weights whose logits differ enough to make every choice clear."""
    sizes = {"num_layers": 2, "hidden": 32, "num_heads": 4, "ffn": 48, "vocab": V}
    config = ModelConfig(**{**sizes, "max_length": LENGTH, **KINDS[kind], **changes})
    built, g = GLM(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in built.named_parameters():
            std = 0.05 if p.ndim == 1 else 1.5 * p.shape[1] ** -0.5
            p.copy_(torch.randn(p.shape, generator=g) * std + name.endswith("norm.weight"))
    return built


def prompts(kind: str) -> list[Prompt]:
    """Returns prompts of several lengths, with blanks if the kind has them."""
    texts = ["ab[MASK]cde", "q[gMASK]", "hello[sMASK]", "somewhatlonger[MASK]textagain"]
    if kind == "glm-4":
        return [causal(PIECES.encode(t.replace("[", "").lower().replace("]", ""))) for t in texts]
    positions = KINDS[kind].get("positions", "rope")
    return [blank(part_a(encode(t, PIECES), PIECES), PIECES, positions) for t in texts]


def whole(built: GLM, prompt: Prompt, tokens: list[int]) -> Tensor:
    """Returns the logits after prompt and tokens, computed by one call without a cache."""
    ids = [*prompt.tokens, *tokens]
    places = range(len(ids))
    end = [min(prompt.key_end(i), len(ids)) for i in places]
    with torch.no_grad():
        return built.logits(
            torch.tensor([ids]),
            torch.tensor([[prompt.position(i) for i in places]]).transpose(1, 2),
            torch.zeros(1, len(ids), dtype=torch.int32),
            torch.tensor([end], dtype=torch.int32),
        )[0, -1]
