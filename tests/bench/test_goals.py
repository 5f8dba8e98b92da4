"""Tests the tables that one run on a device prints: the goals beside their peers, and a step's
traffic."""

from __future__ import annotations

import pytest

from glm_core.backends.registry import get, probe
from glm_core.bench import goals, goals_peers, traffic
from glm_core.measure import ceilings
from glm_core.model.glm import GLM
from glm_core.model.presets import preset

pytestmark = pytest.mark.skipif(not probe("cpu").ok, reason=probe("cpu").reason)
NARROW = {"hidden": 32, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "ffn": 48}
SMALL = preset("glm-4-9b", num_layers=2, vocab=64, max_length=64, **NARROW)


def test_a_goal_without_its_peer_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(goals_peers, "MISSING", "pip install transformers")
    monkeypatch.setattr(ceilings, "sizes", lambda backend: (64, 1 << 16))
    result = goals.measure_beside(get("cpu"), SMALL, 1)
    beside = [name for name, (figure, _) in goals.PEER_GOALS.items() if figure == "times_compiled"]
    assert result["unmeasured"] == beside
    assert set(result["missed"]) <= {f"{goals_peers.WIDE}, products"}
    assert all(row["ms"] > 0 for row in result["rows"].values())
    lines = goals.text(result).splitlines()
    assert sum(line.endswith(": not measured") for line in lines) == len(beside)


def test_a_peer_that_is_faster_is_a_missed_goal() -> None:
    row = {"ms": 2.0, "compiled_ms": 1.0, "times_compiled": 0.5}
    result = {"rows": {"x": row}, "goals": {"x": ("times_compiled", 1.5)}, "fallbacks": {}}
    first, second, *_ = goals.text(result | {"machine": {}}).splitlines()
    assert first.endswith("2.000 ms  transformers compiled 1.000")
    assert second == "goal: x: times_compiled at least 1.50: 0.50, MISSED"


def test_traffic_of_the_optimizer_is_that_of_its_tensors() -> None:
    """Masters and moments are read and written, copies in bfloat16 as well, gradients are read."""
    found = traffic.counted(SMALL, (2, 16))
    parameters = sum(p.numel() for p in GLM(SMALL).parameters())
    scales = 2 * 4  # one for each list
    assert found.calls["adamw_"] == 2
    assert found.num_bytes["adamw_"] - parameters * (3 * 2 * 4 + 2 * 2 + 2) in range(scales + 1)
    assert found.calls["attention_forward"] == SMALL.num_layers
