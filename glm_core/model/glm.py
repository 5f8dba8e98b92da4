"""The one model of the family: GLM, GLM-130B, ChatGLM, GLM-4 and GLM-4-0414, told apart by
ModelConfig alone.

Shapes: B batch, L sequence, D width, H heads, K kv heads, E head dim, F ffn width, V vocabulary,
G position rows that are rotated, P pairs of rotated dimensions per row.

Between blocks two tensors travel: `delta`, the last branch's output, and `residual`. Their sum
delta + alpha * residual is the residual stream x of the papers (alpha = 1 except DeepNorm); the
next norm forms it in one fused op."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from glm_core import ops
from glm_core.config import ModelConfig
from glm_core.errors import ShapeError
from glm_core.model.cache import Window
from glm_core.model.rotary import rotary_angles

LINEARS = ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
"""the linear layers of a block, by name below it: GLM-130B and ChatGLM-6B quantise these, and
adapters sit on them"""


class Linear(nn.Module):
    """y = x weight^T + bias through the op `linear`;  weight [F, D]."""

    def __init__(self, dim_in: int, dim_out: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim_out, dim_in))
        self.bias = nn.Parameter(torch.empty(dim_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class Norm(nn.Module):
    """RMS or layer norm, alone or of `delta + alpha * residual`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.empty(config.hidden))
        self.bias = nn.Parameter(torch.empty(config.hidden)) if config.norm == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return ops.rms_norm(x, self.weight, self.eps)
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, delta: Tensor | None, residual: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        """Returns (norm(s), s) with s = delta + alpha * residual, or s = residual where there is no
        delta yet."""
        if delta is None:
            return self(residual), residual
        if self.bias is None:
            return ops.add_rms_norm(delta, residual, self.weight, self.eps, alpha)
        return ops.add_layer_norm(delta, residual, self.weight, self.bias, self.eps, alpha)


class Attention(nn.Module):
    """Fused QKV projection (rows: all q heads, then k, then v), rotation, attention, output
    projection."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        heads = config.num_heads + 2 * config.num_kv_heads
        self.qkv = Linear(config.hidden, heads * config.head_dim, config.qkv_bias)
        self.out = Linear(config.num_heads * config.head_dim, config.hidden, config.linear_bias)
        self.core: Callable[..., Tensor] = ops.attention

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        key_start: Tensor,
        key_end: Tensor,
        cache: Window | None = None,
    ) -> Tensor:
        c = self.config
        qkv = self.qkv(x).unflatten(-1, (-1, c.head_dim))  # [B, L, H + 2K, E]
        qk, v = qkv.split_with_sizes(
            (c.num_heads + c.num_kv_heads, c.num_kv_heads), 2
        )  # [B, L, H + K, E], [B, L, K, E]
        if rotary is not None:
            qk = ops.rope(qk, *rotary, c.rope_interleaved)
        q, k = qk.split_with_sizes((c.num_heads, c.num_kv_heads), 2)  # [B, L, H | K, E]
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        layer_scale = float(self.layer + 1) if c.qk_layer_scaling else 1.0
        y = self.core(
            q, k, v, key_start, key_end, c.head_dim**-0.5, layer_scale, c.pb_relax
        )  # [B, L, H, E]
        return self.out(y.flatten(2))  # [B, L, H * E] -> [B, L, D]


class MLP(nn.Module):
    """Projection up (both halves fused for the gated kinds), activation, projection down."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = {"gelu": ops.gelu, "geglu": ops.geglu, "swiglu": ops.swiglu}[
            config.activation
        ]
        width = config.ffn * (1 if config.activation == "gelu" else 2)
        self.up = Linear(config.hidden, width, config.linear_bias)
        self.down = Linear(config.ffn, config.hidden, config.linear_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


def residual_scale(config: ModelConfig) -> float:
    """Returns DeepNorm's alpha = (2N)^(1/2), where N is the TOTAL number of layers, whatever part
    of them a pipeline stage holds (Wang et al. 2022, fig. 2); 1 for the other placements."""
    return math.sqrt(2 * config.num_layers) if config.placement == "deepnorm" else 1.0


class Block(nn.Module):
    """One layer. DeepNorm keeps the norm's OUTPUT as residual (u and w in the spec), the others
    its input."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.deepnorm = config.placement == "deepnorm"
        self.alpha = residual_scale(config)
        self.input_norm = Norm(config)
        self.attention = Attention(config, layer)
        self.mlp_norm = Norm(config)
        self.mlp = MLP(config)
        sandwich = config.placement == "sandwich"
        self.post_attention_norm = Norm(config) if sandwich else None
        self.post_mlp_norm = Norm(config) if sandwich else None

    def forward(
        self,
        delta: Tensor | None,
        residual: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        key_start: Tensor,
        key_end: Tensor,
        cache: Window | None = None,
    ) -> tuple[Tensor, Tensor]:
        normed, total = self.input_norm.add(delta, residual, self.alpha)
        delta = self.attention(normed, rotary, key_start, key_end, cache)
        if self.post_attention_norm is not None:
            delta = self.post_attention_norm(delta)
        residual = normed if self.deepnorm else total
        normed, total = self.mlp_norm.add(delta, residual, self.alpha)
        delta = self.mlp(normed)
        if self.post_mlp_norm is not None:
            delta = self.post_mlp_norm(delta)
        return delta, normed if self.deepnorm else total


def normal_draw(seed: int, name: str, shape: torch.Size) -> Tensor:
    """Returns standard normal values, float64, from a CPU generator of the parameter's own."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    # float64: torch's float32 draws differ between instruction sets
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def initial_value(config: ModelConfig, seed: int, name: str, shape: torch.Size) -> Tensor:
    """Returns a parameter's starting values, float64, as described at GLM.init_weights. They are a
    function of the arguments alone, whatever holds the parameter."""
    if len(shape) == 1:
        return torch.full(shape, 1.0 if name.endswith("norm.weight") else 0.0, dtype=torch.float64)
    gain = torch.ones(shape[0], 1)
    small = 1 / math.sqrt(2 * config.num_layers)
    if name.endswith(("out.weight", "down.weight")) or (
        name.endswith("up.weight") and config.placement == "deepnorm"
    ):
        gain.fill_(small)
    elif name.endswith("qkv.weight") and config.placement == "deepnorm":
        gain[-config.num_kv_heads * config.head_dim :] = small
    return normal_draw(seed, name, shape) * config.init_std * gain.double()


Stream = tuple[Tensor, Tensor]
"""delta and residual [B, L, D], as they travel between blocks"""


class GLM(nn.Module):
    """Tokens to hidden states, logits or loss. Parameters are uninitialised until `init_weights`
    or a load. A subclass may hold a part of the layers: `forward` skips what is absent."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        c = config
        self.embedding = nn.Parameter(torch.empty(c.vocab, c.hidden))
        learned = c.positions == "learned_2d"
        self.position_embedding = (
            nn.Parameter(torch.empty(c.max_length + 1, c.hidden)) if learned else None
        )
        self.block_embedding = (
            nn.Parameter(torch.empty(c.max_length + 1, c.hidden)) if learned else None
        )
        self.blocks = nn.ModuleList(Block(c, i) for i in range(c.num_layers))
        self.final_norm: Norm | None = Norm(c)
        self.head = None if c.tied_head else nn.Parameter(torch.empty(c.vocab, c.hidden))
        self.head_codes: nn.Module | None = None  # set by quantize.quantize_head

    def forward(
        self,
        tokens: Tensor | Stream,
        positions: Tensor,
        key_start: Tensor,
        key_end: Tensor,
        cache: Window | None = None,
    ) -> Tensor | Stream:
        """Returns hidden states after the final norm;  tokens [B, L] int64, positions [B, 2, L]
        int64 (row 1 is ignored by 1D rotary models), key_start, key_end [B, L] int32 (the mask, see
        ops.attention) -> [B, L, D]. With a cache the call's keys and values are kept in it, and the
        mask counts keys by their places there.

        A part that does not begin with the embedding takes delta and residual in place of tokens;
        one without the final norm returns them."""
        if positions.shape[-1] > self.config.max_length:
            raise ShapeError(
                f"sequence of {positions.shape[-1]} tokens: longer than "
                f"max_length={self.config.max_length}; shorten it or raise max_length"
            )
        delta: Tensor | None
        if isinstance(tokens, tuple):
            delta, x = tokens
        else:  # a tensor, or the symbolic value of an export
            delta, x = None, self.add_positions(self.embed(tokens), positions)
        learned = self.config.positions == "learned_2d"
        rotary = None if learned else self.rotary(positions)
        for layer in self.layers():
            delta, x = layer(delta, x, rotary, key_start, key_end, cache)
        assert delta is not None  # no part is without layers
        if self.final_norm is None:
            return delta, x
        return self.final_norm.add(delta, x, residual_scale(self.config))[0]

    def embed(self, tokens: Tensor) -> Tensor:
        """Returns token embeddings, with gradient shrink;  tokens [B, L] -> [B, L, D]."""
        x: Tensor = ops.embedding(tokens, self.embedding, self.config.embedding_gradient_shrink)
        return x

    def add_positions(self, x: Tensor, positions: Tensor) -> Tensor:
        """Adds the rows of both learned position tables, where the model has them;  x [B, L, D],
        positions [B, 2, L] -> [B, L, D]."""
        for row, table in enumerate((self.position_embedding, self.block_embedding)):
            if table is not None:
                x = x + ops.embedding(positions[:, row], table)  # [B, L, D]
        return x

    def layers(self) -> Iterable[Callable[..., Stream]]:
        """Returns what is called for each block that is held, in order, with Block.forward's
        arguments."""
        return self.blocks

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Returns cos and sin of this model's rotation."""
        return rotary_angles(self.config, positions)

    def logits(
        self, tokens: Tensor, positions: Tensor, key_start: Tensor, key_end: Tensor
    ) -> Tensor:
        """Returns logits [B, L, V] in the working dtype."""
        return self.project(self(tokens, positions, key_start, key_end))

    def project(self, hidden: Tensor) -> Tensor:
        """Returns logits [..., V] of hidden states [..., D], by the head or its quantised copy if
        there is one."""
        if self.head_codes is not None:
            quantised: Tensor = self.head_codes(hidden)
            return quantised
        whole: Tensor = ops.linear(hidden, self.head_weight)
        return whole

    def loss(
        self,
        tokens: Tensor,
        positions: Tensor,
        key_start: Tensor,
        key_end: Tensor,
        labels: Tensor,
        token_weight: Tensor,
    ) -> Tensor:
        """Returns sum(token_weight * cross-entropy), a float32 scalar. labels and token_weight are
        [B, L] and pre-aligned: labels[b, i] is what position i predicts. Divide the weights by
        their sum over the global batch to get GLM's loss (pretrain_glm.py: sum(CE * mask) /
        sum(mask))."""
        hidden = self(tokens, positions, key_start, key_end)
        return self.cross_entropy(hidden, labels, token_weight)

    def cross_entropy(self, hidden: Tensor, labels: Tensor, token_weight: Tensor) -> Tensor:
        """Returns the loss of hidden states [B, L, D]; labels and weights as for `loss`."""
        return ops.linear_cross_entropy(
            hidden.flatten(0, 1),  # [B * L, D]
            self.head_weight,
            labels.flatten(),  # [B * L]
            token_weight.flatten(),  # [B * L]
        )

    @property
    def head_weight(self) -> Tensor:
        """Returns the output projection [V, D]: the embedding itself where it is tied."""
        return self.embedding if self.head is None else self.head

    def num_parameters(self) -> int:
        """Returns the number of parameters; tied weights count once."""
        return sum(p.numel() for p in self.parameters())

    @torch.no_grad()
    def init_weights(self, seed: int) -> GLM:
        """Fills every parameter: norms 1 and 0, biases 0, matrices normal with `init_std`, scaled
        by (2N)^(-1/2) in the residual branches (GLM: output projections; DeepNorm, Wang et al.
        2022 fig. 2: value and output projections and both feed-forward matrices). Each parameter
        draws from its own CPU generator seeded by (seed, name), so the values depend on no order,
        device or partition."""
        for name, p in self.named_parameters():
            p.copy_(initial_value(self.config, seed, name, p.shape))
        return self
