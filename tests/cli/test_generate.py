"""generate, chat, serve and export work from a run's checkpoint."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from glm_core import cli, config
from glm_core.model.glm import GLM
from glm_core.model.presets import preset
from glm_core.training.run import run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trains a run of two steps on a short text."""
    folder = tmp_path_factory.mktemp("generate")
    text = folder / "text.txt"
    text.write_text("\n".join(f"The fox number {i} jumps over the dog." for i in range(400)))
    settings = config.RunConfig(
        model=config.ModelConfig(num_layers=4, hidden=32, num_heads=2, ffn=32, vocab=512),
        data=config.DataConfig(path=str(text), vocab=400, length=64),
        train=config.TrainConfig(steps=2, warmup_steps=0, micro_batch=2, global_batch=2),
    )
    run(settings, folder / "run", cache_dir=folder / "cache")
    text.unlink()  # a run's folder is all that is needed to use it
    return folder / "run"


def call(capsys: Any, *args: Any) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in args])
    output = capsys.readouterr()
    return code, output.out, output.err


def test_generate(run_dir: Path, capsys: Any) -> None:
    command = ["generate", "--run", run_dir, "--prompt", "The fox", "--max-tokens", 8]
    code, text, _ = call(capsys, *command)
    assert code == 0
    code, out, _ = call(capsys, *command, "--json")
    assert json.loads(out)["text"] == text.removesuffix("\n")
    code, filled, _ = call(
        capsys,
        "generate",
        "--run",
        run_dir / "checkpoints",
        "--prompt",
        "The [MASK] jumps [sMASK] dog.",
        "--max-tokens",
        3,
    )
    assert code == 0
    assert filled.startswith("The ")
    assert filled.endswith(" dog.\n")
    code, out, _ = call(capsys, *command, "--beams", 2, "--json")
    hypotheses = json.loads(out)["answers"]
    assert code == 0
    assert 1 <= len(hypotheses) <= 2
    assert hypotheses == sorted(hypotheses, key=lambda a: -a["score"])
    code, out, _ = call(capsys, *command, "--head-bits", 8)
    assert code == 0
    assert out


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (["--prompt", ""], 2, "prompt: is empty"),
        (["--prompt", "fox " * 800], 2, "no room for a reply"),
        (["--run", "/nowhere"], 2, "no such checkpoint"),
        (["--temperature", "-1"], 2, "temperature"),
        (["--backend", "cpx"], 2, "did you mean cpu?"),
        (["--backend", "null"], 2, "backend null: computes shapes and no values"),
        (["--exact", "--dtype", "float16"], 2, "exact: backend cpu sums exactly in float32"),
        (["--beams", "-1"], 2, "num_beams"),
        (["--head-bits", "3"], 2, "bits=3 must be 8 or 4"),
        (["--speculate", "2"], 2, "speculate=2: the model has no layer of multi-token prediction"),
        (["--speculate", "2", "--beams", "2"], 2, "--speculate: cannot be combined with --beams"),
        (["--bits", "3"], 2, "bits=3 must be 8 or 4"),
        (["--bits", "4", "--offload", "disk"], 2, "--bits: cannot be combined with --offload"),
        (["--context", "1"], 2, "--context 1 has no room"),
        (["--memory", "-1"], 2, "--memory -1: must be positive"),
        (["--offload", "cpu"], 2, "backend cpu computes in main memory; use --offload disk"),
        (["--bits", "4", "--offload", "cpu"], 2, "backend cpu computes in main memory"),
        (["--offload", "disk", "--adapter", "x"], 2, "cannot be combined with --adapter"),
        (["--memory", "0.00024"], 2, "are missing; use --context 2"),
        (["--memory", "0.00024"], 2, "or --offload (weights 0.1 MB)"),
    ],
    ids=str,
)
def test_bad_usage(run_dir: Path, capsys: Any, change: list[str], code: int, message: str) -> None:
    done, _, err = call(capsys, "generate", "--run", run_dir, "--prompt", "The fox", *change)
    assert done == code
    assert message in err
    assert err.count("\n") == 1


def test_speculate(run_dir: Path, capsys: Any, tmp_path: Path) -> None:
    """The text is the same, and a line says what the drafts were worth."""
    model = GLM(
        dataclasses.replace(
            preset("tiny-moe"), num_layers=2, hidden=32, ffn=32, expert_ffn=32, vocab=512
        )
    ).init_weights(0)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    facts = {"model_type": "glm-core", **dataclasses.asdict(model.config)}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    shutil.copy(run_dir / "tokenizer.model", tmp_path)
    command = ["generate", "--model", tmp_path, "--prompt", "The fox", "--max-tokens", 8]
    for more in ([], ["--temperature", 0.9]):
        _, plain, said = call(capsys, *command, *more, "--context", 64)
        code, text, drafts = call(capsys, *command, *more, "--context", 64, "--speculate", 2)
        assert (code, text, said) == (0, plain, "")
        assert re.fullmatch(r"speculate: \d+ of \d+ drafted tokens were right\n", drafts)
    code, _, said = call(capsys, *command, "--offload", "disk")
    assert code == 2
    assert "--offload: not possible with num_experts=16" in said


def test_offload(run_dir: Path, capsys: Any) -> None:
    """Layers that memory has no room for are read from the file; text and beams are the same."""
    for more in ([], ["--beams", 2]):
        command = ["generate", "--run", run_dir, "--prompt", "The fox", "--max-tokens", 6, *more]
        _, whole, said = call(capsys, *command)
        assert said == ""
        small = ["--context", 64, "--memory", 0.00032 if more else 0.00025]
        code, text, said = call(capsys, *command, *small, "--offload", "disk", "--bandwidth", 2)
        assert (code, text) == (0, whole)
        assert "of 4 layers come from disk at every step" in said
        assert "at 2 GB/s (as stated)" in said
    assert "all 4 layers fit" in call(capsys, *command, "--offload", "disk")[2]


def test_bits_while_loading(run_dir: Path, capsys: Any, tmp_path: Path) -> None:
    """The text is that of a checkpoint that was converted before."""
    command = ["checkpoint", "convert", run_dir, tmp_path / "q", "--to", "glm-core", "--bits", 4]
    assert call(capsys, *command)[0] == 0
    ask = ["--prompt", "The fox", "--max-tokens", 6, "--memory", 1]
    _, converted, _ = call(capsys, "generate", "--run", tmp_path / "q", *ask)
    code, text, said = call(capsys, "generate", "--run", run_dir, *ask, "--bits", 4)
    assert (code, text, said) == (0, converted, "")
    code, _, said = call(capsys, "generate", "--run", tmp_path / "q", *ask, "--bits", 4)
    assert (code, said.count("\n")) == (2, 1)
    assert "holds int4 codes already; leave it out" in said


def test_a_tokenizer_of_another_run_is_refused(run_dir: Path, capsys: Any, tmp_path: Path) -> None:
    from glm_core.data import tokenizer

    other = tmp_path / "run"
    shutil.copytree(run_dir, other)
    (other / "tokenizer.model").write_bytes(tokenizer.train(["another text entirely"], 320))
    code, _, err = call(capsys, "generate", "--run", other, "--prompt", "a")
    assert code == 2
    assert "trained with another tokenizer" in err


def test_adapters_alone_are_no_model(run_dir: Path, capsys: Any, tmp_path: Path) -> None:
    from glm_core.training import checkpoint

    tensors, facts = checkpoint.load(run_dir)
    incomplete = {n: t for n, t in tensors.items() if "attention" not in n}
    path = checkpoint.save(tmp_path / "checkpoints", 2, incomplete, facts, keep=1)
    (tmp_path / "tokenizer.model").write_bytes((run_dir / "tokenizer.model").read_bytes())
    code, _, err = call(capsys, "generate", "--run", path, "--prompt", "a")
    assert code == 2
    assert "holds adapters without their base" in err


def test_chat(run_dir: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["chat", "--run", run_dir, "--max-tokens", 5, "--seed", 1]
    lines = "The fox\n\n/clear\nThe fox\nand then?\n/quit\nnot read\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    code, out, err = call(capsys, *command)
    assert (code, err) == (0, "")
    half = out[: out.index("\n", 1) + 1] if out else ""
    assert out.startswith(half * 2)  # after /clear the same question has the same answer
    monkeypatch.setattr(sys, "stdin", io.StringIO("fox " * 900 + "\n"))
    code, _, err = call(capsys, *command)
    assert code == 0
    assert "no room for a reply" in err


def test_a_conversation_that_is_too_long_forgets(
    run_dir: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("fox " * 200 + "\n" + "dog " * 300 + "\n"))
    code, _, err = call(capsys, "chat", "--run", run_dir, "--max-tokens", 2)
    assert code == 0
    assert "its oldest turn is forgotten" in err


def test_serve_answers_until_it_is_interrupted(run_dir: Path) -> None:
    pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
    command = [
        sys.executable,
        "-m",
        "glm_core.cli",
        "serve",
        "--run",
        str(run_dir),
        "--port",
        "0",
        "--slots",
        "2",
        "--context",
        "64",
    ]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "GLM_CORE_API_KEY": ""}
    ) as server:
        assert server.stderr
        said = server.stderr.readline()
        assert "2 slots of 64 tokens" in said
        port = said.partition("http://127.0.0.1:")[2].partition(",")[0]
        deadline = time.monotonic() + 240
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as response:
                    assert json.load(response)["status"] == "ok"
                break
            except OSError:
                assert time.monotonic() < deadline
        server.send_signal(signal.SIGINT)
        server.wait(240)
        assert server.returncode in (0, 130)


def test_serve_refuses_bad_options(run_dir: Path, capsys: Any) -> None:
    pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for more, message in [
            (["--port", port], f"127.0.0.1:{port} cannot be listened on"),
            (["--port", 99999], "127.0.0.1:99999 cannot be listened on"),
            (["--host", "no such host"], "cannot be listened on"),
            (["--context", -5], "--context -5 has no room"),
            (["--slots", 0], "--slots, --max-tokens, --max-body and --chunk must"),
            (["--lora", "a"], "--lora a; give NAME=PATH, each name once"),
        ]:
            code, _, err = call(capsys, "serve", "--run", run_dir, *more)
            assert (code, err.count("\n")) == (2, 1)
            assert message in err


def test_export(run_dir: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    command = ["export", "--run", run_dir, tmp_path / "out"]
    code, out, _ = call(capsys, *command, "--bits", 4, "--group", 32, "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["bytes"] == sum(f.stat().st_size for f in (tmp_path / "out").iterdir())
    meta = runtime.InferenceSession(facts["model"]).get_modelmeta().custom_metadata_map
    assert len(meta["tokenizer"]) == 64
    assert json.loads(meta["stop"])
    assert json.loads(meta["quantization"])["group"] == 32
    plain = ["export", "--run", run_dir, tmp_path / "plain"]
    assert call(capsys, *plain)[0] == 0
    for prompt in ("The fox", "The [MASK] jumps [sMASK] dog."):
        options = ["--prompt", prompt, "--max-tokens", 9, "--json", "--temperature", 3]
        code, out, _ = call(capsys, "generate", "--onnx", tmp_path / "plain", *options)
        assert (code, out) == (0, call(capsys, "generate", "--run", run_dir, *options)[1])
    generate = ["generate", "--prompt", "a", "--onnx"]
    for folder, more, message in [
        (tmp_path, [], "no such file; give a folder that glm-core export wrote"),
        (
            tmp_path / "plain",
            ["--beams", 2],
            "cannot be combined with --adapter, --beams, --bits, --head-bits",
        ),
    ]:
        code, _, error = call(capsys, *generate, folder, *more)
        assert (code, error.count("\n")) == (2, 1)
        assert message in error
    shutil.copy(run_dir / "config.toml", tmp_path / "plain/model.onnx")
    code, _, error = call(capsys, *generate, tmp_path / "plain")
    assert code == 2
    assert "cannot be run" in error
    for more, message in [
        ([], "out: exists; choose a new folder"),
        (["--bits", 3], "bits=3 must be 8 or 4"),
        (["--dtype", "bfloat16"], "the model is in bfloat16"),
    ]:
        to = tmp_path / ("other" if more else "out")
        code, _, error = call(capsys, *command[:3], to, *more)
        assert code == 2
        assert message in error
