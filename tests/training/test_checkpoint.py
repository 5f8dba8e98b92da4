"""A checkpoint is read back exactly, or refused in one line; saving never harms the ones before."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from safetensors.torch import save_file

from glm_core import config
from glm_core.errors import CheckpointError, DataError
from glm_core.training import checkpoint
from glm_core.training.trainer import Trainer

FACTS: dict[str, Any] = {"config": {"train": {"lr": 1e-3}}, "step": 3, "text": "π"}
STEP = "step-00000003.safetensors"


def tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    wide = torch.randn(3, 8, generator=g)
    return {
        "float32": wide,
        "bfloat16": wide.bfloat16(),
        "float16": wide.half(),
        "strided": wide[:, ::2],
        "transposed": wide.T,
        "bytes": torch.arange(256, dtype=torch.uint8),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "odd": torch.tensor([float("nan"), float("-inf"), -0.0, 1e-45]),
    }


def save(folder: Path, step: int = 3, keep: int = 2) -> Path:
    return checkpoint.save(folder, step, tensors(), FACTS, keep)


def test_round_trip_is_exact(tmp_path: Path) -> None:
    loaded, facts = checkpoint.load(save(tmp_path))
    assert facts == FACTS
    assert loaded.keys() == tensors().keys()
    for name, t in tensors().items():
        assert (loaded[name].dtype, loaded[name].shape) == (t.dtype, t.shape), name
        flat = [x.contiguous().reshape(-1).view(torch.uint8) for x in (t, loaded[name])]
        assert torch.equal(*flat), name


def test_every_flipped_bit_and_every_truncation_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path)
    whole = path.read_bytes()
    for at in range(len(whole)):
        bad = bytearray(whole)
        bad[at] ^= 1 << at % 8
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match=STEP):
            checkpoint.load(path)
        if at % 7 == 0:
            path.write_bytes(whole[:at])
            with pytest.raises(CheckpointError, match="truncated"):
                checkpoint.load(path)
    path.write_bytes(whole)
    checkpoint.load(path)


@pytest.mark.parametrize("content", [b"", b"\x80\x02}q\x00.", b"# notes\n" * 100])
def test_foreign_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "notes").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"notes: truncated or not a checkpoint \(.*\); give"):
        checkpoint.load(tmp_path / "notes")


def test_foreign_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(
        CheckpointError, match=r"expected 'glm-core checkpoint 1', found 'a safetens"
    ):
        checkpoint.load(path)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint; give the folder of a run"):
        checkpoint.load(tmp_path)
    path = save(tmp_path)
    with pytest.raises(CheckpointError, match=rf"no such checkpoint; use one of: .*{STEP}"):
        checkpoint.load(tmp_path / "step-00000004.safetensors")
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{STEP}: no such checkpoint"):
        checkpoint.load(tmp_path)


def test_latest_and_keep(tmp_path: Path) -> None:
    folder = tmp_path / "run/checkpoints"
    for step in (1, 2, 3, 10):
        assert checkpoint.find(tmp_path / "run" if step > 1 else save(folder, 1)).is_file()
        path = save(folder, step)
        assert checkpoint.find(folder) == checkpoint.find(tmp_path / "run") == path
    names = ["latest", STEP, "step-00000010.safetensors"]
    assert sorted(p.name for p in folder.iterdir()) == names
    assert path.stat().st_mode == (folder / "latest").stat().st_mode


STAGES = ["save_file", "flush", "chmod", "replace", "write_text", "unlink"]


@pytest.mark.parametrize("stage", STAGES)
def test_full_disk_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    old = save(tmp_path, 3)

    def full(*args: Any, **kwargs: Any) -> None:
        if stage == "save_file":
            Path(args[1]).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        ours = stage in ("save_file", "flush")
        patch.setattr(checkpoint if ours else Path, stage, full)
        with pytest.raises(CheckpointError, match=r"not saved \(.*No space left on device\)"):
            save(tmp_path, 4, keep=1)
    checkpoint.load(old)
    checkpoint.load(tmp_path)
    assert not (tmp_path / checkpoint.PART).exists()


FULL_DISK = """
import sys; sys.path[:0] = sys.argv[2:]
from pathlib import Path
import toy
from glm_core.training import checkpoint
from glm_core.training.run import run
from glm_core.errors import CheckpointError
try:
    run(toy.config(), sys.argv[1] + "/run", sampler=toy.Sampler())
except CheckpointError as error:
    print(error)
print(checkpoint.load(Path(sys.argv[1], "run"))[1]["step"])
"""


def test_really_full_disk(tmp_path: Path) -> None:
    """A file system of 160 KiB: the first checkpoint of 88 KiB fits, the second does not."""
    mount = f"mount -t tmpfs -o size=160k tmpfs {tmp_path}"
    if (
        not shutil.which("unshare")
        or subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode
    ):
        pytest.skip("this machine does not let a user mount a tmpfs of their own")
    root = str(Path(__file__).parents[2])
    command = f'{mount} && exec "$@"'
    arguments = [
        sys.executable,
        "-c",
        FULL_DISK,
        str(tmp_path),
        toy.__file__.rpartition("/")[0],
        root,
    ]
    printed = subprocess.run(
        ["unshare", "-rm", "sh", "-c", command, "sh", *arguments],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert len(printed) == 2
    assert "step-00000006.safetensors: not saved" in printed[0]
    assert "No space left on device" in printed[0]
    assert printed[1] == "3"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    checkpoints = checkpoint.FileCheckpoints(tmp_path, keep=2)
    return Trainer(toy.config(), toy.Sampler(), checkpoints=checkpoints).save()


def test_other_config_is_refused_with_all_differing_keys(saved: Path) -> None:
    other = toy.config(lr=2e-3, dtype="bfloat16", save_every=1, model={"num_heads": 4})
    with pytest.raises(CheckpointError) as error:
        Trainer(other, toy.Sampler()).restore(checkpoint.open_checkpoint(saved))
    differing = [
        "model.head_dim=8 (now 4)",
        "model.num_heads=2 (now 4)",
        "model.num_kv_heads=2 (now 4)",
        "train.dtype=float32 (now bfloat16)",
        "train.lr=0.001 (now 0.002)",
    ]
    assert f"saved by another run: {', '.join(differing)}; resume with" in str(error.value)


def test_where_a_run_computes_and_stores_may_change(saved: Path) -> None:
    changed = toy.config(backend="reference:cpu", strict=True, compile=True, save_every=7, keep=9)
    Trainer(changed, toy.Sampler()).restore(checkpoint.open_checkpoint(saved))
    for key in checkpoint.FREE:
        table, name = key.split(".")
        assert name in config.to_dict(changed)[table], f"{key} is no longer a key"


def test_settings_younger_than_the_checkpoint_had_their_default(saved: Path) -> None:
    tensors, facts = checkpoint.load(saved)
    for table, key in (("train", "balance_rate"), ("model", "num_experts")):
        del facts["config"][table][key]
    older = checkpoint.save(saved.parent, 1, tensors, facts, 2)
    Trainer(toy.config(), toy.Sampler()).restore(checkpoint.open_checkpoint(older))
    with pytest.raises(CheckpointError, match=r"train\.balance_rate=0\.001 \(now 0\.5\)"):
        checkpoint.require_same(facts["config"], toy.config(balance_rate=0.5), older)


def test_tensors_that_do_not_fit(saved: Path) -> None:
    loaded, facts = checkpoint.load(saved)
    del loaded["master.embedding"]
    loaded["exp_avg.final_norm.bias"] = torch.zeros(1)  # would broadcast without a word
    path = checkpoint.save(saved.parent, 1, loaded, facts, 2)
    with pytest.raises(
        CheckpointError, match=r"model: exp_avg\.final_norm\.bias, master\.embedding missing"
    ):
        Trainer(toy.config(), toy.Sampler()).restore(checkpoint.open_checkpoint(path))


def test_other_text_is_refused_by_the_sampler(saved: Path) -> None:
    class Other(toy.Sampler):
        def restore(self, state: dict[str, Any]) -> None:
            raise DataError("sampler state: saved with another corpus; resume with the same data")

    trainer = Trainer(toy.config(), Other())
    before = {k: v.clone() for k, v in trainer.state()[0].items()}
    with pytest.raises(DataError):
        trainer.restore(checkpoint.open_checkpoint(saved))
    assert all(torch.equal(v, before[k]) for k, v in trainer.state()[0].items())
