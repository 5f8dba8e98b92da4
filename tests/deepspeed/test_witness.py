"""The witness is whole, of this DeepSpeed and of these scripts, and says so where it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import witness
from peer_runs import HERE, LACK, REAL, SCRIPTS, SCRIPTS_4, differences, run
from real_deepspeed import CONFIG_SOURCES, Live, Recorded, saver_sources, sources
from witness import StaleWitnessError

LIVE = "resume"
"""the script that runs under real DeepSpeed where it is installed"""


def records() -> dict[str, dict[str, Any]]:
    """Returns every record by name."""
    scripts = {name: witness.read(name, sources(name)) for name in (*SCRIPTS, *SCRIPTS_4)}
    config = witness.read("config", CONFIG_SOURCES)
    return {
        **scripts,
        "config": config,
        "checkpoints": witness.read("checkpoints", saver_sources()),
    }


def test_every_record_names_its_origin_and_none_is_left_over() -> None:
    read = records()
    assert {path.stem for path in witness.FOLDER.glob("*.json")} == read.keys()
    pinned = (HERE / "setup_deepspeed.sh").read_text().partition("deepspeed==")[2].split()[0]
    assert {record["deepspeed"] for record in read.values()} == {pinned}
    assert len({(r["torch"], r["recorded"], r["instructions"]) for r in read.values()}) == 1
    assert sum(path.stat().st_size for path in witness.FOLDER.iterdir()) < 1e6


def test_a_changed_source_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    text = (witness.FOLDER / "resume.json").read_text()
    digest = witness.digests(sources("resume"))["scripts/resume.py"]
    (tmp_path / "resume.json").write_text(text.replace(digest, "0" * 64))
    with pytest.raises(StaleWitnessError, match=r"scripts/resume\.py changed.*record\.py"):
        witness.read("resume", sources("resume"), tmp_path)
    with pytest.raises(StaleWitnessError, match=r"missing; record again: python .*record\.py"):
        witness.read("zero3", sources("zero3"), tmp_path)


def test_what_was_packed_comes_back() -> None:
    weights = {"w": torch.randn(3, 2), "b": torch.zeros(0)}
    seen = {**{key: torch.randn(5) for key in witness.LISTS}, "weights": weights}
    other = {**seen, "weights": {"w": torch.ones(1), "b": torch.tensor(2.0)}}
    ranks = [seen, other, seen]
    packed = witness.pack_ranks(ranks)
    assert packed[2]["weights"] == 0
    for before, after in zip(ranks, witness.unpack_ranks(packed), strict=True):
        assert all(torch.equal(before[key], after[key]) for key in witness.LISTS)
        assert before["weights"].keys() == after["weights"].keys()
        assert all(torch.equal(w, after["weights"][n]) for n, w in before["weights"].items())


@pytest.mark.skipif(bool(LACK), reason=LACK)
def test_real_deepspeed_does_what_is_recorded(
    real: Live | Recorded, spread: dict[torch.dtype, float], tmp_path: Path
) -> None:
    now = run("deepspeed", REAL, tmp_path / "now", [LIVE], tmp_path)
    for rank, recorded in zip(now, real.ranks(LIVE), strict=True):
        far = max(differences(rank[LIVE], recorded).values())
        assert far <= 2 * spread[torch.float32]

    def files(folder: Path) -> set[str]:
        return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix != ".py"}

    assert files(tmp_path / "deepspeed" / LIVE) == files(real.checkpoints / LIVE)
