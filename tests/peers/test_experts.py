"""Compares the models with experts and with latent attention with transformers': logits, tokens,
gradients and the layer of multi-token prediction, through folders that transformers writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_folders import CASES, batch, folder, peer, with_mtp
from safetensors.torch import load_file, save_file

from glm_core.backends import registry
from glm_core.errors import CheckpointError
from glm_core.model.generate import generate
from glm_core.model.prompt import causal
from glm_core.model.sample import Sampling
from glm_core.pretrained.weights.reading import open_checkpoint
from glm_core.pretrained.weights.writing import convert, target

pytest.importorskip("transformers", reason="transformers is not installed")


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
