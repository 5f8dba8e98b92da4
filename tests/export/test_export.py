"""The exported file in ONNX Runtime gives the tokens of our generation."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kinds import GREEDY, KINDS, LENGTH, model, prompts, whole

from glm_core import ops
from glm_core.backends import registry
from glm_core.config import ModelConfig, from_dict
from glm_core.errors import CheckpointError, UnsupportedOpError
from glm_core.model.adapters import AdapterConfig, attach
from glm_core.model.generate import generate
from glm_core.model.prompt import Prompt
from glm_core.model.quantize import Quantization, convert

pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")

from glm_core.export.write import cache_names, export  # noqa: E402  # imports onnx

YARN: dict[str, Any] = {
    "rope_scaling": "yarn",
    "rope_factor": 4.0,
    "rope_original_length": 8,
    "rope_attention_factor": 1.2,
}
MOE = {
    "num_experts": 6,
    "experts_per_token": 2,
    "expert_ffn": 16,
    "num_dense_layers": 1,
    "num_shared_experts": 1,
    "expert_groups": 3,
    "top_groups": 2,
    "expert_scale": 1.8,
    "qk_norm": True,
}
LATENT = {
    "kv_latent": 20,
    "q_latent": 12,
    "rope_head_dim": 4,
    "value_head_dim": 6,
    "head_dim": 10,
    "num_kv_heads": 4,
    "rope_fraction": 1.0,
}
FAMILY = [
    *((kind, {}) for kind in KINDS),
    ("glm-4", {"placement": "sandwich", **YARN}),
    ("glm-4", MOE),
    ("glm-4", LATENT),
]
EPS = torch.finfo(torch.float32).eps
DOCS = Path(__file__).parents[2] / "docs/export.md"


def documented() -> Any:
    """Returns the runner that docs/export.md shows."""
    [code] = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, str(DOCS), "exec"), names)
    assert not any(name.startswith("glm_core") for name in re.findall(r"import (\S+)", code))
    return names["Exported"]


class File:
    """An exported file in a session, fed like our Runner."""

    def __init__(self, path: Path) -> None:
        self.session = onnxruntime.InferenceSession(path)
        self.config = json.loads(self.session.get_modelmeta().custom_metadata_map["config"])
        self.cache: dict[str, Any] = {}

    def feed(self, rows: list[tuple[Prompt, int, int, list[int]]]) -> Any:
        """Returns the logits [B, V] after rows of (prompt, pads before it, index of the first
        token, tokens); with the pads of the first call all rows have one length."""
        c, built = self.config, []
        for prompt, pads, first, tokens in rows:
            lead = pads if first == 0 else 0
            places = range(first, first + len(tokens))
            ends = [min(prompt.key_end(p), first + len(tokens)) for p in places]
            built.append(
                (
                    [0] * lead + tokens,
                    np.array([[0, 0]] * lead + [list(prompt.position(p)) for p in places]).T,
                    [pads] * (lead + len(tokens)),
                    [pads] * lead + [pads + e for e in ends],
                )
            )
        names = ("input_ids", "positions", "key_start", "key_end")
        feed = {n: np.array(v) for n, v in zip(names, zip(*built, strict=True), strict=True)}
        kinds = cache_names(config := from_dict(ModelConfig, c))
        empty = np.zeros((len(rows), config.key_heads, 0, config.key_dim), np.float32)
        past = {f"past_key_values.{k}": self.cache.get(k, empty) for k in kinds}
        logits, *cache = self.session.run(
            ["logits", *(f"present.{k}" for k in kinds)], {**feed, **past}
        )
        self.cache = dict(zip(kinds, cache, strict=True))
        return torch.from_numpy(logits)


def margin(logits: torch.Tensor) -> float:
    """Returns the distance between the two largest logits, relative to the largest magnitude."""
    first, second = logits.topk(2).values.tolist()
    return float((first - second) / logits.abs().max())


@pytest.mark.parametrize(
    ("kind", "changes"), FAMILY, ids=[*KINDS, "glm-4-0414", "glm-4.5", "glm-4.7-flash"]
)
def test_tokens_and_logits_are_those_of_our_generation(
    kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """The documented runner gives our greedy tokens. Each logit is within twice our own rounding
    error of float64, and no choice is so close that rounding could change it."""
    built, exact = model(kind, **changes), model(kind, **changes).double()
    path = export(built, tmp_path / "out", stop="[]")
    exported = documented()(path)
    for prompt in prompts(kind):
        with registry.use("cpu"):
            (ours,) = generate(built, [prompt], GREEDY)
        tokens = list(prompt.tokens)
        assert exported.generate(tokens, 12, prompt.sep, prompt.mask) == ours.tokens
        file = File(path)
        seen = [file.feed([(prompt, 0, 0, tokens)])[0]]
        for i, token in enumerate(ours.tokens[:3]):
            seen += [file.feed([(prompt, 0, len(tokens) + i, [token])])[0]]
        for i, logits in enumerate(seen):
            truth = whole(exact, prompt, ours.tokens[:i])
            rounding = float((whole(built, prompt, ours.tokens[:i]) - truth).abs().max())
            floor = 8 * EPS * float(truth.abs().max())
            assert float((logits - truth).abs().max()) <= 2 * rounding + floor
            assert margin(logits) > 100 * EPS


@pytest.mark.parametrize("kind", ["chatglm-6b", "glm-4"])
def test_a_padded_batch_and_a_prompt_in_pieces(kind: str, tmp_path: Path) -> None:
    built, batch = model(kind), prompts(kind)
    path = export(built, tmp_path / "out")
    longest = max(len(p.tokens) for p in batch)
    pads = [longest - len(p.tokens) for p in batch]
    file = File(path)
    first = file.feed([(p, n, 0, list(p.tokens)) for p, n in zip(batch, pads, strict=True)])
    fed = [(p, n, len(p.tokens), [9]) for p, n in zip(batch, pads, strict=True)]
    second = file.feed(fed)
    for i, prompt in enumerate(batch):
        tokens, cut = list(prompt.tokens), max(prompt.sep, 2)
        alone = File(path)
        alone.feed([(prompt, 0, 0, tokens[:cut])])
        logits = [alone.feed([(prompt, 0, cut, tokens[cut:])])[0]] if cut < len(tokens) else []
        logits += [first[i]]
        size = float(first[i].abs().max())
        truth = whole(built, prompt, [])
        assert all(float((x - truth).abs().max()) <= 64 * EPS * size for x in logits)
        truth = whole(built, prompt, [9])
        assert float((second[i] - truth).abs().max()) <= 64 * EPS * size


@pytest.mark.parametrize(
    "quantization",
    [
        Quantization(bits=4, group=32),
        Quantization(bits=4),
        Quantization(bits=8),
        Quantization(bits=8, group=96),
    ],
    ids=str,
)
def test_the_quantized_file_has_the_quantized_models_weights(
    quantization: Quantization, tmp_path: Path
) -> None:
    """With 96 inputs a group has three blocks of 32, and a row ends within a block of 128."""
    built = model("glm-130b", hidden=96, ffn=192, num_heads=4)
    [*_] = convert(built, quantization)
    exported = documented()(export(built, tmp_path / "out"))
    nodes = [n.op_type for n in onnx_graph(tmp_path / "out/model.onnx").node]
    assert nodes.count("MatMulNBits") == 8
    assert "MatMul" not in set(nodes) or nodes.count("MatMul") == 4  # attention's own
    for prompt in prompts("glm-130b"):
        (ours,) = generate(built, [prompt], GREEDY)
        tokens = list(prompt.tokens)
        assert exported.generate(tokens, 12, prompt.sep, prompt.mask) == ours.tokens
        file, truth = File(tmp_path / "out/model.onnx"), whole(built, prompt, [])
        logits = file.feed([(prompt, 0, 0, tokens)])[0]
        assert float((logits - truth).abs().max()) <= 64 * EPS * float(truth.abs().max())
    facts = exported.facts
    assert from_dict(Quantization, json.loads(facts["quantization"])) == quantization
    assert from_dict(ModelConfig, json.loads(facts["config"])) == built.config


def test_experts_in_codes_are_those_of_their_own_layer(tmp_path: Path) -> None:
    sizes = {"num_layers": 3, "hidden": 64, "ffn": 64, "expert_ffn": 32}
    built = model("glm-4", **{**MOE, **sizes})  # two sparse layers
    [*_] = convert(built, Quantization(bits=4, group=32))
    path = export(built, tmp_path / "out")
    for prompt in prompts("glm-4"):
        truth = whole(built, prompt, [])
        logits = File(path).feed([(prompt, 0, 0, list(prompt.tokens))])[0]
        assert float((logits - truth).abs().max()) <= 64 * EPS * float(truth.abs().max())


def onnx_graph(path: Path) -> Any:
    import onnx

    return onnx.load(path, load_external_data=False).graph


def test_weights_are_stored_once_and_apart(tmp_path: Path) -> None:
    """A tied head adds no bytes, and the graph itself is small."""
    built = model("glm-130b", hidden=64, ffn=128)
    path = export(built, tmp_path / "out")
    weights = sum(p.nbytes for p in built.parameters() if p.nbytes > 1024)
    data = path.with_name("model.onnx.data").stat().st_size
    assert weights <= data < weights + 4096 * len(list(built.parameters()))
    assert path.stat().st_size < 100_000
    names = {x.name for x in onnx_graph(path).initializer}
    assert {"embedding", "blocks.1.attention.qkv.weight.turned"} <= names


def test_adapters_go_into_the_file(tmp_path: Path) -> None:
    built = attach(model("glm-4"), AdapterConfig(rank=2))
    with torch.no_grad():
        for name, p in built.named_parameters():
            if "lora_b" in name:
                p.normal_(std=0.2)
    prompt = prompts("glm-4")[2]
    (ours,) = generate(built, [prompt], GREEDY)
    assert ours.tokens != generate(model("glm-4"), [prompt], GREEDY)[0].tokens
    assert (
        documented()(export(built, tmp_path / "out")).generate(list(prompt.tokens), 12)
        == ours.tokens
    )


# --- bad input -----------------------------------------------------------------------------------


def test_refusals(tmp_path: Path, monkeypatch: Any) -> None:
    built, out = model("glm-4"), tmp_path / "out"
    with pytest.raises(UnsupportedOpError, match=r"model is in bfloat16, .* load it as float32"):
        export(model("glm-4").bfloat16(), out)
    tuned = attach(model("glm-4"), AdapterConfig(kind="ptuning", prefix_length=3))
    with pytest.raises(UnsupportedOpError, match="the model has a prefix"):
        export(tuned, out)
    path = export(built, out)
    with pytest.raises(CheckpointError, match="out: exists; choose a new folder"):
        export(built, out)
    exported = documented()(path)
    for tokens in ([], [1] * LENGTH):
        with pytest.raises(ValueError, match=f"tokens: the context is {LENGTH}"):
            exported.generate(tokens, 3)
    assert len(exported.generate([1], 1000)) == LENGTH - 1
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="not written"):
        export(built, tmp_path / "file/out")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UnsupportedOpError, match=r"onnx is not installed; pip install 'glm-core"):
        export(built, tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] in (["out", "file"], ["file", "out"])


def test_an_op_without_translation_is_named(tmp_path: Path) -> None:
    built = model("glm-4")
    built.blocks[0].mlp.activation = lambda x: ops.linear_cross_entropy(x, x, x, x)
    message = "op linear_cross_entropy has no translation to ONNX; add it"
    with pytest.raises(UnsupportedOpError, match=message):
        export(built, tmp_path / "out")
    assert not list(tmp_path.iterdir())
