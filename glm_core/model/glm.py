"""The one model of the family: GLM, GLM-130B, ChatGLM, GLM-4, GLM-4-0414, and GLM-4.5 to GLM-4.7
with experts and latent attention, told apart by ModelConfig alone. GLM-5's sparse attention
(`glm_moe_dsa`) would be a third attention beside `Attention` and `LatentAttention`.

Shapes: B batch, L sequence, D width, H heads, K kv heads, E head dim, F ffn width, V vocabulary,
G position rows that are rotated, P pairs of rotated dimensions per row. Sparse layers: N tokens of
the batch, X experts, T experts of a token. Latent attention: C width of the keys' and values'
latent, R rotated dimensions of a head, U value head dim, S keys.

Between blocks two tensors travel: `delta`, the last branch's output, and `residual`. Their sum
delta + alpha * residual is the residual stream x of the papers (alpha = 1 except DeepNorm); the
next norm forms it in one fused op."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import islice

import torch
from torch import Tensor, nn

from glm_core import dispatch, ops
from glm_core.config import ModelConfig
from glm_core.errors import ConfigError, ShapeError
from glm_core.model.balance import sequence_balance
from glm_core.model.cache import Window
from glm_core.model.initial import initial_value
from glm_core.model.rotary import rotary_angles
from glm_core.ops.precision import wide

LINEARS = ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
"""the linear layers of a dense block, by name below it: GLM-130B and ChatGLM-6B quantise these, and
adapters sit on them"""
QUANTIZED = (
    *LINEARS,
    *("attention.q", "attention.q_a", "attention.q_b", "attention.kv_a"),
    *("mlp.shared.up", "mlp.shared.down", "mlp.experts_up", "mlp.experts_down"),
)
"""the linear layers of any block that quantisation makes codes of; `attention.kv_b` in two parts
(`quantize.QuantizedHeads`). A router is float32"""
LATENT_EPS = 1e-6
"""of the norms of both latents, whatever `norm_eps` is (transformers, Glm4MoeLiteAttention)"""
Rotary = tuple[Tensor, Tensor]
"""cos and sin [B, L, G, P]"""


class Linear(nn.Module):
    """y = x weight^T + bias through the op `linear`;  weight [F, D]."""

    def __init__(self, dim_in: int, dim_out: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim_out, dim_in))
        self.bias = nn.Parameter(torch.empty(dim_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class Norm(nn.Module):
    """RMS or layer norm over the last dimension, alone or of `delta + alpha * residual`."""

    def __init__(self, config: ModelConfig, width: int = 0, eps: float = 0.0) -> None:
        """width and eps: of another norm than that of the hidden state."""
        super().__init__()
        width = width or config.hidden
        self.eps = eps or config.norm_eps
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if config.norm == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        return self.add(None, x, 1.0)[0]

    def add(self, delta: Tensor | None, residual: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        """Returns (norm(s), s) with s = delta + alpha * residual, or s = residual where there is no
        delta yet."""
        return normed(delta, residual, alpha, self.weight, self.bias, self.eps)


def normed(
    delta: Tensor | None,
    residual: Tensor,
    alpha: float,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Returns what `Norm.add` does, by an RMS norm where there is no bias."""
    if delta is None:
        if bias is None:
            return ops.rms_norm(residual, weight, eps), residual
        return ops.layer_norm(residual, weight, bias, eps), residual
    if bias is None:
        return ops.add_rms_norm(delta, residual, weight, eps, alpha)
    return ops.add_layer_norm(delta, residual, weight, bias, eps, alpha)


class Attention(nn.Module):
    """Fused QKV projection (rows: all q heads, then k, then v), norms of the heads where the model
    has them, rotation, attention, output projection."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        heads = config.num_heads + 2 * config.num_kv_heads
        self.qkv = Linear(config.hidden, heads * config.head_dim, config.qkv_bias)
        self.q_norm = Norm(config, config.head_dim) if config.qk_norm else None
        self.k_norm = Norm(config, config.head_dim) if config.qk_norm else None
        self.out = Linear(config.num_heads * config.head_dim, config.hidden, config.linear_bias)
        self.core: Callable[..., Tensor] = ops.attention

    def forward(
        self,
        x: Tensor,
        rotary: Rotary | None,
        key_start: Tensor,
        key_end: Tensor,
        cache: Window | None = None,
    ) -> Tensor:
        c = self.config
        qkv = self.qkv(x).unflatten(-1, (-1, c.head_dim))  # [B, L, H + 2K, E]
        qk, v = qkv.split_with_sizes(
            (c.num_heads + c.num_kv_heads, c.num_kv_heads), 2
        )  # [B, L, H + K, E], [B, L, K, E]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split_with_sizes((c.num_heads, c.num_kv_heads), 2)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), 2)  # [B, L, H + K, E]
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


def head_matrices(weight: Tensor, widths: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Returns each head's matrices, of widths E - R and U, in a weight [H (E - R + U), C]."""
    keys, values = weight.unflatten(0, (-1, sum(widths))).split_with_sizes(widths, 1)
    return keys, values


class HeadsLinear(Linear):
    """Maps latents to the keys and values of all heads, by weight [H (E - R + U), C]; or applies
    the same matrices to queries and results, which spares making keys and values."""

    def __init__(self, config: ModelConfig) -> None:
        c = config
        self.widths = (c.head_dim - c.rope_head_dim, c.value_head_dim)
        super().__init__(c.kv_latent, c.num_heads * sum(self.widths), False)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Returns each head's matrix of keys [H, E - R, C] and of values [H, U, C]."""
        return head_matrices(self.weight, self.widths)

    def to_latent(self, q: Tensor) -> Tensor:
        """Maps queries [B, L, H, E - R] to [B, L, H, C], whose products with latents are those of
        the queries with the keys."""
        return torch.einsum("blhe,hec->blhc", q, self.matrices()[0])

    def from_latent(self, y: Tensor) -> Tensor:
        """Maps weighted sums of latents [B, L, H, C] to those of the values [B, L, H, U]."""
        return torch.einsum("blhc,huc->blhu", y, self.matrices()[1])


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-AI 2024, DeepSeek-V2, section 2.1). Keys and values of
    all heads are made from one latent of C numbers a token, and one rotated key part of R.

    Without a cache they are made for every head. A cache holds only latent and rotated part, C + R
    numbers a token. Then the product that makes the keys is applied to the query instead, and the
    one that makes the values to the result: all heads share one key head of C + R, and its first C
    numbers are the value. An exact session makes keys and values of all that the cache holds, in
    every call: that is the order of training, and dear."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        c, bias = config, config.qkv_bias
        self.plain = c.head_dim - c.rope_head_dim  # dimensions of a head that are not rotated
        self.scale = c.head_dim**-0.5 * c.rope_score_factor
        heads = c.num_heads * c.head_dim
        if c.q_latent:
            self.q_a = Linear(c.hidden, c.q_latent, bias)
            self.q_a_norm = Norm(c, c.q_latent, LATENT_EPS)
            self.q_b = Linear(c.q_latent, heads, False)
        else:
            self.q = Linear(c.hidden, heads, False)
        self.kv_a = Linear(c.hidden, c.kv_latent + c.rope_head_dim, bias)
        self.kv_a_norm = Norm(c, c.kv_latent, LATENT_EPS)
        self.kv_b = HeadsLinear(c)
        self.out = Linear(c.num_heads * c.value_head_dim, c.hidden, bias)
        self.core: Callable[..., Tensor] = ops.attention

    def forward(
        self,
        x: Tensor,
        rotary: Rotary | None,
        key_start: Tensor,
        key_end: Tensor,
        cache: Window | None = None,
    ) -> Tensor:
        c = self.config
        assert rotary is not None  # ModelConfig: latent attention has rotary positions
        q = self.q_b(self.q_a_norm(self.q_a(x))) if c.q_latent else self.q(x)
        q = q.unflatten(-1, (c.num_heads, c.head_dim))  # [B, L, H, E]
        latent, key = self.kv_a(x).split_with_sizes((c.kv_latent, c.rope_head_dim), -1)
        latent = self.kv_a_norm(latent.contiguous())  # [B, L, C]
        q_plain, q_turned = q.split_with_sizes((self.plain, c.rope_head_dim), -1)
        turned = torch.cat((q_turned, key.unsqueeze(2)), 2)  # [B, L, H + 1, R]
        turned = ops.rope(turned, *rotary, c.rope_interleaved)
        q_turned, key = turned.split_with_sizes((c.num_heads, 1), 2)
        if cache is not None:
            own = torch.cat((latent.unsqueeze(2), key), -1)  # [B, L, 1, C + R]
            seen = cache.append_latent(self.layer, own)  # [B, S, 1, C + R]
            if not dispatch.session().exact:
                y = self._absorbed(q_plain, q_turned, seen, key_start, key_end)
                return self.out(y.flatten(2))  # [B, L, H * U] -> [B, L, D]
            seen = seen[:, : max(1, int(key_end.max()))]
            latent, key = seen[:, :, 0, : c.kv_latent].contiguous(), seen[..., c.kv_latent :]
        y = self._expanded(q_plain, q_turned, latent, key, key_start, key_end)  # [B, L, H, U]
        return self.out(y.flatten(2))  # [B, L, H * U] -> [B, L, D]

    def _expanded(
        self,
        q_plain: Tensor,
        q_turned: Tensor,
        latent: Tensor,
        key: Tensor,
        key_start: Tensor,
        key_end: Tensor,
    ) -> Tensor:
        """Returns every head's result [B, L, H, U], with keys and values made for every head."""
        kv = self.kv_b(latent).unflatten(-1, (self.config.num_heads, -1))  # [B, L, H, E - R + U]
        k, v = kv.split_with_sizes((self.plain, self.config.value_head_dim), -1)
        k = torch.cat((k, key.expand(-1, -1, k.shape[2], -1)), -1)  # [B, L, H, E]
        q = torch.cat((q_plain, q_turned), -1)  # [B, L, H, E]
        return self._attend(q, k, v, key_start, key_end)

    def _absorbed(
        self, q_plain: Tensor, q_turned: Tensor, k: Tensor, key_start: Tensor, key_end: Tensor
    ) -> Tensor:
        """Returns the same from the latents and rotated parts k [B, S, 1, C + R] that the cache
        holds, without making keys or values."""
        q = torch.cat((self.kv_b.to_latent(q_plain), q_turned), -1)  # [B, L, H, C + R]
        v = k[..., : self.config.kv_latent]
        return self.kv_b.from_latent(self._attend(q, k, v, key_start, key_end))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, key_start: Tensor, key_end: Tensor
    ) -> Tensor:
        c = self.config
        layer_scale = float(self.layer + 1) if c.qk_layer_scaling else 1.0
        return self.core(q, k, v, key_start, key_end, self.scale, layer_scale, c.pb_relax)


class MLP(nn.Module):
    """Projection up (both halves fused for the gated kinds), activation, projection down."""

    def __init__(self, config: ModelConfig, ffn: int = 0) -> None:
        """ffn: another width than the config's."""
        super().__init__()
        ffn = ffn or config.ffn
        self.activation = activation(config)
        width = ffn * (1 if config.activation == "gelu" else 2)
        self.up = Linear(config.hidden, width, config.linear_bias)
        self.down = Linear(ffn, config.hidden, config.linear_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


def activation(config: ModelConfig) -> Callable[[Tensor], Tensor]:
    """Returns the op of the feed-forward part's activation."""
    return {"gelu": ops.gelu, "geglu": ops.geglu, "swiglu": ops.swiglu}[config.activation]


class Router(nn.Module):
    """Chooses the experts of a token, in float32 whatever the working dtype. `bias` corrects the
    choice only; no gradient reaches it, and it is float32 at least."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden))
        self.bias = nn.Parameter(torch.empty(config.num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the experts of each token, and their weights;  x [N, D] -> [N, T] int64, [N, T]
        float32."""
        c = self.config
        return ops.route(
            x,
            wide(self.weight),
            self.bias.detach(),  # torch cannot split a backward pass where a weight gets nothing
            c.experts_per_token,
            c.expert_groups,
            c.top_groups,
            c.expert_scale,
            c.normalize_experts,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Keeps the bias in float32 when the working dtype changes to a lower one."""
        bias = self.bias.data
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves _apply untyped
        if self.bias.dtype != torch.float64:
            self.bias.data = bias.to(self.bias.device)
        return self


class GroupedLinear(nn.Module):
    """Maps rows, sorted by expert, each by its expert's matrix, through the op `grouped_linear`;
    weight [X, F, D]."""

    def __init__(self, num_experts: int, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, dim_out, dim_in))

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        return ops.grouped_linear(rows, self.weight, counts)


class Experts(nn.Module):
    """The feed-forward part of a sparse layer: the experts that the router chooses for a token,
    weighted, and the shared ones."""

    balance: Tensor | None = None
    """the auxiliary loss of each sequence [B], until `GLM.balanced` takes it"""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config
        self.config = config
        self.activation = activation(c)
        self.router = Router(c)
        self.experts_up = GroupedLinear(c.num_experts, c.hidden, 2 * c.expert_ffn)
        self.experts_down = GroupedLinear(c.num_experts, c.expert_ffn, c.hidden)
        shared = c.num_shared_experts * c.expert_ffn
        self.shared = MLP(c, shared) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.routed(x)
        return y if self.shared is None else y + self.shared(x)

    def routed(self, x: Tensor) -> Tensor:
        """Returns the weighted sum of what the chosen experts make of each token;  [..., D]."""
        tokens = x.flatten(0, -2)  # [N, D]
        experts, weights = self.router(tokens)
        if self.config.balance_weight and self.training and torch.is_grad_enabled():
            by_sequence = experts.view(*x.shape[:-1], -1)  # [B, L, T]
            self.balance = sequence_balance(x, self.router.weight, by_sequence)
        rows, order, counts = ops.permute(tokens, experts, self.config.num_experts)  # [N * T, D]
        return ops.unpermute(self.of_rows(rows, counts), order, weights).view_as(x)

    def of_rows(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Returns what the experts make of rows that are sorted by expert;  rows [N * T, D], counts
        [X], the rows of each expert -> [N * T, D]."""
        return self.experts_down(self.activation(self.experts_up(rows, counts)), counts)


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
        attention = LatentAttention if config.kv_latent else Attention
        self.attention: Attention | LatentAttention = attention(config, layer)
        self.mlp_norm = Norm(config)
        sparse = config.num_experts and layer >= config.num_dense_layers
        self.mlp: MLP | Experts = Experts(config) if sparse else MLP(config)
        sandwich = config.placement == "sandwich"
        self.post_attention_norm = Norm(config) if sandwich else None
        self.post_mlp_norm = Norm(config) if sandwich else None

    def forward(
        self,
        delta: Tensor | None,
        residual: Tensor,
        rotary: Rotary | None,
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


class NextToken(Block):
    """A layer that predicts one token further ahead (multi-token prediction; DeepSeek-AI 2024,
    DeepSeek-V3, section 2.2). It stands behind the model's last layer, as in published folders."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.embedding_norm = Norm(config)
        self.hidden_norm = Norm(config)
        self.join = Linear(2 * config.hidden, config.hidden, False)
        self.final_norm = Norm(config)

    def forward(
        self,
        delta: Tensor | None,
        residual: Tensor,
        rotary: Rotary | None,
        key_start: Tensor,
        key_end: Tensor,
        cache: Window | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Takes the next tokens' embeddings as delta, and as residual the hidden states before
        them, and joins them in this order (transformers' MtpLayer). Returns the layer's own hidden
        states, after its norm and before it;  all [B, L, D]."""
        assert delta is not None
        x = self.join(torch.cat((self.embedding_norm(delta), self.hidden_norm(residual)), -1))
        delta, x = super().forward(None, x, rotary, key_start, key_end, cache)
        return self.final_norm.add(delta, x, self.alpha)


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
        further = range(c.num_layers, c.num_layers + c.num_mtp_layers)
        self.blocks = nn.ModuleList(
            [
                *(Block(c, i) for i in range(c.num_layers)),
                *(NextToken(c, i) for i in further),
            ]
        )
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
        return islice(self.blocks, self.config.num_layers)

    def further_layers(self) -> list[Callable[..., Stream]]:
        """Returns what is called for each layer of multi-token prediction that is held, with
        NextToken.forward's arguments."""
        return [block for block in self.blocks.children() if isinstance(block, NextToken)]

    def further(
        self,
        number: int,
        tokens: Tensor,
        hidden: Tensor,
        positions: Tensor,
        key_start: Tensor,
        key_end: Tensor,
        cache: Window | None = None,
    ) -> Tensor:
        """Returns hidden states [B, L, D] that predict one token further ahead, by layer `number`
        of multi-token prediction, from 0. hidden [B, L, D]: what the model, or the layer before,
        returns for the L tokens before `tokens` [B, L]; the rest as for `forward`, and belongs to
        `tokens`. Raises ConfigError if the model has no such layer."""
        if not 0 <= number < self.config.num_mtp_layers:
            raise ConfigError(
                f"num_mtp_layers={self.config.num_mtp_layers}: the model has no multi-token "
                f"prediction layer {number}; use a checkpoint with it, or decode without"
            )
        learned = self.config.positions == "learned_2d"
        x = self.add_positions(self.embed(tokens), positions)
        rotary = None if learned else self.rotary(positions)
        return self.further_layers()[number](x, hidden, rotary, key_start, key_end, cache)[0]

    def rotary(self, positions: Tensor) -> Rotary:
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
        sum(mask)). Layers of multi-token prediction add their loss, `mtp_weight` times the mean
        over them; in training, sparse layers add theirs (`balanced`)."""
        hidden = self(tokens, positions, key_start, key_end)
        return self.loss_of(hidden, tokens, positions, key_start, key_end, labels, token_weight)

    def loss_of(
        self,
        hidden: Tensor,
        tokens: Tensor,
        positions: Tensor,
        key_start: Tensor,
        key_end: Tensor,
        labels: Tensor,
        token_weight: Tensor,
    ) -> Tensor:
        """Returns `loss` of hidden states [B, L, D] that are computed already."""
        whole_weight = token_weight
        total = self.cross_entropy(hidden, labels, token_weight)
        share = self.config.mtp_weight / max(self.config.num_mtp_layers, 1)
        for number in range(self.config.num_mtp_layers):
            hidden, tokens, positions, key_start, key_end, labels, token_weight = self.one_ahead(
                hidden, tokens, positions, key_start, key_end, labels, token_weight
            )
            hidden = self.further(number, tokens, hidden, positions, key_start, key_end)
            total = total + share * self.cross_entropy(hidden, labels, token_weight)
        return self.balanced(total, whole_weight)

    def one_ahead(self, hidden: Tensor, *of_tokens: Tensor) -> tuple[Tensor, ...]:
        """Returns hidden states and the other arguments of `loss_of` for the prediction of one
        token further ahead: place i holds the hidden state of token i, and token i + 1 with what it
        sees, so that there is a place less."""
        tokens, positions, key_start, key_end, labels, token_weight = [
            x[..., 1:] for x in of_tokens
        ]
        mask = [(x - 1).clamp(min=0) for x in (key_start, key_end)]
        return hidden[:, :-1].contiguous(), tokens, positions, *mask, labels, token_weight

    def balanced(self, loss: Tensor, token_weight: Tensor) -> Tensor:
        """Returns the loss of a forward pass with the auxiliary loss of its sparse layers: each
        sequence's counts by its share of token_weight [B, L], times `balance_weight`."""
        for block in self.blocks.children():
            experts = block.mlp
            if isinstance(experts, Experts) and experts.balance is not None:
                share = token_weight.sum(-1)  # [B]
                loss = loss + self.config.balance_weight * (share * experts.balance).sum()
                experts.balance = None
        return loss

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

    def num_active_parameters(self) -> int:
        """Returns the parameters that one token's logits are computed with: its own experts of each
        layer, everything else but the layers of multi-token prediction, and no embedding table
        that is not the head as well."""
        c = self.config
        active = self.num_parameters() - (0 if self.head is None else self.embedding.numel())
        for i, block in enumerate(self.blocks):
            sparse = isinstance(block.mlp, Experts)
            own = sum(p.numel() for p in block.parameters())
            if i >= c.num_layers:
                active -= own
            elif sparse:
                routed = sum(p.numel() for n, p in block.named_parameters() if ".experts_" in n)
                active -= routed // c.num_experts * (c.num_experts - c.experts_per_token)
        return active

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
