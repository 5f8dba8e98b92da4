"""Compares the models with experts and with latent attention with transformers': logits, tokens,
gradients and the layer of multi-token prediction, through folders that transformers writes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from glm_core.backends import registry
from glm_core.errors import CheckpointError
from glm_core.model.generate import generate
from glm_core.model.prompt import causal
from glm_core.model.sample import Sampling
from glm_core.pretrained.weights.reading import open_checkpoint
from glm_core.pretrained.weights.writing import convert, target

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

B, L, V = 3, 20, 83
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 40,
    "intermediate_size": 56,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "routed_scaling_factor": 1.7,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 12}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 28,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped": ("Glm4Moe", {**GROUPED, "use_qk_norm": True, "n_group": 4, "topk_group": 2}),
    "grouped-bias": (
        "Glm4Moe",
        {
            **GROUPED,
            "attention_bias": True,
            "first_k_dense_replace": 2,
            "norm_topk_prob": False,
            "n_shared_experts": 2,
        },
    ),
    "grouped-tied": (
        "Glm4Moe",
        {**GROUPED, "first_k_dense_replace": 0, "tie_word_embeddings": True, "n_routed_experts": 6},
    ),
    "latent": ("Glm4MoeLite", {**LATENT, "n_group": 2, "topk_group": 1}),
    "latent-bias": (
        "Glm4MoeLite",
        {
            **LATENT,
            "q_lora_rank": None,
            "attention_bias": True,
            "rope_interleave": False,
            "v_head_dim": 24,
            "mlp_layer_types": ["dense", "dense", "sparse"],
        },
    ),
    "latent-yarn": ("Glm4MoeLite", {**LATENT, "rope_parameters": YARN, "norm_topk_prob": False}),
}


def peer(case: str, **changes: Any) -> nn.Module:
    """Returns transformers' model with weights so large that every part matters."""
    kind, sizes = CASES[case]
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **sizes, **changes})
    config._attn_implementation = "eager"
    model: nn.Module = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" not in name:
                std = 0.2 if p.ndim == 1 else p.shape[-1] ** -0.5
                p.copy_(torch.randn(p.shape, generator=g) * std + ("norm" in name))
    return model


def folder(path: Path, model: Any, dtype: torch.dtype = torch.float32, **how: Any) -> Path:
    """Writes a model as transformers does."""
    copy.deepcopy(model).to(dtype).save_pretrained(path, **how)
    return path


def batch(seed: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns tokens, positions, key_start and key_end of causal rows."""
    tokens = torch.randint(2, V, (B, L), generator=torch.Generator().manual_seed(seed))
    places = torch.arange(L).expand(B, L)
    start = torch.zeros(B, L, dtype=torch.int32)
    return tokens, places[:, None].expand(B, 2, L), start, (places + 1).int()


@pytest.fixture(autouse=True)
def reference() -> Any:
    with registry.use("reference"):
        yield


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_of_a_folder_as_transformers_writes_it(
    tmp_path: Path, case: str
) -> None:
    """Root mean square and largest error stay below 1e-5 of the largest value, in float32."""
    theirs = peer(case)
    ours = open_checkpoint(folder(tmp_path / "hf", theirs, max_shard_size="20KB")).load()
    tokens, *rest = batch()
    truth, logits = theirs(tokens).logits, ours.logits(tokens, *rest)
    assert (logits - truth).abs().max() < 1e-5 * truth.abs().max()
    weight = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))
    (truth * weight).sum().backward()
    (logits * weight).sum().backward()
    their_grads = {n: p.grad for n, p in theirs.named_parameters()}
    for ours_name, their_name in GRADIENTS.items():
        found, expected = ours.get_parameter(ours_name).grad, their_grads[their_name]
        assert found is not None
        assert expected is not None
        assert (found - expected).abs().max() < 2e-5 * expected.abs().max(), ours_name


GRADIENTS = {
    "embedding": "model.embed_tokens.weight",
    "blocks.2.mlp.experts_up.weight": "model.layers.2.mlp.experts.gate_up_proj",
    "blocks.2.mlp.experts_down.weight": "model.layers.2.mlp.experts.down_proj",
    "blocks.2.mlp.router.weight": "model.layers.2.mlp.gate.weight",
    "blocks.1.attention.out.weight": "model.layers.1.self_attn.o_proj.weight",
    "blocks.1.input_norm.weight": "model.layers.1.input_layernorm.weight",
}
"""a parameter of every new part, or one behind it"""


@pytest.mark.parametrize("case", ["grouped", "latent", "latent-bias"])
def test_generates_the_same_tokens(tmp_path: Path, case: str) -> None:
    """With a cache, batched, one by one and padded: latents are decoded in the absorbed form."""
    theirs = peer(case)
    ours = open_checkpoint(folder(tmp_path / "hf", theirs)).load()
    prompts = [[5, 9, 33, 7], [11, 3, 2, 64, 17, 80, 4, 9], [40]]
    expected = [
        theirs.generate(torch.tensor([p]), max_new_tokens=9, do_sample=False, eos_token_id=None)[  # type: ignore[operator]  # a method of transformers' model
            0, len(p) :
        ].tolist()
        for p in prompts
    ]
    greedy = Sampling(max_tokens=9, temperature=0.0)
    for padded in (False, True):
        done = generate(ours, [causal(p) for p in prompts], greedy, padded=padded)
        assert [g.tokens for g in done] == expected, f"padded={padded}"


def with_mtp(path: Path, fused: bool, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Writes a model of GLM-4.5's kind with its layer of multi-token prediction, as it is
    published or with all experts in one tensor. Returns transformers' model and that layer."""
    from transformers.modeling_layers import MtpModel

    theirs = peer("grouped").to(dtype)
    mtp = MtpModel(theirs, 1).to(dtype).eval()  # type: ignore[arg-type]  # a model of transformers
    g = torch.Generator().manual_seed(8)
    state = {k: v for k, v in mtp.state_dict().items() if k.startswith("layers.0.")}
    for name, value in state.items():
        value.copy_(torch.randn(value.shape, generator=g) * 0.2 + ("norm" in name))
    folder(path, theirs, dtype, save_original_format=not fused)
    tensors = load_file(path / "model.safetensors")
    for name, value in state.items():
        name = name.replace("layers.0.", "model.layers.3.").replace("mtp_block.", "")
        name = name.replace("post_norm", "shared_head.norm")
        if fused or ".experts." not in name:
            tensors[name] = value.clone()
            continue
        for i, expert in enumerate(value):
            stem, _, leaf = name.rpartition(".")
            both = leaf == "gate_up_proj"
            for part, kind in zip(
                expert.chunk(1 + both), leaf.removesuffix("_proj").split("_"), strict=True
            ):
                tensors[f"{stem}.{i}.{kind}_proj.weight"] = part.clone()
    tensors["model.layers.3.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return theirs, mtp


@pytest.mark.parametrize("fused", [False, True])
def test_the_layer_of_multi_token_prediction(tmp_path: Path, fused: bool) -> None:
    theirs, mtp = with_mtp(tmp_path / "hf", fused, torch.float32)
    source = open_checkpoint(tmp_path / "hf")
    assert source.layout.name == "glm4_moe" + "_fused" * fused
    ours = source.load()
    tokens, positions, start, end = batch()
    before = theirs.model(tokens).last_hidden_state  # type: ignore[operator, union-attr]  # transformers' model
    following = torch.cat((tokens[:, 1:], tokens[:, :1]), 1)
    places = positions[:, 0] + 1
    truth = mtp.forward_layer(0, before, places, None, input_ids=following)  # type: ignore[operator]  # transformers' layer
    hidden = ours(tokens, positions, start, end)
    found = ours.further(0, following, hidden, positions + 1, start, end)
    assert (found - truth).abs().max() < 1e-5 * truth.abs().max()
    # written again, in the same style and in the other one, everything is kept
    for name in (source.layout.name, "glm4_moe" if fused else "glm4_moe_fused"):
        convert(source, tmp_path / name, target(name))
        again = open_checkpoint(tmp_path / name).load()
        assert all(map(torch.equal, again.parameters(), ours.parameters()))
    stored, written = (
        load_file(tmp_path / n / "model.safetensors") for n in ("hf", source.layout.name)
    )
    assert stored.keys() == written.keys()
    assert all(torch.equal(written[k], v) for k, v in stored.items())


def test_bfloat16_keeps_the_bias_of_the_router_in_float32(tmp_path: Path) -> None:
    theirs = peer("latent")
    path = folder(tmp_path / "hf", theirs, torch.bfloat16, max_shard_size="20KB")
    [bias] = [n for n, b in theirs.named_buffers() if "layers.2" in n and "correction" in n]
    ours = open_checkpoint(path).load()
    kept = ours.get_parameter("blocks.2.mlp.router.bias")
    assert (kept.dtype, ours.embedding.dtype) == (torch.float32, torch.bfloat16)
    again = type(theirs).from_pretrained(path)  # type: ignore[attr-defined]  # transformers' model
    assert torch.equal(kept, again.get_buffer(bias))
    assert ours.float().to(torch.bfloat16).get_parameter("blocks.2.mlp.router.bias") is not None
    assert ours.get_parameter("blocks.2.mlp.router.bias").dtype == torch.float32
    truth, logits = peer("latent")(batch()[0]).logits, ours.logits(*batch())
    assert (logits - truth).float().norm() < 0.1 * truth.norm()


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    path = folder(tmp_path / "hf", peer("grouped"))
    tensors = load_file(path / "model.safetensors")
    key = "model.layers.1.mlp.experts.5.up_proj.weight"
    del tensors[key]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"1 missing \({key}\)"):
        open_checkpoint(path)


def test_glm5_is_refused_by_name(tmp_path: Path) -> None:
    path = folder(tmp_path / "hf", peer("latent"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_type": "glm_moe_dsa"}))
    with pytest.raises(CheckpointError, match=r"glm_moe_dsa \(GLM-5\)"):
        open_checkpoint(path)
