"""Configs survive TOML exactly, and an error lists everything that is wrong, with the nearest
names."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm_core import config
from glm_core.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from glm_core.errors import ConfigError

small = st.integers(1, 2**40)
share = st.floats(0, 1)
positive = st.floats(0, exclude_min=True, allow_infinity=False)
text = st.text(st.characters(exclude_categories=["Cs"]))


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    kv, per_kv = draw(st.integers(1, 64)), draw(st.integers(1, 64))
    norm, placement = draw(
        st.sampled_from(
            [("layer", "pre"), ("layer", "deepnorm"), ("rms", "pre"), ("rms", "sandwich")]
        )
    )
    return ModelConfig(
        num_layers=draw(small),
        hidden=draw(small),
        num_heads=kv * per_kv,
        num_kv_heads=kv,
        head_dim=4 * draw(st.integers(1, 64)),
        ffn=draw(small),
        vocab=draw(st.integers(64, 2**40)),
        max_length=draw(st.integers(64, 2**40)),
        norm=norm,
        norm_eps=draw(positive),
        placement=placement,
        activation=draw(st.sampled_from(["gelu", "geglu", "swiglu"])),
        positions=draw(st.sampled_from(["learned_2d", "rope", "rope_2d"])),
        rope_base=draw(st.floats(1, exclude_min=True, allow_infinity=False)),
        rope_interleaved=draw(st.booleans()),
        linear_bias=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        tied_head=draw(st.booleans()),
        qk_layer_scaling=draw(st.booleans()),
        pb_relax=draw(positive),
        embedding_gradient_shrink=draw(share),
        init_std=draw(positive),
    )


@st.composite
def trainings(draw: st.DrawFn) -> TrainConfig:
    micro, first, increments = draw(small), draw(st.integers(1, 50)), draw(st.integers(0, 50))
    ramp = draw(st.booleans())
    lr = draw(positive)
    return TrainConfig(
        backend=draw(text),
        strict=draw(st.booleans()),
        compile=draw(st.booleans()),
        dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        seed=draw(st.integers(-(2**62), 2**62)),
        steps=draw(small),
        micro_batch=micro,
        global_batch=micro * (first + increments),
        ramp_from=micro * first if ramp else 0,
        ramp_increment=micro,
        ramp_samples=draw(small),
        lr=lr,
        min_lr=lr * draw(share),
        warmup_steps=draw(st.integers(0, 2**40)),
        beta1=draw(st.floats(0, 1, exclude_max=True)),
        beta2=draw(st.floats(0, 1, exclude_max=True)),
        eps=draw(positive),
        weight_decay=draw(share),
        clip=draw(share),
        loss_scale=draw(positive),
        loss_scale_window=draw(small),
        loss_scale_hysteresis=draw(small),
        save_every=draw(st.integers(0, 2**40)),
        keep=draw(small),
    )


@st.composite
def corpora(draw: st.DrawFn) -> DataConfig:
    gmask = draw(share)
    return DataConfig(
        path=draw(text),
        text_key=draw(text),
        vocab=draw(st.integers(1, 64)),
        length=draw(st.integers(16, 64)),
        gmask_prob=gmask,
        sentence_prob=(1 - gmask) * draw(st.floats(0, 0.99)),
        mask_ratio=draw(share),
        span_mean=draw(positive),
        min_gmask_ratio=draw(share),
        samples_per_sequence=draw(small),
    )


runs = st.builds(RunConfig, model=models(), data=corpora(), train=trainings())


@given(runs)
def test_toml_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, run: RunConfig) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip.toml"
    path.write_text(config.dumps(run), encoding="utf-8")
    assert config.load(path) == run


@given(runs)
def test_dict_reads_back_equal_and_resolved(run: RunConfig) -> None:
    plain = config.to_dict(run)
    assert config.from_dict(RunConfig, plain) == run
    for table in ("model", "data", "train"):
        assert plain[table].keys() == {f.name for f in dataclasses.fields(getattr(run, table))}


def test_every_default_is_written_out() -> None:
    text = config.dumps(RunConfig())
    for cls in (ModelConfig, DataConfig, TrainConfig):
        for field in dataclasses.fields(cls):
            assert f"\n{field.name} = " in text
    assert "head_dim = 32\n" in text  # derived values too


WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown-keys-in-every-table": (
        {"model": {"hiden": 1}, "train": {"microbatch": 1, "stepz": 2}, "dat": {}},
        [
            "unknown key 'dat'; known: data, model, policy, train (did you mean data?)",
            "unknown key 'model.hiden'; known: model.activation, ",
            "(did you mean model.hidden?)",
            "unknown key 'train.microbatch'",
            "(did you mean train.micro_batch?)",
            "unknown key 'train.stepz'",
            "(did you mean train.steps?)",
        ],
    ),
    "unknown-and-wrong-values-together": (
        {"model": {"hiden": 1, "num_layers": 0}, "train": {"lr": -1.0}},
        [
            "'model.hiden'",
            "ModelConfig: num_layers=0 must be positive",
            "TrainConfig: lr=-1.0 must be pos",
        ],
    ),
    "types": (
        {
            "model": {"hidden": "128", "tied_head": 1},
            "train": {"steps": 1.5, "lr": 1, "backend": 3},
            "data": [],
        },
        [
            "model.hidden: expected int, received '128'",
            "model.tied_head: expected bool, received 1",
            "train.steps: expected int, received 1.5",
            "train.backend: expected str, received 3",
            "data: expected a table, received []",
        ],
    ),
    "sizes-that-do-not-divide": (
        {"model": {"hidden": 100, "num_heads": 6, "num_kv_heads": 4}, "train": {"micro_batch": 3}},
        [
            "num_heads=6 does not divide hidden=100; give head_dim or use a divisor",
            "num_kv_heads=4 does not divide num_heads=6; use 1, 2, 3, 6",
            "global_batch=8 is not a multiple of micro_batch=3",
        ],
    ),
    "choices": (
        {"model": {"norm": "rmsnorm", "activation": "relu"}, "train": {"dtype": "fp16"}},
        [
            "norm must be one of layer, rms; received 'rmsnorm'",
            "activation must be one of gelu, geglu, swiglu; received 'relu'",
            "dtype must be one of float32, bfloat16, float16; received 'fp16'",
        ],
    ),
    "combinations": (
        {
            "model": {"norm": "rms", "head_dim": 7},
            "data": {"gmask_prob": 0.8, "sentence_prob": 0.3},
        },
        [
            "placement=deepnorm is not defined with norm='rms'; deepnorm goes with layer",
            "head_dim=7 gives 7 rotated dimensions; they must be even",
            "sentence_prob=0.3 plus gmask_prob=0.8 exceeds 1",
        ],
    ),
    "tables-against-each-other": (
        {"model": {"max_length": 64, "vocab": 100}, "data": {"length": 65, "vocab": 101}},
        [
            "data.length=65 exceeds model.max_length=64",
            "model.vocab=100 is smaller than data.vocab=101",
        ],
    ),
    "ramp": (
        {"train": {"global_batch": 64, "ramp_from": 16, "ramp_increment": 32}},
        [
            "ramp_increment=32 must be a multiple of micro_batch=4 that divides global_batch",
            "- ramp_from = 48",
            "ramp_samples=0 must be positive with ramp_from",
        ],
    ),
    "not-numbers": (
        {
            "train": {"lr": float("inf"), "weight_decay": float("nan"), "eps": float("nan")},
            "model": {"norm_eps": float("nan")},
        },
        ["lr=inf must be positive and finite", "weight_decay=nan", "eps=nan", "norm_eps=nan"],
    ),
    "zeros": (
        {"model": {"num_heads": 0}, "train": {"micro_batch": 0}},
        ["num_heads=0 must be positive", "micro_batch=0 must be positive"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_everything_wrong_is_reported_at_once_in_one_line(case: str) -> None:
    values, expected = WRONG[case]
    with pytest.raises(ConfigError) as error:
        config.from_dict(RunConfig, values)
    for part in expected:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_overrides_are_typed_by_their_field() -> None:
    run = config.override(
        RunConfig(),
        [
            "train.steps=50",
            "train.lr=1",
            "model.tied_head=false",
            "data.path=a = b",
            "train.dtype=bfloat16",
        ],
    )
    assert (run.train.steps, run.train.lr, run.train.dtype) == (50, 1.0, "bfloat16")
    assert (run.model.tied_head, run.data.path) == (False, "a = b")


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("steps=5", "'steps=5': expected table.key=value, for example train.steps=50"),
        ("train.steps", "'train.steps': expected table.key=value"),
        (
            "trian.steps=5",
            "unknown table 'trian'; known: data, model, policy, train (did you mean train?)",
        ),
        ("train.step=5", "unknown key 'train.step'"),
        ("train.steps=many", "train.steps: expected int, received 'many'"),
    ],
)
def test_wrong_override(assignment: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        config.override(RunConfig(), [assignment])
    assert expected in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    cases: list[tuple[bytes | None, str]] = [
        (None, "no such file; pass an existing TOML run file"),
        (b"[train]\nsteps = = 3\n", "not valid TOML (Invalid value (at line 2, column 9))"),
        (b"\xff\xfe", "not valid TOML"),
        (b"[train]\nsteps = 'x'\n", "train.steps: expected int, received 'x'"),
    ]
    for content, expected in cases:
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigError) as error:
            config.load(path)
        assert expected in str(error.value)
    with pytest.raises(ConfigError, match=f"{tmp_path}: cannot be read"):
        config.load(tmp_path)
    assert os.listdir(tmp_path) == ["run.toml"]
