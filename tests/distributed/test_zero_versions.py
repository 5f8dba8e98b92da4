"""ZeRO 2 and 3 say which torch they need."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from glm_core import versions
from glm_core.distributed import zero
from glm_core.errors import ConfigError


class Sharded(FSDPModule, torch.nn.Linear):
    def __new__(cls) -> Sharded:
        return torch.nn.Module.__new__(cls)  # FSDPModule's own makes the class before sharding


def test_an_older_torch_is_refused_before_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "torch_version", lambda: "2.7.1+das")
    monkeypatch.setattr(zero, "torch_version", versions.torch_version)
    part = Sharded.__new__(Sharded)
    torch.nn.Linear.__init__(part, 2, 2)
    with pytest.raises(ConfigError, match=r"FSDP of torch 2\.7\.1\+das cannot sum .* torch 2\.9"):
        zero.sum_gradients(torch.nn.Sequential(part), 1.0)
