"""Fine-tuning from Python: the same adapter as by `glm-core train --adapter`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from folders import chatglm3

from glm_core import cli
from glm_core.config import DataConfig, RunConfig, TrainConfig
from glm_core.model.adapters import AdapterConfig
from glm_core.pretrained.adapters import load_adapter, read
from glm_core.pretrained.finetune import finetune
from glm_core.pretrained.load import from_path
from glm_core.pretrained.templates import Message

CONVERSATIONS = [
    [Message("user", "who runs?"), Message("assistant", "the lazy dog")],
    [Message("system", "Be brief."), Message("user", "who?"), Message("assistant", "the fox")],
]
BATCH = {"micro_batch": 2, "global_batch": 2}
CONFIG = RunConfig(
    data=DataConfig(length=48),
    train=TrainConfig(steps=3, warmup_steps=0, backend="reference", **BATCH),
)


def test_python_and_the_command_train_the_same_adapter(tmp_path: Path) -> None:
    base = chatglm3(tmp_path / "base")
    weights = (base / "model.safetensors").read_bytes()
    adapter = AdapterConfig(rank=2)
    result, path = finetune(
        base, tmp_path / "python", CONVERSATIONS, adapter=adapter, config=CONFIG
    )
    assert result.steps == 3
    assert path == tmp_path / "python/adapter.safetensors"
    assert (base / "model.safetensors").read_bytes() == weights
    model = from_path(base).model
    assert load_adapter(path, model) == adapter

    file, out = tmp_path / "pairs.jsonl", tmp_path / "command"
    lines = ({"messages": [m.values for m in messages]} for messages in CONVERSATIONS)
    file.write_text("\n".join(map(json.dumps, lines)))
    fields = ["data.length=48", "train.warmup_steps=0"]
    fields += [f"train.{name}={value}" for name, value in BATCH.items()]
    command = ["train", "--base", base, "--adapter", "lora", "--rank", 2, "--pairs", file]
    command += ["--steps", 3, "--backend", "reference", "--out", out]
    command += [word for field in fields for word in ("--set", field)]
    assert cli.main([str(word) for word in command]) == 0
    config, expected = read(out)
    tensors = read(path)[1]
    assert config == adapter
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert any(tensor.any() for name, tensor in tensors.items() if "lora_b" in name)  # it learned
