"""Compares our GLM with transformers' GlmForCausalLM and Glm4ForCausalLM, gradients included.

The truth is transformers' model in float64 (its RMSNorm, which drops to float32, replaced by
torch's own). Two rules, neither with a hand-set tolerance: in float32 the root mean square error of
each tensor is at most RATIO times that of transformers' own float32 run; in float64, where truth
and candidate both round, at most RATIO + 1 times that error scaled by the dtypes' eps."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glm_core.backends import registry
from glm_core.config import ModelConfig
from glm_core.model.generate import generate
from glm_core.model.glm import GLM
from glm_core.model.prompt import causal
from glm_core.model.sample import Sampling
from glm_core.pretrained.weights.reading import open_checkpoint
from glm_core.pretrained.weights.writing import convert, target

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

RATIO = 2.0
EPS_32, EPS_64 = (torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64))
B, L, V = 3, 24, 97
SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    "mqa-wide-heads-no-bias": {
        "hidden_size": 48,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "attention_bias": False,
        "num_hidden_layers": 1,
    },
    "full-rotary-tied": {
        "hidden_size": 60,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "head_dim": 12,
        "num_hidden_layers": 3,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 500.0,
            "partial_rotary_factor": 1.0,
        },
    },
}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A batch: everything is [B, L], positions [B, 2, L]; weights are float64, where they sum to
    1."""

    tokens: Tensor
    labels: Tensor
    weight: Tensor
    positions: Tensor
    key_start: Tensor
    key_end: Tensor

    @property
    def visible(self) -> Tensor:
        """The mask as [B, 1, L, L]."""
        j = torch.arange(L)
        return ((j >= self.key_start[..., None]) & (j < self.key_end[..., None]))[:, None]


def inputs(prefix: bool) -> Inputs:
    """Returns rows of different prefix lengths, or causal rows; a tenth of the tokens has no
    loss."""
    g = torch.Generator().manual_seed(5)
    tokens, labels = (torch.randint(V, (B, L), generator=g) for _ in range(2))
    weight = (torch.rand(B, L, generator=g) > 0.1).double()
    place = torch.arange(L).expand(B, L)
    sep = torch.tensor([[5], [11], [17]]) if prefix else 0
    end = (place + 1).maximum(torch.as_tensor(sep)).int()
    return Inputs(
        tokens,
        labels,
        weight / weight.sum(),
        place.expand(2, B, L).transpose(0, 1),
        torch.zeros(B, L, dtype=torch.int32),
        end,
    )


def peer(kind: str, shape: str) -> nn.Module:
    """Returns transformers' model with weights so large that every part matters."""
    sizes = {"num_hidden_layers": 2, "intermediate_size": 88, "vocab_size": V, **SHAPES[shape]}
    config = getattr(transformers, f"{kind}Config")(
        **sizes,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        attn_implementation="sdpa",
        use_cache=False,
    )
    model: nn.Module = getattr(transformers, f"{kind}ForCausalLM")(config).train()
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(
                torch.randn(p.shape, generator=g) * (0.2 if p.ndim == 1 else p.shape[1] ** -0.5)
            )
            if "norm" in name:
                p += 1
    return model


class Peer:
    """Returns logits, loss and gradients of transformers' model under our names."""

    def __init__(self, model: nn.Module, given: Inputs, dtype: torch.dtype) -> None:
        model = copy.deepcopy(model).to(dtype)
        if dtype == torch.float64:
            pure_float64(model)
        mask = torch.zeros(B, 1, L, L, dtype=dtype).masked_fill_(
            ~given.visible, torch.finfo(dtype).min
        )
        ignored = given.labels.masked_fill(given.weight == 0, -100)
        out = model(given.tokens, attention_mask=mask, labels=ignored, shift_labels=ignored)
        loss = out.loss
        if dtype == torch.float64:  # transformers' loss drops to float32
            loss = nn.functional.cross_entropy(out.logits.flatten(0, 1), ignored.flatten())
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        self.results = {"logits": out.logits, "loss": loss, **renamed(gradients)}


def pure_float64(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                norm = nn.RMSNorm(
                    child.weight.shape[0], child.variance_epsilon, dtype=torch.float64
                )
                norm.weight.data.copy_(child.weight)
                setattr(module, name, norm)


NAMES = {
    "model.embed_tokens.weight": "embedding",
    "model.norm": "final_norm",
    "lm_head.weight": "head",
    "model.layers": "blocks",
    "self_attn.o_proj": "attention.out",
    "input_layernorm": "input_norm",
    "gate_up_proj": "up",
    "down_proj": "down",
    "post_mlp_layernorm": "post_mlp_norm",
    "post_self_attn_layernorm": "post_attention_norm",
    "post_attention_layernorm": "mlp_norm",
}


def renamed(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns parameters or their gradients under our names, with q, k and v rows stacked."""
    ours: dict[str, Tensor] = {}
    for name, value in theirs.items():
        for old, new in NAMES.items():
            name = name.replace(old, new)
        if "q_proj" in name:
            rows = [theirs[f] for f in (_sibling(name, x) for x in "qkv")]
            name, value = name.replace("self_attn.q_proj", "attention.qkv"), torch.cat(rows)
        if "_proj" not in name:
            ours[name] = value
    return ours


def _sibling(name: str, letter: str) -> str:
    return name.replace("blocks", "model.layers").replace("q_proj", f"{letter}_proj")


def model_config(kind: str, peer_config: Any) -> ModelConfig:
    c, rope = peer_config, peer_config.rope_parameters
    return ModelConfig(
        num_layers=c.num_hidden_layers,
        hidden=c.hidden_size,
        num_heads=c.num_attention_heads,
        num_kv_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        ffn=c.intermediate_size,
        vocab=V,
        max_length=L,
        norm="rms",
        norm_eps=c.rms_norm_eps,
        activation="swiglu",
        positions="rope",
        placement="sandwich" if kind == "Glm4" else "pre",
        rope_base=rope["rope_theta"],
        rope_fraction=rope["partial_rotary_factor"],
        rope_interleaved=True,
        linear_bias=False,
        qkv_bias=c.attention_bias,
        tied_head=c.tie_word_embeddings,
    )


def ours(
    config: ModelConfig, weights: dict[str, Tensor], given: Inputs, dtype: torch.dtype
) -> dict[str, Tensor]:
    model = GLM(config)
    model.load_state_dict(weights)
    model.to(dtype)
    seen = (given.tokens, given.positions, given.key_start, given.key_end)
    loss = model.loss(*seen, given.labels, given.weight)
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": model.logits(*seen), "loss": loss, **gradients}


def rms(x: Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt())


class Case:
    """A model, its true results, and how far transformers' own float32 run deviates from them."""

    def __init__(self, kind: str, shape: str, prefix: bool) -> None:
        model = peer(kind, shape)
        self.given = inputs(prefix)
        self.config = model_config(kind, model.config)
        self.weights = renamed(dict(model.named_parameters()))
        self.truth = Peer(model, self.given, torch.float64).results
        single = Peer(model, self.given, torch.float32).results
        self.error = {n: rms(single[n].double() - t) for n, t in self.truth.items()}

    def worst(self, dtype: torch.dtype, given: Inputs | None = None) -> tuple[float, str]:
        """Our largest error in units of transformers' own, and the tensor that has it."""
        mine = ours(self.config, self.weights, given or self.given, dtype)
        assert mine.keys() == self.truth.keys()
        own = 1.0 if dtype == torch.float32 else EPS_64 / EPS_32
        # a scalar's error can be lucky; its own rounding is the least that can be asked
        floor = {n: rms(t) * EPS_32 for n, t in self.truth.items()}
        return max(
            (rms(mine[n].double() - t) / own / max(self.error[n], floor[n]), n)
            for n, t in self.truth.items()
        )


@pytest.mark.parametrize("mask", ["causal", "prefix"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["Glm", "Glm4"])
def test_logits_loss_and_gradients(kind: str, shape: str, mask: str) -> None:
    case = Case(kind, shape, mask == "prefix")
    worst, name = case.worst(torch.float32)
    assert worst <= RATIO, f"float32: {name} has {worst:.2f} times transformers' error"
    worst, name = case.worst(torch.float64)
    assert worst <= RATIO + 1, f"float64: {name} has {worst:.2f} times the error to expect"


def swapped(weights: dict[str, Tensor], name: str, first: slice, second: slice) -> None:
    """Swaps two blocks of rows."""
    w = weights[name] = weights[name].detach().clone()
    w[first], w[second] = w[second].clone(), w[first].clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(
    "wrong",
    [
        "gate-halves",
        "k-and-v",
        "norms",
        "half-rotation",
        "rope-fraction",
        "eps",
        "mask",
        "placement",
    ],
)
def test_a_wrong_model_is_found(wrong: str, dtype: torch.dtype) -> None:
    """Each of these mistakes is small or easily made; none may pass as rounding."""
    case = Case("Glm4", "gqa", prefix=True)
    given, changes = case.given, dict[str, Any]()
    if wrong == "gate-halves":
        swapped(case.weights, "blocks.1.mlp.up.weight", slice(88), slice(88, None))
    elif wrong == "k-and-v":
        swapped(case.weights, "blocks.0.attention.qkv.weight", slice(64, 96), slice(96, 128))
    elif wrong == "norms":
        names = [f"blocks.0.{n}.weight" for n in ("post_attention_norm", "mlp_norm")]
        case.weights[names[0]], case.weights[names[1]] = (case.weights[n] for n in reversed(names))
    elif wrong == "mask":  # one query of one row sees one key too many
        given = copy.deepcopy(given)
        given.key_end[2, 20] += 1
    else:
        changes = {
            "half-rotation": {"rope_interleaved": False},
            "rope-fraction": {"rope_fraction": 0.25},
            "eps": {"norm_eps": 1e-6},
            "placement": {"placement": "pre"},
        }[wrong]
        case.config = dataclasses.replace(case.config, **changes)
    if wrong == "placement":
        case.weights = {n: w for n, w in case.weights.items() if "post" not in n}
        case.truth = {n: t for n, t in case.truth.items() if "post" not in n}
    worst, _ = case.worst(dtype, given)
    assert worst > 2 * (RATIO + 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["Glm", "Glm4"])
def test_its_checkpoints_are_read_and_written(kind: str, shape: str, tmp_path: Path) -> None:
    """save_pretrained then our reader gives the same config, weights and logits; our writer then
    from_pretrained gives transformers' logits bit for bit."""
    model = peer(kind, shape)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    checkpoint = open_checkpoint(tmp_path / "theirs")
    case = Case(kind, shape, prefix=True)
    assert dataclasses.replace(checkpoint.config, max_length=L) == case.config
    case.weights = checkpoint.load().state_dict()
    worst, name = case.worst(torch.float32)
    assert worst <= RATIO, f"{name} has {worst:.2f} times transformers' error"

    convert(checkpoint, tmp_path / "ours", target("glm-core"))
    again = open_checkpoint(tmp_path / "ours")
    convert(again, tmp_path / "back", target(kind.lower(), shard_bytes=40_000))
    back = type(model).from_pretrained(tmp_path / "back", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(back(case.given.tokens).logits, model(case.given.tokens).logits)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["Glm", "Glm4"])
def test_greedy_tokens(kind: str, shape: str, backend: str) -> None:
    """Ours, one by one and padded, matches transformers' generate with its cache and left-padded
    prompts."""
    theirs, g = peer(kind, shape).eval(), torch.Generator().manual_seed(8)
    prompts = [torch.randint(2, V, (n,), generator=g).tolist() for n in (3, 9, 1, 6)]
    longest = max(map(len, prompts))
    pads = [longest - len(p) for p in prompts]
    asked = torch.tensor([[0] * n + p for n, p in zip(pads, prompts, strict=True)])
    shown = torch.tensor([[0] * n + [1] * len(p) for n, p in zip(pads, prompts, strict=True)])
    expected = theirs.generate(
        asked,
        attention_mask=shown,
        max_new_tokens=20,
        do_sample=False,
        use_cache=True,
        eos_token_id=None,
    )[:, longest:].tolist()
    model = GLM(dataclasses.replace(model_config(kind, theirs.config), max_length=64))
    model.load_state_dict(renamed(dict(theirs.named_parameters())))
    settings = Sampling(max_tokens=20, temperature=0)
    with registry.use(backend):
        for padded in (False, True):
            done = generate(model, [causal(p) for p in prompts], settings, padded=padded)
            assert [d.tokens for d in done] == expected
    assert len({tuple(e) for e in expected}) == len(expected)
