"""What Hygon's machines have that AMD's do not: a container in which another torch may have
replaced theirs."""

from __future__ import annotations

from pathlib import Path

from glm_core.backends.cuda import probe


def test_a_torch_that_replaced_dtk_s_is_named(tmp_path: Path) -> None:
    assert probe.dtk(tmp_path) == ""
    (tmp_path / "opt/dtk-26.04").mkdir(parents=True)
    assert probe.dtk(tmp_path) == str(tmp_path / "opt/dtk-26.04")
    seen = probe.Facts("2.14.1+cu130", "13.0", None, "", 0, None, dtk="/opt/dtk")
    state = probe.rocm(seen)
    assert not state.ok
    assert state.reason.startswith("torch 2.14.1+cu130 is not the one of /opt/dtk: pip may have")
    assert probe.rocm(seen._replace(cuda=None, hip="6.3", devices=1)).ok
