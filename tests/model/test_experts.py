"""Holds models with experts to their published sizes, trains and quantises a small one, and asks
for what cannot be."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from small_experts import LATENT, SMALL
from torch import Tensor

from glm_core.backends import registry
from glm_core.config import ModelConfig
from glm_core.errors import ConfigError, ShapeError
from glm_core.model.cache import Cache
from glm_core.model.fit import token_bytes
from glm_core.model.generate import generate
from glm_core.model.glm import GLM
from glm_core.model.presets import PRESETS, preset
from glm_core.model.prompt import causal
from glm_core.model.quantize import Quantization, convert
from glm_core.model.sample import Sampling
from glm_core.model.stack import stack
from glm_core.pretrained.weights import writing
from glm_core.pretrained.weights.reading import open_checkpoint
from glm_core.spec import Support, unsupported

COUNTS = {
    # all parameters, and those a token's logits are computed with. Published: 355 B and 32 B
    # without embedding and head but with the layer of multi-token prediction; 106 B and 12 B;
    # 31 B (the folder's copies of embedding and head included) and 3 B
    "glm-4.5": (356_785_898_816, 32_856_319_904),
    "glm-4.5-air": (109_227_310_848, 12_803_372_672),
    "glm-4.6": (356_785_898_816, 32_856_319_904),
    "glm-4.7": (356_785_898_816, 32_856_319_904),
    "glm-4.7-flash": (30_587_100_096, 3_579_571_840),
    "tiny-moe": (3_768_704, 1_368_496),
}


def batch(length: int = 12) -> tuple[Tensor, ...]:
    """Returns tokens, positions, key_start, key_end, labels and weights of causal rows."""
    g = torch.Generator().manual_seed(2)
    tokens, labels = (torch.randint(0, 64, (2, length), generator=g) for _ in range(2))
    places = torch.arange(length).expand(2, length)
    start = torch.zeros(2, length, dtype=torch.int32)
    weight = torch.full((2, length), 1 / (2 * length))
    return tokens, places[:, None].expand(2, 2, -1), start, (places + 1).int(), labels, weight


def built(config: ModelConfig, seed: int = 1) -> GLM:
    """Returns a model whose weights are so large that every part matters."""
    model = GLM(dataclasses.replace(config, init_std=0.2)).init_weights(seed)
    for name, p in model.named_parameters():
        if name.endswith("router.bias"):
            p.data.copy_(torch.linspace(-0.1, 0.1, len(p)))
    return model


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = GLM(preset(name))
    assert (model.num_parameters(), model.num_active_parameters()) == COUNTS[name]


def test_every_preset_with_experts_is_counted() -> None:
    assert set(COUNTS) == {n for n, fields in PRESETS.items() if "num_experts" in fields}


def test_a_cache_of_latents_holds_576_numbers_a_token() -> None:
    flash = dataclasses.replace(preset("glm-4.7-flash"), num_layers=1)
    assert Cache(flash, 2, 3, torch.bfloat16).memory.shape == (1, 1, 2, 1, 3, 576)
    assert token_bytes(preset("glm-4.7-flash"), 2) == 47 * 576 * 2


@pytest.mark.parametrize("config", [SMALL, LATENT], ids=["grouped", "latent"])
def test_multi_token_prediction_is_part_of_the_loss(config: ModelConfig) -> None:
    """The further loss is that of every prefix's hidden state and the token after it."""
    tokens, positions, start, end, labels, weight = inputs = batch()
    with registry.use("reference"):
        model = built(config)
        plain = built(dataclasses.replace(config, num_mtp_layers=0))
        both, alone = model.loss(*inputs), plain.loss(*inputs)
        hidden = model(tokens, positions, start, end)
        layer = model.further(
            0, tokens[:, 1:], hidden[:, :-1], positions[..., 1:], start[:, 1:], end[:, :-1]
        )
        far = model.cross_entropy(layer, labels[:, 1:], weight[:, 1:])
        both.backward()
    torch.testing.assert_close(both, alone + config.mtp_weight * far)
    bias = {n for n, p in model.named_parameters() if p.grad is None}
    assert bias == {n for n, _ in model.named_parameters() if n.endswith("router.bias")}
    assert {p.dtype for p in plain.double().parameters()} == {torch.float64}  # as oracles need it
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("config", [SMALL, LATENT], ids=["grouped", "latent"])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_in_place_and_by_folder(tmp_path: Path, config: ModelConfig, bits: int) -> None:
    """Both give the same codes, near the original, and generate with the cache what they compute
    without."""
    how = Quantization(bits=bits, group=32)
    with registry.use("reference"):
        model, exact = built(config), built(config)
        for _ in convert(model, how):
            pass
        save(exact, tmp_path / "float")
        source = open_checkpoint(tmp_path / "float")
        writing.convert(source, tmp_path / "codes", writing.target("glm-core", quantize=how))
        stored = open_checkpoint(tmp_path / "codes")
        assert stored.bits == bits
        again = stored.load(quantized=True)
        assert again.state_dict().keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name
        writing.convert(stored, tmp_path / "back", writing.target("glm-core", dequantize=True))
        values = open_checkpoint(tmp_path / "back").load().state_dict()
        for name, value in stored.load().state_dict().items():
            assert torch.equal(values[name], value), name
        inputs = batch()[:4]
        logits = again.logits(*inputs)
        dense = stored.load(torch.float32).logits(*inputs)  # values were rounded to float16
        assert (dense - logits).norm() < 0.01 * logits.norm()
        truth = exact.logits(*inputs)
        assert 0 < (logits - truth).norm() < (0.05 if bits == 8 else 0.8) * truth.norm()
        row = batch()[0][0].tolist()
        [done] = generate(again, [causal(row)], Sampling(max_tokens=3, temperature=0.0))
        for token in done.tokens:
            one = batch_of(row)
            assert int(again.logits(*one)[0, -1].argmax()) == token
            row.append(token)


def test_int4_needs_keys_of_an_even_width() -> None:
    """The codes of the keys are those of the transposed matrix."""
    odd = built(dataclasses.replace(LATENT, head_dim=25))
    with pytest.raises(ShapeError, match=r"4 bits .* do not divide head_dim - rope_head_dim=17"):
        list(convert(odd, Quantization(bits=4)))
    assert list(convert(odd, Quantization(bits=8)))


def batch_of(tokens: list[int]) -> tuple[Tensor, ...]:
    """Returns the inputs of one causal row."""
    places = torch.arange(len(tokens))[None]
    start = torch.zeros(1, len(tokens), dtype=torch.int32)
    return torch.tensor([tokens]), places[:, None].expand(1, 2, -1), start, (places + 1).int()


def save(model: GLM, path: Path) -> None:
    """Writes a model under our own names."""
    import json

    from safetensors.torch import save_file

    path.mkdir()
    save_file({n: p.detach() for n, p in model.named_parameters()}, path / "model.safetensors")
    text = json.dumps({"model_type": "glm-core", **dataclasses.asdict(model.config)})
    (path / "config.json").write_text(text)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "top-k": (
        {"experts_per_token": 9, "top_groups": 2},
        r"experts_per_token=9 must lie in 1 \.\.\. 8: top_groups=2 of 4 groups of 4 experts",
    ),
    "groups": ({"expert_groups": 5}, "expert_groups=5 must divide num_experts=16"),
    "top-groups": ({"top_groups": 5}, r"top_groups=5 must lie in 1 \.\.\. expert_groups=4"),
    "dense": ({"num_dense_layers": 9}, "num_dense_layers=9 must lie in"),
    "no-experts": ({"num_experts": 0}, "experts_per_token=4 needs num_experts"),
    "rotated": ({"kv_latent": 8, "num_kv_heads": 4, "qk_norm": False}, "rope_head_dim=0 must lie"),
    "heads": ({"kv_latent": 8, "rope_head_dim": 8}, "num_kv_heads=2 must be num_heads=4"),
    "latent": ({"q_latent": 8}, "q_latent=8 needs kv_latent"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_sizes_are_refused(case: str) -> None:
    changes, message = BAD[case]
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(preset("tiny-moe"), **changes)


def test_multi_token_prediction_of_a_model_without_it() -> None:
    model = built(dataclasses.replace(SMALL, num_mtp_layers=0))
    tokens, positions, start, end = batch()[:4]
    with pytest.raises(ConfigError, match="num_mtp_layers=0: the model has no multi-token"):
        model.further(0, tokens, torch.zeros(2, 12, 32), positions, start, end)


def test_a_whole_decode_step_is_not_taken_with_float_heads() -> None:
    """torch multiplies a latent's float matrices, with bits of its own; the rest is described."""
    reason = "blocks.0.attention.kv_b is a HeadsLinear, not a QuantizedHeads"
    assert stack(GLM(LATENT), lambda: None) == unsupported(reason)
    parts = stack(GLM(SMALL), lambda: None)
    assert not isinstance(parts, Support)
    assert len(parts.layers) == SMALL.num_layers


def test_glm5_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"preset 'glm-5': .*glm_moe_dsa"):
        preset("glm-5")
