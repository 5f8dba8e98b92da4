"""Reads checkpoints that DeepSpeed wrote, and compares the weights with those of its own
zero_to_fp32."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from real_deepspeed import Live, Recorded

from glm_core.deepspeed.checkpoint.files import load_file
from glm_core.deepspeed.utils import zero_to_fp32
from glm_core.errors import CheckpointError


@pytest.mark.parametrize("name", ["resume", "parts2", "zero3", "bf16_zero3"])
def test_whole_weights_are_those_of_zero_to_fp32(
    name: str, real: Live | Recorded, tmp_path: Path
) -> None:
    place = real.checkpoints / name
    theirs = torch.load(place / "consolidated.pt")
    path = zero_to_fp32.convert_zero_checkpoint_to_fp32_state_dict(place, tmp_path)
    mine = torch.load(path)
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        assert mine[key].dtype == torch.float32
        assert torch.equal(mine[key], value), key


@pytest.mark.parametrize("name", ["resume", "zero3", "bf16_zero3"])
def test_our_own_are_consolidated_too(name: str, ours: tuple[list[Any], Path]) -> None:
    weights = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(ours[1] / name)
    if name == "zero3":
        for key, value in ours[0][0][name]["weights"].items():
            assert torch.equal(weights[key], value)
    assert all(v.dtype == torch.float32 for v in weights.values())


def test_a_missing_rank_is_named(real: Live | Recorded, tmp_path: Path) -> None:
    for path in (real.checkpoints / "zero3" / "global_step12").iterdir():
        if "rank_0_mp_rank_00_optim" not in path.name:
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(CheckpointError, match=r"ranks \[1\] only"):
        zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(tmp_path.parent, tmp_path.name)


class Evil:
    """An object that would run code when it is unpickled."""

    def __reduce__(self) -> Any:
        return print, ("ran",)


def test_foreign_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"module": {}, "x": Evil()}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"print|safely"):
        load_file(tmp_path / "a.pt")
    assert "ran" not in capsys.readouterr().out


def test_numpys_random_state_is_read_but_no_array_of_objects(tmp_path: Path) -> None:
    state = np.random.RandomState(3).get_state()
    torch.save({"module": {}, "random": state, "mean": np.float64(2)}, tmp_path / "a.pt")
    loaded = load_file(tmp_path / "a.pt")
    assert np.array_equal(loaded["random"][1], state[1])
    assert loaded["mean"] == 2
    torch.save({"module": {}, "x": np.array([Evil()], dtype=object)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"print|safely"):
        load_file(tmp_path / "a.pt")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps([1])])
def test_garbage_is_a_checkpoint_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.pt"):
        load_file(tmp_path / "a.pt")
