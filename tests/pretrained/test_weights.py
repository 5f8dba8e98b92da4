"""Checkpoints of every layout are read, merged, cut and written back; impossible targets are
refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from foreign import CONFIGS, STATES, L, ranks_of, weights, write
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from glm_core.config import DataConfig, ModelConfig, RunConfig, to_dict
from glm_core.distributed.checkpoint import Checkpoints
from glm_core.errors import CheckpointError
from glm_core.model.adapters import AdapterConfig, attach
from glm_core.model.glm import GLM
from glm_core.model.quantize import Quantization, QuantizedLinear
from glm_core.model.quantize import convert as in_place
from glm_core.ops.quant import dequantize
from glm_core.pretrained.weights.reading import open_checkpoint
from glm_core.pretrained.weights.writing import convert, target

SHARDED = ("glm-130b", "sat-chatglm-6b", "glm-block")
CASES = [(name, 1) for name in STATES] + [(name, size) for name in SHARDED for size in (2, 8)]


def stored(folder: Path) -> list[dict[str, Tensor]]:
    """Returns all tensors of a written checkpoint, by rank, read without our reader."""
    shards = sorted(folder.rglob("mp_rank_*.pt"))
    if shards:
        return [torch.load(f, weights_only=True)["module"] for f in shards]
    state = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            state |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return [state]


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype, key
        assert torch.equal(actual[key], value), key


@pytest.mark.parametrize(("name", "size"), CASES)
def test_reads_every_layout(tmp_path: Path, name: str, size: int) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "c", name, size))
    assert (checkpoint.layout.name, checkpoint.num_ranks) == (name, size)
    assert checkpoint.config == CONFIGS[name]
    assert_same({n: checkpoint.tensor(n) for n in checkpoint.shapes}, weights(name))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("stored_ranks", [1, 2, 8])
@pytest.mark.parametrize("name", SHARDED)
def test_any_tp_degree_to_any_other(
    tmp_path: Path, name: str, stored_ranks: int, size: int
) -> None:
    source = open_checkpoint(write(tmp_path / "from", name, stored_ranks))
    convert(source, tmp_path / "to", target(name, num_ranks=size))
    for actual, expected in zip(stored(tmp_path / "to"), ranks_of(name, size), strict=True):
        assert_same(actual, expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("stored_ranks", "size"), [(2, 2), (2, 8), (8, 8), (1, 4)])
def test_quantized_shards_are_cut(tmp_path: Path, bits: int, stored_ranks: int, size: int) -> None:
    """Cutting to the same or a higher degree is exact: each part of a row gets the row's scales."""
    source = open_checkpoint(write(tmp_path / "from", "glm-130b", stored_ranks, bits))
    assert source.bits == bits
    convert(source, tmp_path / "to", target("glm-130b", num_ranks=size))
    again = open_checkpoint(tmp_path / "to")
    for name in source.shapes:
        assert torch.equal(again.dense(name), source.dense(name)), name


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_weights_are_near_the_originals(tmp_path: Path, bits: int) -> None:
    """Dequantized values lie within half a step of each row's scale; nibbles or groups in a wrong
    order would be off by far more."""
    checkpoint = open_checkpoint(write(tmp_path / "c", "glm-130b", 2, bits))
    original = weights("glm-130b")
    for name in checkpoint.shapes:
        if not checkpoint.quantized(name):
            assert torch.equal(checkpoint.dense(name), original[name])
            continue
        scale = checkpoint.scale(name).float().reshape(len(original[name]), -1)
        each = scale.repeat_interleave(original[name].shape[1] // scale.shape[1], 1)
        off = (checkpoint.dense(name).float() - original[name].float()).abs()
        assert (off <= each * 0.51 + 1e-3 * original[name].float().abs()).all(), name


def test_merged_column_shards_keep_a_scale_each(tmp_path: Path) -> None:
    source = open_checkpoint(write(tmp_path / "from", "glm-130b", 2, 4))
    assert source.scale("blocks.0.mlp.down.weight").shape == (32, 2)
    assert source.scale("blocks.0.mlp.up.weight").shape == (96,)
    with pytest.raises(CheckpointError, match="one scale a row, but 2 ranks"):
        convert(source, tmp_path / "to", target("glm-130b"))
    convert(source, tmp_path / "ours", target("glm-core"))
    again = open_checkpoint(tmp_path / "ours")
    for name in source.shapes:
        assert torch.equal(again.dense(name), source.dense(name)), name


@pytest.mark.parametrize("name", STATES)
def test_written_back_bit_equal(tmp_path: Path, name: str) -> None:
    """A checkpoint is bit-equal after the way through our own layout, and in several files."""
    source = open_checkpoint(write(tmp_path / "from", name))
    convert(source, tmp_path / "ours", target("glm-core"))
    assert_same(stored(tmp_path / "ours")[0], weights(name))
    convert(open_checkpoint(tmp_path / "ours"), tmp_path / "back", target(name))
    expected = {k: v for k, v in ranks_of(name)[0].items() if "inv_freq" not in k}
    assert_same(stored(tmp_path / "back")[0], expected)
    assert open_checkpoint(tmp_path / "back").config == CONFIGS[name]
    convert(source, tmp_path / "same", target(name, shard_bytes=20_000))
    assert_same(stored(tmp_path / "same")[0], ranks_of(name)[0])


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_chatglm_is_written_back(tmp_path: Path, bits: int) -> None:
    source = open_checkpoint(write(tmp_path / "from", "chatglm-6b", 1, bits))
    convert(source, tmp_path / "ours", target("glm-core"))
    convert(open_checkpoint(tmp_path / "ours"), tmp_path / "back", target("chatglm-6b"))
    assert_same(stored(tmp_path / "back")[0], ranks_of("chatglm-6b", 1, bits)[0])
    assert json.loads((tmp_path / "back/config.json").read_text())["quantization_bit"] == bits


def test_chatglm_to_transformers_and_back(tmp_path: Path) -> None:
    source = open_checkpoint(write(tmp_path / "from", "chatglm2"))
    convert(source, tmp_path / "hf", target("glm"))
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["eos_token_id"], config["rope_parameters"]["rope_theta"]) == (91, 30000.0)
    convert(open_checkpoint(tmp_path / "hf"), tmp_path / "back", target("chatglm2"))
    expected = {k: v for k, v in ranks_of("chatglm2")[0].items() if "inv_freq" not in k}
    assert_same(stored(tmp_path / "back")[0], expected)
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert (config["rope_ratio"], config["pad_token_id"]) == (3.0, 3)


def test_load_fills_the_model(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "c", "glm-130b", 8, 8))
    model = checkpoint.load(torch.float32)
    for name, p in model.named_parameters():
        assert p.dtype == torch.float32
        assert torch.equal(p, checkpoint.dense(name).float()), name


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("stored_ranks", [1, 2])
def test_load_keeps_the_codes(tmp_path: Path, bits: int, stored_ranks: int) -> None:
    """The codes of merged shards, groups of scales included, compute the same as their dequantized
    values, and accept LoRA."""
    checkpoint = open_checkpoint(write(tmp_path / "c", "glm-130b", stored_ranks, bits))
    model, unrounded = (checkpoint.load(torch.float64, quantized=q) for q in (True, False))
    assert len([b for b in model.buffers() if b.dtype == torch.int8]) == 8
    for name in filter(checkpoint.quantized, checkpoint.shapes):
        stored = checkpoint.tensor(name), checkpoint.scale(name)
        unrounded.get_parameter(name).data = dequantize(*stored, bits, torch.float64)
    i = torch.arange(9)[None]
    inputs = i * 5, torch.stack((i, i), 1), torch.zeros_like(i).int(), (i + 1).int()
    actual = model.logits(*inputs)
    torch.testing.assert_close(actual, unrounded.logits(*inputs))
    attach(model, AdapterConfig(rank=2))
    assert torch.equal(model.logits(*inputs), actual)


def test_a_rank_reads_only_its_part(tmp_path: Path) -> None:
    """Of 8 stored ranks, rank 1 of 4 reads files 2 and 3 only: the others may be missing."""
    folder = write(tmp_path / "c", "glm-130b", 8)
    checkpoint = open_checkpoint(folder)
    whole = {n: checkpoint.tensor(n, 1, 4) for n in checkpoint.shapes}
    for r in (0, 1, 4, 5, 6, 7):
        (folder / f"49300/mp_rank_{r:02d}_model_states.pt").unlink()
    assert_same({n: checkpoint.tensor(n, 1, 4) for n in checkpoint.shapes}, whole)


def test_dtype_and_dequantize(tmp_path: Path) -> None:
    source = open_checkpoint(write(tmp_path / "from", "chatglm-6b", 1, 4))
    wanted = target("chatglm-6b", dtype=torch.bfloat16, dequantize=True)
    convert(source, tmp_path / "to", wanted)
    again = open_checkpoint(tmp_path / "to")
    assert again.bits is None
    for name in source.shapes:
        assert torch.equal(again.tensor(name), source.dense(name).bfloat16()), name


@pytest.mark.parametrize(
    ("name", "to", "quantization"),
    [
        ("glm", "glm-core", Quantization(bits=4, activation_bits=8)),
        ("chatglm-6b", "chatglm-6b", Quantization(bits=4)),
        ("chatglm2", "chatglm2", Quantization(bits=8)),
    ],
)
def test_quantized_on_the_way(
    tmp_path: Path, name: str, to: str, quantization: Quantization
) -> None:
    """The written file loads without the float weights, as the same model as quantizing in
    memory."""
    source = open_checkpoint(write(tmp_path / "from", name))
    (tmp_path / "from/tokenizer.model").write_bytes(b"pieces")
    convert(source, tmp_path / "to", target(to, quantize=quantization))
    assert (tmp_path / "to/tokenizer.model").read_bytes() == b"pieces"
    again = open_checkpoint(tmp_path / "to")
    assert again.bits == quantization.bits
    actual, expected = again.load(quantized=True), source.load()
    list(in_place(expected, quantization))
    assert_same(actual.state_dict(), expected.state_dict())
    assert {m.quantization for m in actual.modules() if isinstance(m, QuantizedLinear)} == {
        quantization
    }


def test_groups_are_written_and_found_again(tmp_path: Path) -> None:
    config = ModelConfig(num_layers=1, hidden=64, num_heads=2, ffn=96, vocab=64, max_length=16)
    model, quantization = GLM(config).init_weights(0), Quantization(bits=4, group=32)
    save_file({k: p.detach() for k, p in model.named_parameters()}, tmp_path / "model.safetensors")
    convert(
        open_checkpoint(tmp_path, config), tmp_path / "o", target("glm-core", quantize=quantization)
    )
    actual = open_checkpoint(tmp_path / "o").load(quantized=True)
    list(in_place(model, quantization))
    assert_same(actual.state_dict(), model.state_dict())
    assert {m.quantization for m in actual.modules() if isinstance(m, QuantizedLinear)} == {
        quantization
    }


@pytest.mark.parametrize(
    ("name", "to", "quantization", "words"),
    [
        ("glm", "glm", Quantization(bits=4), "layout glm has no quantized form; use glm-core"),
        ("chatglm2", "chatglm2", Quantization(group=32), "one scale a row .* use glm-core"),
        ("glm", "glm-core", Quantization(group=128), "groups of 128 do not divide hidden="),
    ],
)
def test_rules_that_a_layout_cannot_hold(
    tmp_path: Path, name: str, to: str, quantization: Quantization, words: str
) -> None:
    with pytest.raises(CheckpointError, match=words):
        convert(
            open_checkpoint(write(tmp_path / "c", name)),
            tmp_path / "o",
            target(to, quantize=quantization),
        )
    assert not (tmp_path / "o").exists()


def test_codes_are_not_quantized_twice(tmp_path: Path) -> None:
    source = open_checkpoint(write(tmp_path / "c", "chatglm-6b", 1, 4))
    wanted = target("glm-core", quantize=Quantization(bits=8))
    with pytest.raises(CheckpointError, match="holds int4 codes already; add --dequantize"):
        convert(source, tmp_path / "o", wanted)
    convert(source, tmp_path / "o", dataclasses.replace(wanted, dequantize=True))
    assert open_checkpoint(tmp_path / "o").bits == 8


def test_a_stored_head_is_never_tied(tmp_path: Path) -> None:
    """Old files of tied models hold both embedding and head; the stored head is used."""
    folder = write(tmp_path / "c", "glm")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert not open_checkpoint(folder).config.tied_head


def test_a_head_equal_to_the_embedding_is_loaded_once(tmp_path: Path) -> None:
    """ChatGLM-6B's files store both, 1.07 GB each."""
    folder = write(tmp_path / "c", "chatglm-6b", 1, 4)
    files = sorted(folder.glob("*.bin"))
    states = [torch.load(f, weights_only=True) for f in files]
    [embedding] = [v for s in states for k, v in s.items() if k.endswith("word_embeddings.weight")]
    tokens = torch.arange(4)[None]
    inputs = (tokens, tokens[:, None].expand(1, 2, 4), tokens.int() * 0, tokens.int() + 1)
    for equal in (False, True):
        if equal:
            for file, state in zip(files, states, strict=True):
                if "lm_head.weight" in state:
                    torch.save({**state, "lm_head.weight": embedding.clone()}, file)
        source = open_checkpoint(folder)
        assert not source.config.tied_head  # what is written again has both, as the source
        model = source.load(torch.float32, quantized=True)
        assert (model.head is None) == model.config.tied_head == equal
        assert torch.equal(model.head_weight, source.tensor("head").float())
        assert model.logits(*inputs).isfinite().all()


def test_a_config_can_be_given(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", "glm-130b", 2)
    (folder / "model_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json .* name a preset"):
        open_checkpoint(folder)
    inputs = dataclasses.replace(CONFIGS["glm-130b"], embedding_gradient_shrink=0.1)
    assert open_checkpoint(folder, inputs).config == inputs


@pytest.mark.parametrize(
    ("name", "to", "message"),
    [
        ("chatglm-6b", "glm", "cannot express .*positions=rope_2d"),
        ("chatglm2", "chatglm-6b", "no grouped queries, the model has num_kv_heads=2"),
        ("glm4", "glm", "cannot express placement=sandwich"),
    ],
)
def test_a_layout_that_cannot_hold_the_model(
    tmp_path: Path, name: str, to: str, message: str
) -> None:
    source = open_checkpoint(write(tmp_path / "from", name))
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "to", target(to))
    assert [f.name for f in tmp_path.iterdir()] == ["from"]


def test_refused_targets(tmp_path: Path) -> None:
    source = open_checkpoint(write(tmp_path / "from", "chatglm2"))
    with pytest.raises(CheckpointError, match="has no tensor-parallel shards"):
        convert(source, tmp_path / "to", target("glm", num_ranks=2))
    with pytest.raises(CheckpointError, match="exists; choose a new folder"):
        convert(source, tmp_path / "from", target("glm"))
    with pytest.raises(CheckpointError, match=r"unknown layout 'glm5'.*did you mean glm"):
        target("glm5")
    sat = open_checkpoint(write(tmp_path / "sat", "glm-130b"))
    with pytest.raises(CheckpointError, match="3 tensor-parallel ranks do not divide num_heads=8"):
        convert(sat, tmp_path / "to", target("glm-130b", num_ranks=3))


@pytest.mark.parametrize("name", ["chatglm-6b", "sat-chatglm-6b", "glm-130b", "chatglm2"])
def test_frequencies_are_those_of_the_authors_code(tmp_path: Path, name: str) -> None:
    """modeling_chatglm.py of ChatGLM-6B and SAT round them to float16; ChatGLM2 does not."""
    model = open_checkpoint(write(tmp_path / "c", name)).load(torch.float32)
    c = model.config
    dim = c.head_dim // 2 if c.positions == "rope_2d" or name == "chatglm2" else c.head_dim
    inverse = 1.0 / (c.rope_base ** (torch.arange(0, dim, 2).float() / dim))
    if name != "chatglm2":
        assert not torch.equal(inverse, inverse.half().float())
        inverse = inverse.half().float()
    positions = torch.arange(L).expand(1, 2, L)
    cos, _ = model.rotary(positions)
    assert torch.equal(cos[0, :, 0], torch.outer(torch.arange(L).float(), inverse).cos())


def test_a_run_of_many_processes_is_read(tmp_path: Path) -> None:
    """Its tensors are put together from the files of all ranks; damage is named."""
    config = RunConfig(model=CONFIGS["glm-130b"], data=DataConfig(length=L, vocab=96))
    tensors = {f"master.{k}": v.float() for k, v in weights("glm-130b").items()}
    tensors["exp_avg.embedding"] = torch.ones(3)
    checkpoints = Checkpoints(tmp_path / "run/checkpoints")
    checkpoints.save(7, tensors, {"config": to_dict(config)})
    folder = checkpoints.wait()
    assert folder is not None
    for path in (tmp_path / "run", folder):
        model = open_checkpoint(path).load()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, tensors[f"master.{name}"])
    assert open_checkpoint(folder).files.home == tmp_path / "run"
    [part, *_] = folder.glob("*.distcp")
    part.write_bytes(part.read_bytes()[:-1])
    checkpoint = open_checkpoint(shutil.copytree(folder, tmp_path / "run/checkpoints/copy"))
    with pytest.raises(CheckpointError, match=r"damaged or missing: __0_0\.distcp; use another"):
        checkpoint.load()
