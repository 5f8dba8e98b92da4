"""A folder of `glm-core quantize` gives in chat and serve the replies of the run's own model,
quantized in memory."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from glm_core import cli, config
from glm_core.backends.registry import use
from glm_core.model.generate import generate
from glm_core.model.quantize import Quantization, QuantizedLinear, convert
from glm_core.model.sample import Sampling
from glm_core.pretrained.load import from_path
from glm_core.pretrained.templates import Message
from glm_core.training.run import run

QUESTION = "The fox number 7"
HOW = {
    "int4": Quantization(bits=4, group=32, activation_bits=8),
    "int8": Quantization(bits=8),
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trains a run a little, so that its replies are no noise and depend on rounding."""
    folder = tmp_path_factory.mktemp("quantized")
    text = folder / "text.txt"
    text.write_text("\n".join(f"The fox number {i} jumps over the dog." for i in range(400)))
    settings = config.RunConfig(
        model=config.ModelConfig(num_layers=2, hidden=64, num_heads=2, ffn=96, vocab=512),
        data=config.DataConfig(path=str(text), vocab=400, length=64),
        train=config.TrainConfig(steps=12, warmup_steps=0, micro_batch=4, global_batch=4, lr=3e-3),
    )
    run(settings, folder / "run", cache_dir=folder / "cache")
    return folder / "run"


@pytest.fixture(params=HOW)
def quantized(request: Any, run_dir: Path, monkeypatch: Any, capsys: Any) -> tuple[Path, str]:
    """Returns (the folder that `quantize` wrote, the reply that it must give)."""
    how, folder = HOW[request.param], run_dir.parent / request.param
    monkeypatch.chdir(run_dir.parent)
    options = ["--bits", how.bits, "--group", how.group, "--activation-bits", how.activation_bits]
    argv = ["quantize", run_dir, *options, "--sequences", 8, "--out", folder]
    assert cli.main([str(word) for word in argv]) == 0
    capsys.readouterr()
    chat_model = from_path(run_dir)
    assert len(list(convert(chat_model.model, how))) == 8
    sampling = Sampling(max_tokens=12, temperature=0, stop=chat_model.stop)
    with use("cpu"):
        [done] = generate(
            chat_model.model, [chat_model.chat_prompt([Message("user", QUESTION)])], sampling
        )
    assert len(done.tokens) > 3
    return folder, chat_model.tokenizer.decode(done.tokens)


def test_command_and_server_give_the_same_reply(
    quantized: tuple[Path, str], serving: Any, monkeypatch: Any, capsys: Any
) -> None:
    openai = pytest.importorskip("openai", reason="the extra `serve` is not installed")
    folder, reply = quantized
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n/quit\n"))
    greedy = ["--temperature", "0", "--max-tokens", "12"]
    assert cli.main(["chat", "--model", str(folder), *greedy]) == 0
    assert capsys.readouterr().out.strip() == reply.strip()
    chat_model = from_path(folder)
    assert sum(isinstance(m, QuantizedLinear) for m in chat_model.model.modules()) == 8
    with serving(model=chat_model) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none")
        stream = client.chat.completions.create(
            model=chat_model.name,
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            max_tokens=12,
            stream=True,
        )
        texts = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(texts) == reply
