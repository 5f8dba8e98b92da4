"""The README's Python example runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


def test_python_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    text = "\n".join(f"Sentence {i} says that {i} plus {i} is {2 * i}." for i in range(4000))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    small = (
        'data=DataConfig(path="text.txt", vocab=512, length=32), '
        "train=TrainConfig(steps=2, micro_batch=2, global_batch=2)"
    )
    assert "train=TrainConfig(steps=100)" in code
    quick = code.replace("train=TrainConfig(steps=100)", small).replace(
        'preset("tiny")', 'preset("tiny", num_layers=1, hidden=32, ffn=48)'
    )
    quick = quick.replace("import RunConfig", "import DataConfig, RunConfig")
    monkeypatch.chdir(tmp_path)
    exec(compile(quick, str(README), "exec"), {})
    assert re.match(r"(aligned|diverged) \[", capsys.readouterr().out)
