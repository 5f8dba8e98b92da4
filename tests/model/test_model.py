"""The one model has its published sizes and initial weights, sees what it should, and follows the
papers' formulas."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from glm_core.config import ModelConfig
from glm_core.errors import ConfigError, ShapeError
from glm_core.model.glm import GLM
from glm_core.model.presets import PRESETS, preset

EPS_32, EPS_64 = (torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64))
B, L, V = 2, 12, 37
KINDS: dict[str, dict[str, Any]] = {
    "glm": {"placement": "pre", "activation": "gelu", "positions": "learned_2d"},
    "glm-130b": {"qk_layer_scaling": True, "embedding_gradient_shrink": 0.1},
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
    "glm-4-0414": {
        "placement": "sandwich",
        "norm": "rms",
        "activation": "swiglu",
        "rope_fraction": 0.5,
        "rope_interleaved": True,
        "num_kv_heads": 2,
        "linear_bias": False,
        "tied_head": False,
    },
}


def small(kind: str, **changes: Any) -> ModelConfig:
    sizes = {"num_layers": 3, "hidden": 32, "num_heads": 4, "ffn": 48, "vocab": V, "max_length": L}
    return ModelConfig(**{**sizes, **KINDS[kind], **changes})


def model(config: ModelConfig) -> GLM:
    """Float64; every parameter random, biases and norms too."""
    built, g = GLM(config).double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in built.named_parameters():
            std = 0.2 if p.ndim == 1 else p.shape[1] ** -0.5
            p.copy_(torch.randn(p.shape, generator=g) * std + name.endswith("norm.weight"))
    return built


def batch(sep: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, positions and mask of a prefix of `sep` tokens and a span in its middle."""
    g = torch.Generator().manual_seed(1)
    tokens, place = torch.randint(V, (B, L), generator=g), torch.arange(L)
    text = torch.where(place < sep, place, torch.tensor(2))
    positions = torch.stack((text, (place - sep + 1).clamp(min=0))).expand(B, 2, L)
    end = torch.maximum(place + 1, torch.tensor(sep)).int().expand(B, L)
    return tokens, positions, torch.zeros(B, L, dtype=torch.int32), end


# --- sizes ---------------------------------------------------------------------------------------

COUNTS = {
    ("glm-130b", True): 128_697_794_560,
    ("glm-130b", False): 130_547_482_624,
    ("chatglm-6b", True): 6_173_286_400,
    ("chatglm-6b", False): 6_707_929_088,
    ("chatglm2-6b", False): 6_243_584_000,
    ("chatglm3-6b", False): 6_243_584_000,
    ("glm-4-9b", False): 9_399_951_360,
    ("glm-4-0414-9b", False): 9_400_279_040,
    ("glm-10b", True): 9_880_682_496,
    # L (12 H^2 + 13 H) + 2 H + V H + 2 (P + 1) H
    ("glm-base", True): 12 * (12 * 768**2 + 13 * 768) + 2 * 768 + 30592 * 768 + 2 * 513 * 768,
    ("glm-large", True): 24 * (12 * 1024**2 + 13 * 1024) + 2 * 1024 + 30592 * 1024 + 2 * 513 * 1024,
}


@pytest.mark.parametrize(("name", "tied"), COUNTS, ids=lambda x: str(x))
def test_published_parameter_counts(name: str, tied: bool) -> None:
    with torch.device("meta"):
        built = GLM(preset(name, tied_head=tied))
    assert built.num_parameters() == COUNTS[name, tied]


def test_every_published_preset_is_counted() -> None:
    dense = {name for name in PRESETS if not preset(name).num_experts}  # else: test_experts
    assert {name for name, _ in COUNTS} == dense - {"tiny", "glm4-34m"}
    for name, tied in (("glm-130b", True), ("chatglm2-6b", False), ("glm-base", True)):
        assert preset(name).tied_head is tied  # the published choice is the default


def test_unknown_preset_or_field() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown preset 'glm-130'; .*\(did you mean glm-130b\?\)"
    ):
        preset("glm-130")
    with pytest.raises(
        ConfigError, match=r"unknown model field 'layers'.*; unknown model field 'wid"
    ):
        preset("tiny", layers=3, width=3)


# --- initial weights -----------------------------------------------------------------------------


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    first = GLM(small("glm-130b")).init_weights(7).state_dict()
    torch.manual_seed(99)
    again = GLM(small("glm-130b")).init_weights(7).state_dict()
    other = GLM(small("glm-130b")).init_weights(8).state_dict()
    fewer = GLM(small("glm-130b", num_layers=1)).init_weights(7)
    assert all(torch.equal(v, again[k]) for k, v in first.items())
    matrices = [k for k, v in first.items() if v.ndim > 1]
    assert not any(torch.equal(first[k], other[k]) for k in matrices)
    assert len({first[k].flatten()[0].item() for k in matrices}) == len(matrices)
    assert torch.equal(first["embedding"], fewer.embedding)


@pytest.mark.parametrize("kind", KINDS)
def test_initial_spread(kind: str) -> None:
    """Wang et al. 2022, fig. 2, for DeepNorm; GLM's scaled output projections otherwise."""
    c = small(kind, hidden=256, ffn=512, vocab=1024, num_layers=8, init_std=0.05)
    built, low = GLM(c).init_weights(0), 0.05 / math.sqrt(16)
    assert built.embedding.std().item() == pytest.approx(0.05, rel=0.02)
    for block in built.blocks:
        deep = c.placement == "deepnorm"
        qk, v = block.attention.qkv.weight.split(
            ((c.num_heads + c.num_kv_heads) * c.head_dim, c.num_kv_heads * c.head_dim)
        )
        spread = {
            0.05: [qk, *([] if deep else [v, block.mlp.up.weight])],
            low: [block.attention.out.weight, block.mlp.down.weight],
        }
        spread[low] += [v, block.mlp.up.weight] if deep else []
        for std, weights in spread.items():
            assert [w.std().item() for w in weights] == pytest.approx(
                [std] * len(weights), rel=0.03
            )
    for name, p in built.named_parameters():
        if p.ndim == 1:
            assert (p == float(name.endswith("norm.weight"))).all(), name


# --- what the model sees -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_moves_only_what_may_see_it(kind: str) -> None:
    """Prefix-LM: the text sees itself both ways, the span sees the text and its own past."""
    sep, built = 5, model(small(kind))
    tokens, *rest = batch(sep)
    before = built(tokens, *rest)
    for j in range(L):
        changed = tokens.clone()
        changed[0, j] = (changed[0, j] + 1) % V
        moved = (built(changed, *rest) != before).any(-1)
        expected = torch.arange(L) >= (0 if j < sep else j)
        assert torch.equal(moved[0], expected), j
        assert not moved[1].any()


@pytest.mark.parametrize(
    ("kind", "rows"), [("glm", {0, 1}), ("chatglm-6b", {0, 1}), ("glm-130b", {0}), ("glm-4", {0})]
)
def test_position_rows_that_matter(kind: str, rows: set[int]) -> None:
    built = model(small(kind))
    tokens, positions, *mask = batch()
    before = built(tokens, positions, *mask)
    for row in (0, 1):
        changed = positions.clone()
        changed[:, row, -1] = 9
        assert torch.equal(before, built(tokens, changed, *mask)) == (row not in rows)


@pytest.mark.parametrize("kind", ["chatglm-6b", "glm-130b", "glm-4", "glm-4-0414"])
def test_rotary_positions_are_relative(kind: str) -> None:
    """Up to the float32 of the angles, of which 100 is the largest here."""
    built = model(small(kind))
    tokens, positions, *mask = batch()
    near, far = (built(tokens, positions + shift, *mask) for shift in (0, 88))
    assert (near - far).abs().max() < 100 * EPS_32 * near.abs().max()
    assert not torch.equal(near, far)


def test_too_long_a_sequence() -> None:
    tokens = torch.zeros(1, L + 1, dtype=torch.int64)
    with pytest.raises(
        ShapeError, match="sequence of 13 tokens: longer than max_length=12; shorten"
    ):
        GLM(small("glm"))(tokens, tokens, tokens, tokens)


# --- formulas ------------------------------------------------------------------------------------


def written_out(m: GLM, tokens: Tensor, positions: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """GLM and GLM-130B from the papers, without our ops: logits."""
    c, n = m.config, m.config.num_layers
    glm = c.positions == "learned_2d"

    def norm(x: Tensor, of: Any) -> Tensor:
        return F.layer_norm(x, (c.hidden,), of.weight, of.bias, c.norm_eps)

    def rotate(x: Tensor) -> Tensor:  # [B, L, H, E]
        inverse = 1 / 10000.0 ** (torch.arange(0, c.head_dim, 2) / c.head_dim)
        angle = (positions[:, 0, :, None].float() * inverse)[:, :, None]  # [B, L, 1, E/2]
        cos, sin = (
            torch.cat((angle, angle), -1).cos().to(x),
            torch.cat((angle, angle), -1).sin().to(x),
        )
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    def attend(x: Tensor, of: Any) -> Tensor:
        q, k, v = of.qkv(x).view(B, L, 3, c.num_heads, c.head_dim).unbind(2)
        q, k = (q, k) if glm else (rotate(q), rotate(k))
        scores = torch.einsum("bihe,bjhe->bhij", q, k) / math.sqrt(c.head_dim)
        j = torch.arange(L)
        seen = (j >= start[..., None]) & (j < end[..., None])
        weights = scores.masked_fill(~seen[:, None], -math.inf).softmax(-1)
        return of.out(torch.einsum("bhij,bjhe->bihe", weights, v).reshape(B, L, c.hidden))

    def feed(x: Tensor, of: Any) -> Tensor:
        h = of.up(x)
        if glm:
            h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        else:
            a, b = h.chunk(2, -1)
            h = a * b * 0.5 * (1 + torch.erf(b / math.sqrt(2)))
        return of.down(h)

    x = m.embedding[tokens]
    if m.position_embedding is not None and m.block_embedding is not None:
        x = x + m.position_embedding[positions[:, 0]] + m.block_embedding[positions[:, 1]]
    for block in m.blocks:
        if glm:  # x += Attn(LN x); x += MLP(LN x)
            x = x + attend(norm(x, block.input_norm), block.attention)
            x = x + feed(norm(x, block.mlp_norm), block.mlp)
        else:  # u = LN x; w = LN(alpha u + Attn(u)); x' = alpha w + MLP(w), alpha = (2N)^(1/2)
            u = norm(x, block.input_norm)
            w = norm(math.sqrt(2 * n) * u + attend(u, block.attention), block.mlp_norm)
            x = math.sqrt(2 * n) * w + feed(w, block.mlp)
    return norm(x, m.final_norm) @ m.embedding.T


def distance(x: Tensor, y: Tensor) -> float:
    return float((x.detach().double() - y.detach()).square().mean().sqrt())


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        *itertools.product(("glm", "glm-130b"), ("", "activation", "norm_eps")),
        ("glm-130b", "alpha"),
    ],
)
def test_the_papers_formulas(kind: str, wrong: str) -> None:
    """In float64, to what the float32 run of the written-out form predicts; a mistake is seen."""
    m, inputs = model(small(kind)), batch()
    truth = written_out(m, *inputs)
    expected = distance(written_out(model(small(kind)).float(), *inputs), truth) * EPS_64 / EPS_32
    values: dict[str, Any] = {
        "activation": "geglu" if kind == "glm" else "swiglu",
        "norm_eps": 2e-5,
    }
    if wrong == "alpha":
        for block in m.blocks:  # alpha of the layers at hand instead of all, as in a pipeline stage
            block.alpha = math.sqrt(2 * 1)
    elif wrong:
        m = model(small(kind, **{wrong: values[wrong]}))
    off = distance(m.logits(*inputs), truth)
    assert off > 100 * expected if wrong else off <= 3 * expected


def test_layer_scaling_and_pb_relax_are_neutral_in_exact_arithmetic() -> None:
    inputs = batch()
    plain = model(small("glm-130b", qk_layer_scaling=False)).logits(*inputs)
    for changes in ({}, {"pb_relax": 32.0}):
        other = model(small("glm-130b", **changes)).logits(*inputs)
        assert 0 < distance(other, plain) < 1e3 * EPS_64


def test_shrink_acts_on_the_lookup_and_not_on_the_tied_head() -> None:
    def gradient(shrink: float, tied: bool = True) -> dict[str, Tensor]:
        m = model(small("glm-130b", embedding_gradient_shrink=shrink, tied_head=tied))
        if m.head is not None:
            m.load_state_dict(
                {**model(small("glm-130b")).state_dict(), "head": m.embedding.clone()}
            )
        labels, weight = torch.ones(B, L, dtype=torch.int64), torch.full((B, L), 0.1)
        m.loss(*batch(), labels, weight).backward()
        return {n: p.grad for n, p in m.named_parameters() if p.grad is not None}

    separate, tied = gradient(1.0, tied=False), gradient(0.1)
    expected = 0.1 * separate["embedding"] + separate["head"]
    assert distance(tied["embedding"], expected) < 10 * EPS_64 * expected.abs().max()
    assert all(torch.equal(tied[n], separate[n]) for n in tied if n != "embedding")
