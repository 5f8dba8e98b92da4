"""Runs scripts that check themselves on two processes (tests/deepspeed/own): features that only we
have, or that DeepSpeed refuses on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from peer_runs import LACK, OWN, run

from glm_core.distributed import fsdp


@pytest.mark.skipif(bool(fsdp.lack()), reason=fsdp.lack())
def test_own_scripts(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    # DeepSpeed's checkpoints are read too where it can run
    theirs = request.getfixturevalue("real")[1] if not LACK else tmp_path / "none"
    python = Path(sys.executable)
    run("ours", python, tmp_path / "seen", OWN, theirs)
    # what two processes saved, on one
    run("ours", python, tmp_path / "alone", ["alone"], tmp_path / "ours", ranks=1)
