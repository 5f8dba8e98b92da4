"""Runs scripts that check themselves on two processes (tests/deepspeed/own): features that only we
have, or that DeepSpeed refuses on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from peer_runs import OWN, run
from real_deepspeed import Live, Recorded

from glm_core.distributed import fsdp


@pytest.mark.skipif(bool(fsdp.lack()), reason=fsdp.lack())
def test_own_scripts(real: Live | Recorded, tmp_path: Path) -> None:
    run("ours", sys.executable, tmp_path / "seen", OWN, real.checkpoints)
    # what two processes saved, on one
    run("ours", sys.executable, tmp_path / "alone", ["alone"], tmp_path / "ours", ranks=1)
