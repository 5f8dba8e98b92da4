"""A checkpoint that cannot be used raises one CheckpointError that names file, key and shapes, and
what to do."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign import DESCRIPTIONS, ranks_of, write
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from glm_core.errors import CheckpointError
from glm_core.pretrained.weights.configs import read_config
from glm_core.pretrained.weights.layouts import find_layout
from glm_core.pretrained.weights.reading import open_checkpoint

SHARD = "49300/mp_rank_01_model_states.pt"


def refused(path: Path, *message: str) -> None:
    """Asserts that the error is one line that contains all of these."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    told = str(caught.value)
    assert "\n" not in told
    for text in message:
        assert text in told, told


def edit(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON file; None removes a key."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


@pytest.mark.parametrize("kept", [0, 1, 7, 200, 0.5, 0.99])
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("glm", "model-00002-of-00002.safetensors"),
        ("chatglm2", "pytorch_model-00001-of-00002.bin"),
        ("glm-130b", SHARD),
    ],
)
def test_truncated(tmp_path: Path, name: str, file: str, kept: float) -> None:
    folder = write(tmp_path / "c", name, 2 if name == "glm-130b" else 1)
    size = (folder / file).stat().st_size
    os.truncate(folder / file, int(kept if kept >= 1 or not kept else size * kept))
    refused(folder, file.rpartition("/")[2], "truncated", "fetch it again")


def test_everything_that_does_not_fit_is_told_at_once(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", "glm")
    for file in folder.glob("*.safetensors"):
        state = load_file(file)
        if "lm_head.weight" in state:
            state["strange"] = state.pop("model.norm.weight")
            state["lm_head.weight"] = state["lm_head.weight"][:, :16].clone()
        save_file(state, file)
    (folder / "model.safetensors.index.json").unlink()
    refused(
        folder,
        "1 missing (model.norm.weight)",
        "1 unexpected (strange in model-0000",
        "lm_head.weight in model-0000",
        "is [96, 16], expected [96, 32]",
        "layout glm ",
    )


def test_a_shard_of_another_generation(tmp_path: Path) -> None:
    """Shards of another training run have the right shapes, but replicated parameters differ."""
    folder = write(tmp_path / "c", "glm-130b", 2)
    shard = torch.load(folder / SHARD, weights_only=True)
    shard["module"]["transformer.final_layernorm.weight"] += 0.01
    torch.save(shard, folder / SHARD)
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"final_layernorm\.weight differs from rank 0's"):
        checkpoint.load()


def test_shards_of_another_degree(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", "glm-130b", 2)
    wider = ranks_of("glm-130b", 1)[0]
    torch.save({"module": wider}, folder / SHARD)
    refused(folder, "in mp_rank_01_model_states.pt is [96, 32], expected [48, 32]")


def test_a_missing_shard(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", "glm-130b", 8)
    (folder / SHARD).unlink()
    refused(folder, "of 8 shards", "missing: 01", "fetch them")


def test_layouts_mixed(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", "glm4")
    save_file(ranks_of("chatglm2")[0], folder / "other.safetensors")
    (folder / "model.safetensors.index.json").unlink()
    refused(folder, "layout glm4", "unexpected", "these belong to layout chatglm2", "mixed")


def test_two_files_with_one_key(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", "glm4")
    save_file({"model.norm.weight": torch.ones(1)}, folder / "more.safetensors")
    (folder / "model.safetensors.index.json").unlink()
    refused(folder, "model.norm.weight, and so does", "mixes two")


def test_an_index_of_another_generation(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", "glm")
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map={**places, "model.more.weight": "model-00001-of-00002.safetensors"})
    refused(folder, "model.more.weight in model-00001-of-00002", "different checkpoints")
    edit(index, weight_map={**places, "a": "gone.safetensors", "b": "../up.safetensors"})
    refused(folder, "not here: ../up.safetensors, gone.safetensors", "fetch them")
    index.write_text("[]")
    refused(folder, "expected a JSON object, found list")
    index.write_text('{"weight_map": 3}')
    refused(folder, "no weight_map")


def test_the_newer_of_two_saves_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A single file beside the shards of an older save wins, as in transformers; both formats and
    every way to shard. What is not read is named."""
    folder = write(tmp_path / "c", "glm")
    open_checkpoint(folder)
    assert capsys.readouterr().err == ""
    newer = {key: value + 1 for key, value in ranks_of("glm")[0].items()}
    save_file(newer, folder / "model.safetensors")
    for name in ("pytorch_model.bin", "mp_rank_00_model_states.pt"):
        torch.save({"old": torch.ones(1)}, folder / name)
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    (folder / "latest").write_text("1\n")
    (folder / "1").mkdir()
    torch.save(ranks_of("glm")[0], folder / "1/mp_rank_00_model_states.pt")
    checkpoint = open_checkpoint(folder)
    assert torch.equal(checkpoint.tensor("embedding"), newer["model.embed_tokens.weight"])
    assert set(checkpoint.files.leftovers) == {
        *(f"model-0000{i}-of-00002.safetensors" for i in (1, 2)),
        *("model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
        "mp_rank_00_model_states.pt",
    }
    said = capsys.readouterr().err
    assert "reads model.safetensors, as transformers does; not read: " in said
    assert "and 2 more (remove what is old)" in said


def test_an_index_wins_over_another_format(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", "glm")
    torch.save({"old": torch.ones(1)}, folder / "pytorch_model.bin")
    assert open_checkpoint(folder).files.leftovers == ("pytorch_model.bin",)


class Malice:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "c", "glm-130b", 2)
    torch.save({"module": Malice()}, folder / SHARD, _use_new_zipfile_serialization=zipped)
    refused(folder, "mp_rank_01", "would run code", "system", "refused; save model.state_dict()")
    (folder / SHARD).write_bytes(pickle.dumps(Malice()))
    refused(folder, "mp_rank_01")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("name", "begin", "fact"),
    [
        ("model.gguf", b"GGUF\3\0", "is llama.cpp's format GGUF, which is not read; give"),
        ("model.bin", b"lmgg\1\0", "is a file of ggml (chatglm.cpp)"),
        ("model.bin", b"\x89HDF\r\n", "is TensorFlow's HDF5"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_other_formats_are_named(tmp_path: Path, name: str, begin: bytes, fact: str) -> None:
    (tmp_path / name).write_bytes(begin + bytes(64))
    refused(tmp_path, name, fact)
    refused(tmp_path / name, name, fact)


def test_training_state_beside_the_weights_is_read_over(tmp_path: Path) -> None:
    """SAT and DeepSpeed save arguments and random states with a checkpoint."""
    folder = write(tmp_path / "c", "glm-130b", 2)
    shard = torch.load(folder / SHARD, weights_only=True)
    shard |= {
        "args": argparse.Namespace(lr=0.1),
        "np_rng_state": np.random.get_state(),
        "random_rng_state": random.getstate(),
    }
    torch.save(shard, folder / SHARD)
    assert open_checkpoint(folder).num_ranks == 2


def test_a_file_of_before_torch_1_6(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", "glm-130b", 2)
    shard = torch.load(folder / SHARD, weights_only=True)
    torch.save(shard, folder / SHARD, _use_new_zipfile_serialization=False)
    checkpoint = open_checkpoint(folder)
    key = checkpoint.layout.keys("embedding", checkpoint.config)[0]
    assert torch.equal(checkpoint.tensor("embedding")[48:], shard["module"][key])


@pytest.mark.parametrize("content", [[torch.ones(1)], {"module": {"a": 3}}, {"module": {}}, 4])
def test_not_a_table_of_tensors(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "not a table of tensors by name")


def test_no_glm(tmp_path: Path) -> None:
    save_file({"gpt.wte.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    refused(tmp_path, "holds no GLM", "gpt.wte.weight", "known: glm (")
    refused(tmp_path / "nothing", "no such file or folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no checkpoint", "expected one of model.safetensors, ")
    (tmp_path / "empty/latest").write_text("../up")
    refused(tmp_path / "empty", "latest", "'../up', which is not beside it")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "glm-block",
            {"hidden_size": None, "vocab_size": None},
            "hidden_size is missing; vocab_size",
        ),
        ("glm", {"model_type": "llama"}, "model_type is 'llama', only 'glm' is known"),
        ("glm", {"hidden_act": "gelu"}, "hidden_act is 'gelu', only 'silu' or 'swish' is"),
        ("glm", {"hidden_size": "wide"}, "hidden: expected int, received 'wide'"),
        ("glm", {"num_key_value_heads": 3}, "num_kv_heads=3 does not divide num_heads=8"),
        ("glm", {"num_hidden_layers": 10**9}, "1000000000 layers, but the files hold only"),
        ("glm", {"hidden_size": 1 << 62}, "impossible model"),
        ("glm", {"num_hidden_layers": 3}, "missing (model.layers.2."),
        (
            "glm",
            {"rope_scaling": {"type": "longrope"}},
            "rope_scaling.rope_type is 'longrope'; known",
        ),
        ("glm", {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        (
            "glm",
            {"rope_scaling": {"factor": 4}},
            "rope_scaling.factor is not known for rope_type 'd",
        ),
        ("glm", {"rope_scaling": {"type": "linear", "factor": "4"}}, "factor: expected a number"),
        ("glm", {"rope_scaling": [4]}, "rope_scaling is [4], expected a table"),
        (
            "glm",
            {"sliding_window": 64},
            "unknown keys that may change the result: sliding_window=64",
        ),
        (
            "glm",
            {"quantization_config": {"bits": 4}},
            "quantization_config is {'bits': 4}, only None",
        ),
        ("chatglm2", {"original_rope": False}, "original_rope is False, only True is known"),
        ("chatglm2", {"multi_query_attention": None}, "multi_query_attention is False, only True"),
        ("chatglm2", {"fp32_residual_connection": True}, "fp32_residual_connection is True"),
        ("chatglm-6b", {"pre_seq_len": 128}, "pre_seq_len is 128"),
        ("glm-block", {"window": 3}, "unknown keys that may change the result: window=3"),
        ("chatglm2", {"rmsnorm": False}, "rmsnorm is False"),
        ("chatglm2", {"rope_ratio": "x"}, "rope_base: expected float, received 'x'"),
        ("chatglm2", {"ffn_hidden_size": True}, "ffn: expected int, received True"),
        ("chatglm-6b", {"position_encoding_2d": False}, "position_encoding_2d is False"),
        ("chatglm-6b", {"num_attention_heads": 3}, "does not divide hidden=64"),
    ],
)
def test_configs(tmp_path: Path, name: str, change: dict[str, Any], message: str) -> None:
    folder = write(tmp_path / "c", name)
    edit(folder / "config.json", **change)
    refused(folder, message)


PUBLISHED = {
    "chatglm2": """add_bias_linear add_qkv_bias=true apply_query_key_layer_scaling=true
    apply_residual_connection_post_layernorm attention_dropout=0.0 attention_softmax_in_fp32=true
    bias_dropout_fusion=true classifier_dropout=null ffn_hidden_size=13696
    fp32_residual_connection hidden_dropout=0.0 hidden_size=4096 kv_channels=128
    layernorm_epsilon=1.5625e-07 multi_query_attention=true multi_query_group_num=2
    num_attention_heads=32 num_hidden_layers=40 num_layers=40 original_rope=true
    padded_vocab_size=151552 post_layer_norm=true pre_seq_len=null prefix_projection
    quantization_bit=0 rmsnorm=true rope_ratio=500 seq_length=131072 tie_word_embeddings
    torch_dtype="bfloat16" transformers_version="4.42.4" use_cache=true vocab_size=151552""",
    "chatglm-6b": """bos_token_id=130004 gmask_token_id=130001 hidden_size=4096 use_cache=true
    inner_hidden_size=16384 layernorm_epsilon=1e-05 mask_token_id=130000 max_sequence_length=2048
    num_attention_heads=32 num_layers=28 pad_token_id=3 position_encoding_2d=true pre_seq_len=null
    prefix_projection quantization_bit=0 torch_dtype="float16" vocab_size=130528""",
    "glm-block": """attention_dropout_prob=0.1 attention_scale=1.0 block_position_encoding=true
    checkpoint_activations checkpoint_num_layers=1 embedding_dropout_prob=0.1 hidden_size=4096
    initializer_range=0.02 max_sequence_length=1024 num_attention_heads=64 num_layers=48
    output_dropout_prob=0.1 output_predict=true parallel_output=true pool_token="cls"
    relative_encoding spell_func="lstm" spell_length=null vocab_size=50304""",
    "sat-chatglm-6b": """tokenizer_type="x" num_layers=28 hidden_size=4096 num_attention_heads=32
    vocab_size=130528 layernorm_order="post" model_parallel_size=1 max_sequence_length=2048
    inner_hidden_size=16384 layernorm_epsilon=1e-05 position_encoding_2d=true skip_init=true
    hidden_dropout=0.1 use_gpu_initialization=true eos_token_id=130005""",
}
"""the keys of published configs, GLM-4-9B-chat's first; one without a value is false"""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_have_no_unknown_key(name: str) -> None:
    pairs = (entry.partition("=") for entry in PUBLISHED[name].split())
    values = {key: json.loads(value or "false") for key, _, value in pairs}
    assert read_config(find_layout(name), values, Path("config.json")).hidden == 4096


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.data())
def test_any_config_is_a_model_or_an_error(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(DESCRIPTIONS)))
    values = dict(DESCRIPTIONS[name])
    odd = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-4, 2**70),
        st.floats(),
        st.text(max_size=3),
        st.lists(st.integers(), max_size=1),
        st.dictionaries(st.just("rope_theta"), st.integers()),
    )
    values |= data.draw(st.dictionaries(st.sampled_from(sorted(values)), odd, max_size=3))
    message = ""
    try:
        read_config(find_layout(name), values, Path("config.json"))
    except CheckpointError as error:
        message = str(error)
    assert message.startswith("config.json: does not describe a model of layout" if message else "")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Writes one checkpoint of each format."""
    root = tmp_path_factory.mktemp("fuzz")
    return [write(root / "a", "glm"), write(root / "b", "glm-130b", 2)]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_any_damage_is_an_error_or_harmless(sound: list[Path], data: st.DataObject) -> None:
    """Changed bytes in headers of either format raise no other exception, and need no huge
    memory."""
    folder = data.draw(st.sampled_from(sound))
    file = next(f for f in sorted(folder.rglob("*")) if f.suffix in (".safetensors", ".pt"))
    original = file.read_bytes()
    damaged = bytearray(original)
    end = min(len(damaged), 3000)
    places = st.integers(0, end - 1) | st.integers(-min(1500, len(damaged)), -1)
    for place, byte in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=6)):
        damaged[place] = byte
    message = ""
    try:
        file.write_bytes(damaged)
        checkpoint = open_checkpoint(folder)
        for name in checkpoint.shapes:
            checkpoint.tensor(name)
    except CheckpointError as error:
        message = str(error)
    finally:
        file.write_bytes(original)
    assert not message or file.name in message or str(folder) in message


def test_a_header_that_claims_too_much(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    refused(file, "truncated or not safetensors")
    text = json.dumps(
        {"embedding": {"dtype": "F16", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 16]}}
    ).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    refused(file, "truncated or not safetensors")
