"""Fine-tuning on conversations: beside a quantized checkpoint of another project's layout an
adapter learns replies, and the model with the adapter gives them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import chatglm3

from glm_core import cli
from glm_core.backends.registry import use
from glm_core.errors import DataError
from glm_core.model.prompt import Prompt, causal
from glm_core.pretrained.adapters import load_adapter
from glm_core.pretrained.conversations import Example, ExampleSampler, read_examples
from glm_core.pretrained.load import from_path


def test_replies_are_learned(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    wide, base, out = chatglm3(tmp_path / "wide"), tmp_path / "base", tmp_path / "out"
    assert cli.main(["checkpoint", "convert", str(wide), str(base), "--bits", "8"]) == 0
    (tmp_path / "pairs.jsonl").write_text(
        '{"prompt": "who runs?", "response": "the lazy dog"}\n\n'
        '{"messages": [{"role": "user", "content": "who jumps?"},'
        ' {"role": "assistant", "content": "the fox"}]}\n'
    )
    learn = [
        "train",
        "--backend",
        "reference",
        "--base",
        str(base),
        "--pairs",
        str(tmp_path / "pairs.jsonl"),
        "--adapter",
        "ptuning",
        "--prefix-length",
        "8",
        "--prefix-projection",
        "--dropout",
        "0.05",
        "--steps",
        "240",
        "--out",
        str(out),
    ]
    for item in (
        "lr=0.05",
        "min_lr=0.005",
        "warmup_steps=5",
        "micro_batch=2",
        "global_batch=2",
        "weight_decay=0.0",
        "save_every=0",
    ):
        learn += ["--set", f"train.{item}"]
    assert cli.main([*learn, "--set", "data.length=48"]) == 0
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("who runs?\n/clear\nwho jumps?\n/quit\n"))
    talk = ["chat", "--model", str(base), "--temperature", "0", "--max-tokens", "12"]
    assert cli.main([*talk, "--adapter", str(out)]) == 0
    assert [s.strip() for s in capsys.readouterr().out.splitlines() if s.strip()] == [
        "the lazy dog",
        "the fox",
    ]
    assert narrowest_choice(base, out, tmp_path / "pairs.jsonl") > 1.0


def narrowest_choice(base: Path, run: Path, pairs: Path) -> float:
    """Returns by how much, over all tokens of the replies, the right logit leads the next at least:
    1.9 to 2.9 were seen, by instruction set and library; with 0 a reply would be another."""
    chat_model = from_path(base)
    load_adapter(run, chat_model.model)
    batch = ExampleSampler(read_examples(chat_model, pairs), 48, seed=0).next(2)
    place = (batch.positions, batch.key_start, batch.key_end)
    with torch.no_grad(), use("reference"):
        logits = chat_model.model.logits(batch.tokens, *place)[batch.loss_weight.bool()]
    right = batch.labels[batch.loss_weight.bool()][:, None]
    best_other = logits.scatter(1, right, -torch.inf).amax(1)
    return float((logits.gather(1, right)[:, 0] - best_other).min())


PREFIX_LM = Example(Prompt((5, 6, 7, 8), sep=3, mask=2), (9, 10, 2))
CAUSAL = Example(causal([4, 5]), (6, 2))


def test_rows() -> None:
    """Rows hold the expected inputs, labels, positions and mask; padding sees itself alone and has
    no loss."""
    rows = ExampleSampler([PREFIX_LM, CAUSAL], 8, seed=0)
    batch = rows.next(2)
    a, b = (0, 1) if batch.tokens[0, 0] == 5 else (1, 0)
    assert batch.tokens[a].tolist() == [5, 6, 7, 8, 9, 10, 0, 0]
    assert batch.loss_weight[a].tolist() == [0, 0, 0, 1, 1, 1, 0, 0]
    assert batch.labels[a, 3:6].tolist() == [9, 10, 2]
    assert batch.positions[a].tolist() == [[0, 1, 2, 2, 2, 2, 0, 0], [0, 0, 0, 1, 2, 3, 0, 0]]
    assert batch.key_start[a].tolist() == [0, 0, 0, 0, 0, 0, 6, 7]
    assert batch.key_end[a].tolist() == [3, 3, 3, 4, 5, 6, 7, 8]
    assert batch.tokens[b].tolist() == [4, 5, 6, 0, 0, 0, 0, 0]
    assert batch.labels[b, 1:3].tolist() == [6, 2]
    assert batch.loss_weight[b].tolist() == [0, 1, 1, 0, 0, 0, 0, 0]
    assert batch.key_end[b].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


def test_order_and_state() -> None:
    """Each epoch has every example once, in its own order; rows do not depend on the micro-batch; a
    restored sampler continues."""
    pairs = [Example(causal([i]), (2,)) for i in range(3, 11)]
    one, other = ExampleSampler(pairs, 4, seed=1), ExampleSampler(pairs, 4, seed=1)
    seen = torch.cat([one.next(2).tokens[:, 0] for _ in range(8)])
    assert sorted(seen[:8].tolist()) == sorted(seen[8:].tolist()) == list(range(3, 11))
    assert seen[:8].tolist() != seen[8:].tolist()
    assert torch.equal(torch.cat([other.next(4).tokens[:, 0] for _ in range(2)]), seen[:8])
    again = ExampleSampler(pairs, 4, seed=1)
    again.restore(json.loads(json.dumps(other.state())))
    assert torch.equal(again.next(8).tokens[:, 0], seen[8:])
    for sampler in (
        ExampleSampler(pairs, 4, seed=2),
        ExampleSampler(pairs[1:], 4, seed=1),
        ExampleSampler(pairs, 5, seed=1),
    ):
        with pytest.raises(DataError, match="saved with other conversations"):
            sampler.restore(other.state())


def test_refusals(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(DataError, match=r"number 1 and 0 more are longer than a row of 5 tokens"):
        ExampleSampler([PREFIX_LM, CAUSAL], 5, seed=0)
    with pytest.raises(DataError, match="there are none"):
        ExampleSampler([], 5, seed=0)
    chat_model = from_path(chatglm3(tmp_path / "their"))
    file = tmp_path / "pairs.jsonl"
    for line, message in [
        ("{", "pairs.jsonl:2: not JSON"),
        ("[]", "pairs.jsonl:2: not a conversation; expected"),
        ('{"prompt": "a"}', "not a conversation"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "not a conversation"),
        ('{"messages": [{"role": "judge", "content": "a"}, 3]}', "not a conversation"),
    ]:
        file.write_text('{"prompt": "a", "response": "b"}\n' + line)
        with pytest.raises(DataError, match=message):
            read_examples(chat_model, file)
    file.write_bytes(b"\xff")
    with pytest.raises(DataError, match="cannot be read"):
        read_examples(chat_model, file)
    base = ["--base", str(tmp_path / "their"), "--out", str(tmp_path / "out")]
    assert cli.main(["train", "--adapter", "lora", *base]) == 2
    assert "this base has another; give conversations instead (--pairs" in capsys.readouterr().err
    assert cli.main(["train", "--pairs", str(file), *base]) == 2
    assert "needs --adapter lora or ptuning" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
