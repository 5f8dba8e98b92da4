"""The campaigns of the verdict on programs go on where they were cut off."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from glm_core.bench import verdict


def test_a_campaign_makes_only_the_runs_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[Any, ...]] = []

    def train(name: str, dtype: Any, variant: str, trial: bool) -> dict[str, Any]:
        made.append((name, str(dtype), variant, trial))
        return {}

    monkeypatch.setattr(verdict, "train", train)
    out = tmp_path / "runs.jsonl"
    held = {"model": "gpt2", "dtype": "float32", "variant": "plain"}
    out.write_text(json.dumps({"machine": "here"}) + "\n" + json.dumps(held) + "\n")
    args = argparse.Namespace(
        only="gpt2,bert", dtypes="float32,bfloat16", variants="plain", out=str(out)
    )
    assert len(list(verdict.rows(args))) == 3
    assert made == [
        ("gpt2", "torch.bfloat16", "plain", True),
        ("bert", "torch.float32", "plain", True),
        ("bert", "torch.bfloat16", "plain", True),
    ]
