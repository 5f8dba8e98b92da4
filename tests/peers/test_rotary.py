"""Compares what a config.json says of rotation with transformers' Glm: scaling of the frequencies,
odd shares, keys left out. Both sides read the same folder; logits and greedy tokens must agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from glm_core.backends import registry
from glm_core.errors import UnsupportedOpError
from glm_core.export.write import export
from glm_core.model.generate import generate
from glm_core.model.glm import GLM
from glm_core.model.prompt import causal
from glm_core.model.sample import Sampling
from glm_core.pretrained.weights.reading import Checkpoint, open_checkpoint
from glm_core.pretrained.weights.writing import convert, target

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

TRAINED, LENGTH, V = 32, 48, 97
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
ROTATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    "linear-legacy": {"rope_parameters": {"type": "linear", "factor": 4}},
    "linear-old-name": {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 500.0},
    "scaling-wins": {
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 300.0},
    },
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
    "yarn": {"rope_parameters": YARN},
    "yarn-alone": {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    "yarn-attention": {"rope_parameters": {**YARN, "attention_factor": 1.7, "beta_fast": 8.0}},
    "yarn-mscale": {
        "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.3, "truncate": False}
    },
    "yarn-length-beside": {
        "rope_parameters": {**YARN, "beta_slow": 0.5},
        "original_max_position_embeddings": 8,
    },
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 50.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "odd-share": {"partial_rotary_factor": 0.45},  # 7 of 16 dimensions, rotated as 8
    "floored-share": {"partial_rotary_factor": 0.4},  # 6.4 of 16 dimensions
    "share-in-both": {
        "partial_rotary_factor": 0.25,
        "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0},
    },
    "swish": {"hidden_act": "swish"},
}


def folder(path: Path, kind: str, rotation: dict[str, Any]) -> Path:
    """Writes transformers' checkpoint of a tiny model, and the rotation into its config.json."""
    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=88,
        vocab_size=V,
        max_position_embeddings=TRAINED,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.normal_(std=2 * p.shape[1] ** -0.5)  # so large that positions matter
    model.save_pretrained(path)
    values = json.loads((path / "config.json").read_text())
    del values["rope_parameters"]
    (path / "config.json").write_text(json.dumps({**values, **rotation}))
    return path


def theirs(path: Path, kind: str) -> nn.Module:
    model: nn.Module = getattr(transformers, f"{kind}ForCausalLM").from_pretrained(
        path, dtype=torch.float32
    )
    return model.eval()


def deviation(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def logits(model: GLM, tokens: Tensor) -> Tensor:
    n = tokens.shape[1]
    place = torch.arange(n).expand(len(tokens), n)
    with torch.no_grad():
        return model.logits(
            tokens, place.expand(2, *place.shape).transpose(0, 1), place * 0, place.int() + 1
        )


def opened(path: Path) -> tuple[Checkpoint, GLM]:
    """Returns the checkpoint and its model, of a context of at least LENGTH tokens."""
    checkpoint = open_checkpoint(path)
    model = checkpoint.load()
    longer = max(checkpoint.config.max_length, LENGTH)
    object.__setattr__(model.config, "max_length", longer)  # transformers knows no limit
    return checkpoint, model


@pytest.mark.parametrize(
    ("name", "kind"), [*((n, "Glm") for n in ROTATIONS), ("yarn", "Glm4"), ("plain", "Glm4")]
)
def test_logits_and_greedy_tokens(name: str, kind: str, tmp_path: Path) -> None:
    """The text is half as long again as the model was trained for. Decoding goes over the trained
    length, token by token, with the cache."""
    path = folder(tmp_path / "model", kind, ROTATIONS[name])
    peer, (checkpoint, model) = theirs(path, kind), opened(path)
    tokens = torch.randint(2, V, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = peer(tokens).logits
    assert deviation(logits(model, tokens), expected) < 1e-5
    prompt = tokens[:, : TRAINED - 4]
    said = theirs(path, kind).generate(
        prompt, max_new_tokens=12, do_sample=False, use_cache=True, eos_token_id=None
    )
    settings = Sampling(max_tokens=12, temperature=0)
    for backend in ("reference", "cpu"):
        with registry.use(backend):
            [done] = generate(model, [causal(prompt[0].tolist())], settings)
        assert done.tokens == said[0, TRAINED - 4 :].tolist()

    convert(checkpoint, tmp_path / "ours", target("glm-core"))
    back = open_checkpoint(tmp_path / "ours")
    assert back.config == checkpoint.config
    convert(back, tmp_path / "back", target(kind.lower()))
    assert open_checkpoint(tmp_path / "back").config == checkpoint.config
    with torch.no_grad():
        assert deviation(theirs(tmp_path / "back", kind)(tokens).logits, expected) < 1e-5


@pytest.mark.parametrize("name", ["linear", "dynamic", "yarn", "llama3"])
def test_scaling_matters(name: str, tmp_path: Path) -> None:
    """The comparison above would find a scaling that nobody reads."""
    plain = opened(folder(tmp_path / "plain", "Glm", {}))[1]
    scaled = opened(folder(tmp_path / "scaled", "Glm", ROTATIONS[name]))[1]
    tokens = torch.randint(2, V, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    assert deviation(logits(scaled, tokens), logits(plain, tokens)) > 1e-2


def test_a_long_prompt_is_rotated_whole_and_rows_do_not_mix(tmp_path: Path) -> None:
    """Dynamic scaling depends on the length: of the prompt, not of its chunk or its neighbours."""
    _, model = opened(folder(tmp_path / "m", "Glm", ROTATIONS["dynamic"]))
    prompts = [causal([5 + i % 60 for i in range(n)]) for n in (40, 3)]
    settings = Sampling(max_tokens=8, temperature=0)
    with registry.use("cpu"):
        alone = [generate(model, [p], settings)[0].tokens for p in prompts]
        together = [d.tokens for d in generate(model, prompts, settings, padded=True)]
    assert together == alone
    with pytest.raises(UnsupportedOpError, match="rope_scaling=dynamic"):
        export(model, tmp_path / "onnx")


def test_keys_left_out_take_the_defaults_of_the_type(tmp_path: Path) -> None:
    """A config.json that names nothing but its type is GLM-4-9B's."""
    from glm_core.pretrained.weights.configs import read_config
    from glm_core.pretrained.weights.layouts import find_layout

    for kind in ("Glm", "Glm4"):
        full = getattr(transformers, f"{kind}Config")().to_dict()
        values = [{"model_type": kind.lower()}, full]
        bare, whole = (read_config(find_layout(kind.lower()), v, tmp_path) for v in values)
        assert bare == whole


def test_every_key_of_its_configs_is_known(tmp_path: Path) -> None:
    folder(tmp_path / "m", "Glm", {})
    config = json.loads((tmp_path / "m/config.json").read_text())
    old = {"_name_or_path": "x", "torchscript": False, "top_k": 50, "sliding_window": None}
    (tmp_path / "m/config.json").write_text(json.dumps({**config, **old}))
    open_checkpoint(tmp_path / "m")


def test_a_tied_model_stored_as_its_head_alone(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", "Glm", {"tie_word_embeddings": True})
    state = load_file(path / "model.safetensors")
    head = state.pop("model.embed_tokens.weight")
    save_file({**state, "lm_head.weight": head}, path / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(path)
    model, tokens = checkpoint.load(), torch.randint(2, V, (1, 20))
    assert model.head is None
    with torch.no_grad():
        assert deviation(logits(model, tokens), theirs(path, "Glm")(tokens).logits) < 1e-5
    convert(checkpoint, tmp_path / "back", target("glm"))
    assert "model.embed_tokens.weight" in load_file(tmp_path / "back/model.safetensors")
