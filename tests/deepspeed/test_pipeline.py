"""Checks pipelines without DeepSpeed: two stages against one, planted mistakes, resuming on other
stages, and what a list of layers refuses."""

from __future__ import annotations

import math
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peer_runs import distance, load, run
from pipeline_own import BUGS
from torch import nn

from glm_core.deepspeed.runtime.dataloader import RepeatingLoader
from glm_core.deepspeed.runtime.pipe import p2p, partition
from glm_core.deepspeed.runtime.pipe.module import LayerSpec, TiedLayerSpec
from glm_core.deepspeed.runtime.pipe.topology import (
    PipeModelDataParallelTopology,
    ProcessTopology,
)
from glm_core.errors import ConfigError, TrainingError

RATIO = 2
"""of what two stages may differ by, and what one does when only the order of its sums changes"""


@pytest.fixture(scope="module")
def own(once: Any) -> list[Any]:
    """Returns what each rank saw of pipeline_own.py."""

    def fill(folder: Path) -> None:
        run("own", sys.executable, folder / "seen", [], folder, program="pipeline_own.py")

    return load(once("pipeline", fill) / "seen", 2)


def apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Returns the largest relative difference of losses, norms and the weights that both have."""
    seen = [distance(torch.tensor(one[k]), torch.tensor(other[k])) for k in ("losses", "norms")]
    # of a tied layer only what is tied is the same weight on all stages
    both = one["weights"].keys() & other["weights"].keys() - {UNTIED}
    assert both
    return max([*seen, *(distance(one["weights"][n], other["weights"][n]) for n in both)])


UNTIED = "tied_modules.embed.position.weight"


@pytest.fixture(scope="module")
def allowed(own: Any) -> dict[str, float]:
    """Returns by dtype the difference that roundings alone may make, measured on this machine."""
    whole = {
        "float32": lambda rank: rank["one_stage"],
        "bfloat16": lambda rank: rank["low"]["1 0"],
        "float16": lambda rank: rank["half"]["1"],
    }
    found = {
        dtype: RATIO
        * max(apart(run_of(rank), other) for rank in own for other in rank["otherwise"][dtype])
        for dtype, run_of in whole.items()
    }
    for dtype, limit in found.items():
        assert 0 < limit < 32 * torch.finfo(getattr(torch, dtype)).eps, found
    return found


def test_two_stages_compute_what_one_process_does(own: Any, allowed: dict[str, float]) -> None:
    for rank in own:
        assert apart(rank["bugs"]["right"], rank["one_stage"]) <= allowed["float32"]
        assert max(rank["one_stage"]["norms"]) > 0.2  # twice what it is clipped to


@pytest.mark.parametrize("bug", BUGS)
def test_planted_mistakes_are_found(own: Any, allowed: dict[str, float], bug: str) -> None:
    found = [apart(rank["bugs"][bug], rank["one_stage"]) for rank in own]
    assert max(found) > 1e3 * allowed["float32"], found


def test_every_kind_of_tensor_travels(own: Any, allowed: dict[str, float]) -> None:
    for rank in own:
        assert apart(rank["travels"]["1"], rank["travels"]["2"]) <= allowed["float32"]


def test_micro_batches_may_differ_in_shape(own: Any, allowed: dict[str, float]) -> None:
    for rank in own:
        assert apart(rank["dynamic"]["1"], rank["dynamic"]["2"]) <= allowed["float32"]


@pytest.mark.parametrize("stage", ["0", "1"])
def test_bfloat16(own: Any, allowed: dict[str, float], stage: str) -> None:
    for rank in own:
        found = apart(rank["low"][f"1 {stage}"], rank["low"][f"2 {stage}"])
        assert found <= allowed["bfloat16"]
        for name, weight in rank["low"]["2 0"]["weights"].items():
            assert weight.dtype == torch.bfloat16, name


def test_float16(own: Any, allowed: dict[str, float]) -> None:
    for rank in own:
        found = apart(rank["half"]["1"], rank["half"]["2"])
        assert found <= allowed["float16"]


def test_overflows_are_skipped_by_all_stages(own: Any) -> None:
    first, last = (rank["half"]["high"] for rank in own)
    assert 0 < first["skipped"] == last["skipped"] < 6
    assert first["scale"] == last["scale"] == 2.0 ** (22 - first["skipped"])
    assert first["losses"] == last["losses"]
    assert len(set(first["losses"])) == 8
    assert math.isfinite(first["norms"][-1])


@pytest.mark.parametrize("interval", ["1", "2"])
def test_recomputed_dropout_is_the_same(own: Any, interval: str) -> None:
    for rank in own:
        assert rank["recompute"][interval]["losses"] == rank["recompute"]["0"]["losses"]
        assert apart(rank["recompute"][interval], rank["recompute"]["0"]) == 0


def test_resumes_on_another_number_of_stages_bit_for_bit(own: Any) -> None:
    for number, rank in enumerate(own):
        two, one, again, same = (rank["resume"][k] for k in ("two", "one", "again", "same"))
        assert two.keys() < one.keys()
        assert two.keys() == again.keys()
        for name, value in two.items():
            assert torch.equal(same[name], value), name
            if number == 0 or not name.startswith(UNTIED):
                assert torch.equal(one[name], value), name
                assert torch.equal(again[name], value), name
        for name, value in rank["resume"]["whole"].items():
            assert value.dtype == torch.float32
            assert torch.equal(own[0]["resume"]["one"][name], value), name
        own_groups, both_groups = rank["resume"]["groups"]
        assert both_groups == [(3e-3, 0.01), (1e-2, 0.1)]
        assert own_groups == both_groups[number:]
        first, second = rank["resume"]["goes on"]
        assert first["losses"] == second["losses"]
        assert first["norms"] == second["norms"]


def test_a_stage_holds_as_many_micro_batches_as_stages_follow(own: Any) -> None:
    assert [rank["under_way"]["most"] for rank in own] == [2, 1]


def test_eval(own: Any) -> None:
    first, last = (rank["eval"] for rank in own)
    assert first["loss"] == last["loss"]
    assert first["two"] == last["two"] != first["loss"]
    assert torch.stack(last["list"]).mean().item() == pytest.approx(last["loss"])
    assert last["quiet"].item() == pytest.approx(last["loss"])
    assert last["logits"].shape == last["outputs"].shape == (3, 6, 19)
    assert first["logits"] is first["quiet"] is first["outputs"] is first["list"] is None
    assert not first["training"]


def test_more_losses_and_batches_made_by_a_function(own: Any, allowed: dict[str, float]) -> None:
    for rank in own:
        assert apart(rank["more"]["1"], rank["more"]["2"]) <= allowed["float32"]
        assert rank["more"]["1 square"] == pytest.approx(rank["more"]["2 square"], rel=1e-5)
        assert rank["more"]["1 square"] > 0


def test_slices_with_the_same_weights_count_once(own: Any, allowed: dict[str, float]) -> None:
    for rank in own:
        assert apart(rank["slices"], rank["one_stage"]) <= allowed["float32"]
        for name, value in rank["slices"]["weights"].items():
            assert torch.equal(rank["slices"]["loaded"][name], value), name


REFUSED = {
    "universal": "load the one it was made from",
    "no checkpoint": "no such checkpoint",
    "no files": "holds no mp_rank",
    "forward": r"Only train_batch\(\)",
    "backward": r"Only train_batch\(\)",
    "step": r"Only train_batch\(\)",
    "no_grad": "call eval_batch",
    "no data": "no data",
    "reduce": "use 'avg' or None",
    "zero": "takes 0 or 1",
    "stages": "must divide the 2 ranks",
    "neither": "give one",
    "axis": "named pipe",
    "ranks": "has 4 ranks, the job 2",
    "method": "use parameters, uniform or type",
    "regex": "there are: Attention, Embedding",
    "layer": "not a module, spec or function",
    "nested": "list its layers",
    "mpu": "remove mpu",
}


@pytest.mark.parametrize("call", REFUSED)
def test_refusals_say_what_to_do(own: Any, call: str) -> None:
    for rank in own:
        assert re.search(REFUSED[call], rank["refused"][call])


def test_checkpointed_inputs_are_kept_in_parts(own: Any) -> None:
    for rank in own:
        whole, parts, host = (rank["partitioned"][k] for k in ("whole", "parts", "host"))
        assert torch.equal(whole["grad"], parts["grad"])
        assert torch.equal(whole["grad"], host["grad"])
        assert whole["kept"] == []
        assert parts["kept"] == host["kept"] == [8]  # of 15, padded to 16


# --- without processes ---


def test_a_topology_counts_its_last_axis_fastest() -> None:
    grid = PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=3)
    assert grid.world_size() == 12
    assert grid.get_rank(pipe=1, data=2, model=0) == 10
    assert grid.get_coord(10) == (1, 2, 0)
    assert grid.get_axis_comm_lists("pipe") == [[r, r + 6] for r in range(6)]
    assert grid.get_axis_comm_lists("expert") == []
    assert grid.filter_match(pipe=0, model=1) == [1, 3, 5]
    assert grid.get_axis_list("data", 1) == [2, 3, 8, 9]
    assert grid.get_rank_repr(10) == "model_00"
    assert grid.get_dim("expert") == 0


def wrong(value: object) -> Any:
    """Hides a wrong argument's type from the type checker."""
    return value


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ProcessTopology(["pipe"], [2, 2]), "one positive size each"),
        (lambda: ProcessTopology(["pipe"], [2]).get_rank(data=0), "give all of"),
        (lambda: ProcessTopology(["pipe"], [2]).get_rank(pipe=2), "outside"),
        (lambda: ProcessTopology(["pipe"], [2]).get_coord(2), "there are 2"),
        (lambda: LayerSpec(wrong(lambda x: x)), "not a class of nn.Module"),
        (lambda: LayerSpec(wrong(nn.Linear(2, 2))), "not a class of nn.Module"),
    ],
)
def test_bad_input_is_an_error(call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def test_a_tie_may_name_one_weight_or_more() -> None:
    assert TiedLayerSpec("k", nn.Linear, 2, 2).tied_weight_attr == ["weight"]
    assert TiedLayerSpec("k", nn.Linear, 2, 2, tied_weight_attr="bias").tied_weight_attr == ["bias"]
    assert repr(LayerSpec(nn.Linear, 2, 3, bias=False)) == "Linear(2, 3, bias=False)"


def test_uniform_parts_differ_by_one_at_most() -> None:
    assert partition.uniform(10, 4) == [0, 3, 6, 8, 10]
    assert partition.uniform(2, 4) == [0, 1, 2, 2, 2]


def test_a_layout_survives_its_header() -> None:
    draw = random.Random(0)
    for _ in range(50):
        kinds = tuple(
            p2p.Kind(
                draw.choice(p2p.DTYPES),
                draw.random() < 0.5,
                tuple(draw.randrange(9) for _ in range(draw.randrange(5))),
            )
            for _ in range(draw.randrange(1, 20))
        )
        given = p2p.Layout(draw.random() < 0.5, kinds)
        assert p2p.decode(p2p.encode(given)) == given


def test_too_many_tensors_are_refused() -> None:
    with pytest.raises(TrainingError, match="256 numbers"):
        p2p.encode(p2p.Layout(True, (p2p.Kind(torch.bool, False, (1,)),) * 64))


@pytest.mark.parametrize(("value", "says"), [({"x": 1}, "dict"), ((torch.ones(1), None), "None")])
def test_what_cannot_travel_is_named(value: Any, says: str) -> None:
    with pytest.raises(TrainingError, match=says):
        p2p.layout(value)


def test_another_shape_in_one_batch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    channel = p2p.Channel.__new__(p2p.Channel)
    channel.next, channel.dynamic, channel.device = 1, False, torch.device("cpu")
    sent: list[Any] = []
    monkeypatch.setattr(channel, "_send", lambda x, to: sent.append(x))
    channel.begin()
    channel.send(torch.ones(2))
    channel.send(torch.ones(2))
    assert len(sent) == 3  # one header
    with pytest.raises(TrainingError, match=r"float32\[3\], the batch's first float32\[2\]"):
        channel.send(torch.ones(3))
    channel.begin()
    channel.send(torch.ones(3))


def test_a_repeating_loader_begins_again() -> None:
    loader = RepeatingLoader([1, 2])
    assert [next(loader) for _ in range(5)] == [1, 2, 1, 2, 1]
    with pytest.raises(StopIteration):
        next(RepeatingLoader([]))
