"""A rank of a plan reads its own part of a published folder, and no more."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_experts import LATENT, SMALL

from glm_core.bench import folders
from glm_core.distributed.layout import Place, splits_of, take
from glm_core.pretrained.weights.files import StoredTensor
from glm_core.pretrained.weights.plan_parts import read_part
from glm_core.pretrained.weights.reading import open_checkpoint
from glm_core.pretrained.weights.writing import convert, target


@pytest.mark.parametrize("layout", ["glm4_moe", "glm4_moe_lite_fused"])
def test_a_rank_reads_its_part_alone(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    latent = dataclasses.replace(LATENT, rope_interleaved=True)
    config = SMALL if layout == "glm4_moe" else latent
    folders.write(tmp_path / "own", config)
    convert(open_checkpoint(tmp_path / "own"), tmp_path / "hf", target(layout))
    checkpoint = open_checkpoint(tmp_path / "hf")
    assert checkpoint.layout.name == layout
    assert checkpoint.config.num_mtp_layers == 1
    whole = {name: checkpoint.dense(name) for name in checkpoint.shapes}
    read: list[torch.Tensor] = []

    def counted(stored: StoredTensor, *where: Any) -> torch.Tensor:
        read.append(plain(stored, *where))
        return read[-1]

    plain = StoredTensor.read
    monkeypatch.setattr(StoredTensor, "read", counted)
    for tp_rank, ep_rank in itertools.product(range(2), range(2)):
        place = Place(tp=2, tp_rank=tp_rank, ep=2, ep_rank=ep_rank)
        for name, values in whole.items():
            read.clear()
            splits = splits_of(name, config, place)
            part = read_part(checkpoint, name, splits)
            assert part.dtype == values.dtype
            assert torch.equal(part, take(values, splits)), name
            share = math.prod(split.ranks for split in splits)
            assert sum(x.numel() for x in read) * share == values.numel(), name
