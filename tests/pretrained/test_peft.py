"""Adapters of the peft package: judged by the products that peft adds to the base's stored weights,
in files written here by hand in its format."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import CONFIGS, ranks_of, write
from safetensors.torch import load_file, save_file
from torch import Tensor

from glm_core.cli import main
from glm_core.errors import CheckpointError
from glm_core.model.adapters import merge
from glm_core.model.glm import GLM
from glm_core.pretrained import adapters, peft
from glm_core.pretrained.weights.reading import open_checkpoint

RANK = 3
TARGETS = {
    "chatglm2": ["query_key_value", "dense_4h_to_h"],
    "chatglm-6b": ["query_key_value"],
    "glm": ["q_proj", "v_proj", "gate_up_proj"],
    "glm4": ["q_proj", "k_proj", "v_proj", "o_proj"],
}


def lora(folder: Path, layout: str, **changed: Any) -> dict[str, Tensor]:
    """Writes an adapter as peft does, and returns what it adds to each stored weight."""
    g = torch.Generator().manual_seed(5)
    tensors, added = {}, {}
    settings: dict[str, Any] = {"r": RANK, "lora_alpha": 6, **changed}
    for key, weight in ranks_of(layout)[0].items():
        module = key.removesuffix(".weight")
        if key.endswith(".weight") and module.endswith(tuple(TARGETS[layout])):
            a = torch.randn(RANK, weight.shape[1], generator=g)
            b = torch.randn(len(weight), RANK, generator=g)
            alpha = settings["lora_alpha"]
            for pattern, own in settings.get("alpha_pattern", {}).items():
                alpha = own if re.search(pattern, module) else alpha
            scale = alpha / (RANK**0.5 if settings.get("use_rslora") else RANK)
            tensors[f"base_model.model.{module}.lora_A.weight"] = a
            tensors[f"base_model.model.{module}.lora_B.weight"] = b
            added[key] = scale * (b @ a)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "target_modules": TARGETS[layout], "bias": "none", **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return added


def stored_with(added: dict[str, Tensor], layout: str, folder: Path) -> GLM:
    """Returns the model of the stored weights with the products added to them."""
    folder.mkdir()
    state = {k: v.float() + added.get(k, 0) for k, v in ranks_of(layout)[0].items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return open_checkpoint(folder, CONFIGS[layout]).load(torch.float32)


def require_equal(ours: GLM, theirs: GLM) -> None:
    """Raises AssertionError unless all parameters are equal up to the rounding of a product."""
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, expected[name], msg=lambda m, n=name: f"{n}: {m}")


CHANGED: dict[str, dict[str, Any]] = {
    "chatglm2": {"alpha_pattern": {"mlp.dense_4h_to_h": 12}},
    "chatglm-6b": {"use_rslora": True},
    "glm": {"alpha_pattern": {r"layers\.1\.self_attn\.v_proj": 1}},
    "glm4": {},
}


@pytest.mark.parametrize("layout", TARGETS)
def test_adds_what_peft_adds(layout: str, tmp_path: Path) -> None:
    """An adapter that is read, one that is written again, and weights merged by the command are
    the stored weights with peft's products added."""
    base = write(tmp_path / "base", layout)
    expected = stored_with(
        lora(tmp_path / "lora", layout, **CHANGED[layout]), layout, tmp_path / "sum"
    )
    names = [str(tmp_path / n) for n in ("lora", "ours.safetensors", "again", "merged")]
    adapter = ["checkpoint", "adapter", "--base", str(base)]
    assert main([*adapter, names[0], names[1]]) == 0
    assert main([*adapter, names[1], names[2]]) == 0
    for name in names[:3]:
        model = open_checkpoint(base).load(torch.float32)
        adapters.load_adapter(name, model)
        require_equal(merge(model), expected)
    convert = ["checkpoint", "convert", str(base), names[3], "--dtype", "float32"]
    assert main([*convert, "--merge", names[0]]) == 0
    require_equal(open_checkpoint(names[3]).load(), expected)


def test_written_as_peft_writes(tmp_path: Path) -> None:
    """Names, shapes and config are peft's; q, k and v share one A."""
    lora(tmp_path / "lora", "glm4", lora_dropout=0.1)
    config, state = adapters.read(tmp_path / "lora", CONFIGS["glm4"])
    assert (config.rank, config.alpha, config.dropout) == (3 * RANK, 18.0, 0.1)
    base = open_checkpoint(write(tmp_path / "base", "glm4"))
    peft.write(tmp_path / "out", config, state, base.layout, base.config)
    written = load_file(tmp_path / "out/adapter_model.safetensors")
    read = load_file(tmp_path / "lora/adapter_model.safetensors")
    assert written.keys() == read.keys()
    settings = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert settings["target_modules"] == sorted(TARGETS["glm4"])
    assert (settings["r"], settings["lora_alpha"]) == (3 * RANK, 18)
    attention = "base_model.model.model.layers.0.self_attn"
    q, v = (written[f"{attention}.{p}_proj.lora_A.weight"] for p in "qv")
    assert torch.equal(q, v)


@pytest.mark.parametrize(
    ("changed", "fact"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "peft_type is 'PREFIX_TUNING', only 'LORA' is read"),
        ({"use_dora": True}, "not supported: use_dora=True; merge the adapter with peft"),
        ({"fan_in_fan_out": True, "init_lora_weights": "pissa"}, "True, init_lora_weights='pissa'"),
    ],
)
def test_what_would_be_read_wrong_is_refused(
    changed: dict[str, Any], fact: str, tmp_path: Path
) -> None:
    lora(tmp_path / "lora", "chatglm2", **changed)
    with pytest.raises(CheckpointError, match=re.escape(fact)):
        adapters.read(tmp_path / "lora", CONFIGS["chatglm2"])


def test_what_does_not_belong_to_the_base_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "lora"
    lora(folder, "chatglm2")
    with pytest.raises(CheckpointError, match="give the base too"):
        adapters.read(folder)
    with pytest.raises(CheckpointError, match="are not modules of this base in any layout"):
        adapters.read(folder, CONFIGS["chatglm-6b"])
    wider = dataclasses.replace(CONFIGS["chatglm2"], num_kv_heads=8)
    with pytest.raises(CheckpointError, match=r"a layer of \[96, 32\], the base has \[192, 32\]"):
        adapters.read(folder, wider)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.transformer.output_layer.weight"] = torch.zeros(2)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"lora_B of linear layers alone, found .*output_la"):
        adapters.read(folder, CONFIGS["chatglm2"])
    small = write(tmp_path / "small", "glm-130b", bits=4)
    convert = ["checkpoint", "convert", str(small), str(tmp_path / "out"), "--merge", str(folder)]
    (folder / "adapter_model.safetensors").unlink()
    assert main(convert) == 2
    assert "holds adapter_config.json but no adapter_model.safetensors" in capsys.readouterr().err
