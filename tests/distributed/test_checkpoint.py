"""Checks that a checkpoint is complete or absent, and that any plan loads any other's, bit for
bit."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from elastic_workers import MODEL, SPARSE, shapes
from plans import needs
from ranks import Ranks
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from glm_core.align.gradients import distance
from glm_core.distributed.checkpoint import (
    Checkpoints,
    Shards,
    _Writer,
    complete_checkpoints,
    find_checkpoint,
    read_facts,
    shards_of,
)
from glm_core.distributed.dcp_reader import METADATA, SafeReader, single_process_allowed
from glm_core.distributed.layout import Split
from glm_core.errors import CheckpointError

WORKERS = "elastic_workers"


@needs("dp=4,zero=3")
def test_plans_read_each_others_checkpoints_bit_for_bit(ranks: Ranks, tmp_path: Path) -> None:
    plans = ["tp=2,pp=2", "dp=4,zero=3", "tp=2,dp=2,zero=1", "pp=2", "tp=2,pp=2"]
    worlds = [4, 4, 4, 2, 4]
    for i in range(len(plans) - 1):
        folder = str(tmp_path / f"c{i}")
        job = ranks.run(f"{WORKERS}.save_under", worlds[i], plans[i], folder, i, folder=tmp_path)
        assert job.codes == [0] * worlds[i], job.told
        n = worlds[i + 1]
        job = ranks.run(f"{WORKERS}.load_under", n, plans[i + 1], folder, i, folder=tmp_path)
        assert job.codes == [0] * n, job.told
        names = [json.loads(output.splitlines()[-1]) for output in job.outputs]
        assert all(names)


@needs("dp=4,zero=1")
def test_a_run_goes_on_under_another_plan_and_back_bit_for_bit(
    ranks: Ranks, tmp_path: Path
) -> None:
    """TP 2 x PP 2 -> DP 4 with ZeRO -> TP 2 x PP 2: what each reads it writes again unchanged."""

    def go(plan: str, start: str, out: str, steps: int) -> list[float]:
        folders = [str(tmp_path / start) if start else "", str(tmp_path / out)]
        job = ranks.run(f"{WORKERS}.engine_steps", 4, plan, *folders, steps, folder=tmp_path)
        assert job.codes == [0] * 4, job.told
        losses: list[float] = json.loads(job.outputs[0].splitlines()[-1])
        return losses

    def bits(checkpoint: Path) -> dict[str, torch.Tensor]:
        tensors = {k: torch.zeros(s) for k, s in shapes(MODEL).items()}
        Checkpoints(tmp_path).load(checkpoint, tensors)
        return tensors

    grid, spread = "tp=2,pp=2,micro_batches=4", "dp=4,zero=1"
    first = go(grid, "", "a", 2)
    second = go(spread, "a", "b", 2)
    third = go(grid, "b", "c", 1)
    for one, other in (("a", "b"), ("b", "c")):
        read, written = (
            find_checkpoint(tmp_path / one),
            tmp_path / other / find_checkpoint(tmp_path / one).name,
        )
        before, after = bits(read), bits(written)
        assert [k for k, v in before.items() if not torch.equal(v, after[k])] == []
        assert all(v.any() for k, v in before.items() if k.startswith("exp_avg."))
    assert read_facts(find_checkpoint(tmp_path / "c"))["sampler"] == {"index": 40}
    assert first + second + third == pytest.approx(go(grid, "", "d", 5), rel=1e-5)


def test_experts_go_on_over_another_number_of_ranks_bit_for_bit(
    ranks: Ranks, tmp_path: Path
) -> None:
    """Experts split over 2 ranks -> all on each, their features and the heads of latent attention
    split -> two stages, both with the embedding, which the layer of multi-token prediction needs ->
    experts split again. The first step is the same under each."""

    def bits(folder: str) -> dict[str, torch.Tensor]:
        tensors = {k: torch.zeros(s) for k, s in shapes(SPARSE).items()}
        Checkpoints(tmp_path).load(tmp_path / folder, tensors)
        return tensors

    plans = [("", "dp=2,ep=2", 1), ("a", "tp=2", 0), ("b", "pp=2", 0), ("c", "dp=2,ep=2", 0)]
    plans.append(("", "tp=2,sp=true", 1))
    losses = []
    for (start, plan, steps), out in zip(plans, "abcde", strict=True):
        folders = [str(tmp_path / start) if start else "", str(tmp_path / out)]
        words = (plan, *folders, steps, True)
        job = ranks.run(f"{WORKERS}.engine_steps", 2, *words, folder=tmp_path)
        assert job.codes == [0, 0], job.told
        losses += json.loads(job.outputs[0].splitlines()[-1])
    first, split = bits("a"), bits("e")
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    apart = {k: distance(split[k].double(), v.double()) for k, v in first.items() if v.any()}
    assert max(v for k, v in apart.items() if k.startswith("exp_avg.")) < 1e-4
    assert all(v.any() for k, v in first.items() if k.startswith("exp_avg.") and ".experts_" in k)
    for other in (bits("b"), bits("c"), bits("d")):
        assert [k for k, v in first.items() if not torch.equal(v, other[k])] == []


def test_full_disk_names_the_rank_and_leaves_the_step_before(ranks: Ranks, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    job = ranks.run(f"{WORKERS}.save_with_little_room", 2, str(folder), 8192, folder=tmp_path)
    assert job.codes == [3, 3], job.told
    for output in job.outputs:
        assert "step-00000002: not saved (rank 1: " in output
        assert "File too large" in output
        assert "checkpoints before it are intact: make room" in output
    assert [p.name for p in complete_checkpoints(folder)] == ["step-00000001"]
    assert find_checkpoint(folder).name == "step-00000001"


def test_what_a_kill_left_is_removed_before_any_rank_writes(tmp_path: Path) -> None:
    """One rank may prepare its part while another still removes."""
    left = tmp_path / "step-00000001.part"
    left.mkdir()
    (left / METADATA).touch()
    coordinator, other = (_Writer(tmp_path / "step-00000001", "{}", 2) for _ in range(2))
    plans = []
    for writer in (other, coordinator):
        writer.set_up_storage_writer(writer is coordinator)
        plans.append(writer.prepare_local_plan(SavePlan([])))
    coordinator.prepare_global_plan(plans)
    assert list(tmp_path.iterdir()) == [left]
    assert list(left.iterdir()) == []


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_while_it_saves(ranks: Ranks, tmp_path: Path, victim: int) -> None:
    folder = tmp_path / "c"
    job = ranks.run(f"{WORKERS}.die_in_save", 2, str(folder), victim, folder=tmp_path)
    assert job.codes[victim] == -9, job.told
    assert job.codes[1 - victim] == 1
    assert "CheckpointError" in job.outputs[1 - victim]
    assert find_checkpoint(folder).name == "step-00000001"
    x = torch.zeros(8)
    one = Checkpoints(folder)
    assert one.load(folder, {"x": x})["step"] == 1
    assert torch.equal(x, torch.arange(8.0))
    one.save(2, {"x": x + 1}, {})  # clears what the kill left
    assert one.wait() == find_checkpoint(folder) == folder / "step-00000002"
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-00000001", "step-00000002"]


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3, 3):  # the last again, after a roll-back
        checkpoints.save(step, {"x": torch.full((2,), float(step))}, {"note": step})
    checkpoints.wait()
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    assert (tmp_path / "latest").read_text() == "step-00000003\n"


def test_what_is_damaged_foreign_or_of_another_model(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c")
    with pytest.raises(CheckpointError, match="holds no distributed checkpoint; start without"):
        find_checkpoint(tmp_path / "c")
    for step in (1, 2):
        checkpoints.save(step, {"x": torch.ones(4)}, {})
    checkpoints.wait()
    for state in ({"x": torch.zeros(5)}, {"y": torch.zeros(4)}):
        with pytest.raises(CheckpointError, match=r"step-00000002: does not fit this model \("):
            checkpoints.load(tmp_path / "c", state)
    (file,) = (tmp_path / "c/step-00000002").glob("*.distcp")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"damaged or missing: __0_0.distcp; use .*-00000001"):
        checkpoints.load(tmp_path / "c", {"x": torch.zeros(4)})
    file.unlink()
    with pytest.raises(CheckpointError, match="damaged or missing"):
        checkpoints.load(tmp_path / "c", {"x": torch.zeros(4)})
    (tmp_path / "c/latest").write_text("step-00000009\n")  # whole ones count, not the pointer
    assert find_checkpoint(tmp_path / "c").name == "step-00000002"


class Runs:
    """A pickle of this runs code: it creates a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.file,)  # type: ignore[return-value]


@pytest.mark.parametrize("place", ["planner_data", "state_dict_metadata"])
def test_code_in_the_metadata_is_refused(tmp_path: Path, place: str) -> None:
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, {"x": torch.ones(4)}, {})
    file, created = checkpoints.wait() / METADATA, tmp_path / "created"
    foreign = pickle.loads(file.read_bytes())
    setattr(foreign, place, {"x": Runs(created)})
    file.write_bytes(pickle.dumps(foreign))
    with pytest.raises(CheckpointError, match=r"\.metadata: loading it would run code \(pathlib"):
        checkpoints.load(tmp_path / "c", {"x": torch.zeros(4)})
    assert not created.exists()
    pickle.loads(file.read_bytes())
    assert created.exists()  # what was refused is code


def test_bytes_that_dcp_would_unpickle_are_refused(tmp_path: Path) -> None:
    with single_process_allowed(True):
        dcp_save({"x": "text"}, checkpoint_id=tmp_path / "foreign", no_dist=True)
    with pytest.raises(CheckpointError, match="BytesStorageMetadata"):
        SafeReader(tmp_path / "foreign").read_metadata()


def test_shards_of_fused_rows_lie_apart() -> None:
    part = torch.arange(12.0).reshape(6, 2)
    split = Split(0, ((2, 2), (8, 4)), ranks=2)
    placed: Shards = shards_of(part, (split,))
    assert placed.size() == (12, 2)
    assert {tuple(k): v.tolist() for k, v in placed.shards.items()} == {
        (2, 0): part[:2].tolist(),
        (8, 0): part[2:].tolist(),
    }
