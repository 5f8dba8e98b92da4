"""`glm-core checkpoint` inspects, converts and refuses checkpoints, and converts adapters."""

from __future__ import annotations

import json
import pydoc_data.topics
from pathlib import Path

import pytest
from foreign import write

from glm_core.cli import checkpoint, main
from glm_core.config import load
from glm_core.pretrained import adapters
from glm_core.pretrained.weights.layouts import LAYOUTS
from glm_core.pretrained.weights.reading import open_checkpoint


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(write(tmp_path / "c", "glm-130b", 8, 4))
    assert main(["checkpoint", "inspect", folder, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["layout"], facts["ranks"], facts["files"]) == ("glm-130b", 8, 8)
    assert (facts["quantized_bits"], facts["dtypes"]) == (4, ["float16", "int8"])
    assert (facts["parameters"], facts["config"]["num_heads"]) == (21312, 8)
    assert main(["checkpoint", "inspect", folder]) == 0
    assert "GLM-130B, SwissArmyTransformer shards" in capsys.readouterr().out


def test_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = str(write(tmp_path / "c", "glm-130b", 8, 4)), str(tmp_path / "out")
    command = ["checkpoint", "convert", source, out, "--tp", "2", "--dtype", "bfloat16"]
    assert main([*command, "--dequantize", "--json"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["ranks"] == 2
    assert "54/54 transformer.final_layernorm.bias of rank 1" in output.err
    assert main(["checkpoint", "inspect", out, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["ranks"], facts["quantized_bits"], facts["dtypes"]) == (2, None, ["bfloat16"])
    assert main([*command, "--dequantize"]) == 2
    assert "exists; choose a new folder" in capsys.readouterr().err


def test_refusals_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(write(tmp_path / "c", "glm-130b", 8, 4))
    assert main(["checkpoint", "convert", source, str(tmp_path / "o"), "--to", "nope"]) == 2
    assert "unknown layout 'nope'; known: chatglm-6b, chatglm2" in capsys.readouterr().err
    (Path(source) / "model_config.json").unlink()
    assert main(["checkpoint", "inspect", source]) == 2
    assert "no config.json" in capsys.readouterr().err
    assert main(["checkpoint", "inspect", source, "--preset", "glm-130b"]) == 2
    message = capsys.readouterr().err
    assert "70 layers" in message
    assert message.count("\n") == 1


def test_help_names_every_layout() -> None:
    assert sorted(checkpoint.LAYOUTS.split(", ")) == sorted(item.name for item in LAYOUTS)


def test_adapters_beside_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run's checkpoint as the base stays unchanged; the adapter is saved in a file of its own."""
    text = "\n\n".join(list(pydoc_data.topics.topics.values())[:20])
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    sizes = ("model.num_layers=1", "model.hidden=32", "data.length=32", "data.vocab=512")
    small = ["--backend", "reference", "--steps", "2", "--data", str(tmp_path / "text.txt")]
    for size in sizes:
        small += ["--set", size]
    base, tuned = str(tmp_path / "base"), str(tmp_path / "tuned")
    assert main(["train", *small, "--out", base]) == 0
    [saved] = (tmp_path / "base/checkpoints").glob("*.safetensors")
    before = saved.read_bytes()
    command = ["train", *small, "--adapter", "lora", "--rank", "2", "--out", tuned]
    assert main(command) == 2
    assert "train --adapter: needs --base PATH" in capsys.readouterr().err
    assert main(["train", *small, "--base", base, "--out", tuned]) == 2
    assert "train --base: needs --adapter lora or ptuning" in capsys.readouterr().err
    assert main([*command, "--base", base, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert saved.read_bytes() == before
    model = load(f"{tuned}/config.toml").model
    checkpoint = open_checkpoint(f"{base}/checkpoints", model)
    assert checkpoint.layout.name == "glm-core"
    plain = checkpoint.load()
    assert adapters.load_adapter(facts["adapter"], plain).rank == 2
    prompt = ["generate", "--run", base, "--prompt", "The", "--max-tokens", "9", "--json"]
    prompt += ["--temperature", "9"]
    assert main([*prompt, "--adapter", tuned]) == 0
    capsys.readouterr()

    prefix = ["--adapter", "ptuning", "--prefix-length", "3", "--prefix-projection"]
    prefix += ["--dropout", "0.1", "--out", tuned + "2", "--base", base]
    text = "\n\n".join(list(pydoc_data.topics.topics.values())[20:40])
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    assert main(["train", *small, *prefix, "--compile"]) == 2
    assert "which torch.compile cannot trace; leave compile out" in capsys.readouterr().err
    assert main(["train", *small, *prefix]) == 0
    tokenizers = [(tmp_path / run / "tokenizer.model").read_bytes() for run in ("base", "tuned2")]
    assert tokenizers[0] == tokenizers[1]  # another text, in the base's tokens
    assert main(["checkpoint", "adapter", tuned + "2", str(tmp_path / "pytorch_model.bin")]) == 0
    assert "prefix.outer.weight      [256, 32]" in capsys.readouterr().out
    assert main(prompt) == 0
    texts = [json.loads(capsys.readouterr().out)["text"]]
    for adapter in (tuned + "2", str(tmp_path / "pytorch_model.bin")):
        assert main([*prompt, "--adapter", adapter]) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] != texts[1] == texts[2]
    assert main(["quantize", tuned]) == 2
    assert "it holds adapters without their base" in capsys.readouterr().err
