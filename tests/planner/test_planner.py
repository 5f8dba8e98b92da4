"""Checks the planner: clusters with units, FLOPs and bytes against published ones, search, and the
fit to published runs."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glm_core.errors import ConfigError
from glm_core.model.glm import GLM
from glm_core.model.presets import preset
from glm_core.planner import cluster, cost, efficiency, published, search, slides, validate
from glm_core.planner.sizing import Sizing, broken_rules

GLM_130B = cost.Work(model=preset("glm-130b"), seq=2048)
AS_RUN = Sizing(tp=4, pp=8, dp=24, zero=1, micro_batch=1, global_batch=4224, recompute="full")
A100 = cluster.preset("A100-40G", 768)
BUDGET = search.Budget(tokens=400e9)


def written(folder: Path, **fields: Any) -> Path:
    path = folder / "cluster.json"
    path.write_text(json.dumps(fields))
    return path


WHOLE = {
    "chips": 16,
    "chips_per_node": 8,
    "peak": "0.3 PFLOPS",
    "memory": "40 GiB",
    "memory_bandwidth": "1.5 TB/s",
    "link_within_node": "300 GB/s",
    "link_between_nodes": "200 Gbit/s",
    "power": "0.4 kW",
}


def test_a_cluster_file_is_read_with_its_units(tmp_path: Path) -> None:
    found = cluster.load(written(tmp_path, **WHOLE))
    assert (found.peak, found.memory, found.power) == (0.3e15, 40 * 2**30, 400)
    assert (found.memory_bandwidth, found.link_between_nodes) == (1.5e12, 25e9)


def test_a_preset_chip_may_be_overridden(tmp_path: Path) -> None:
    found = cluster.load(written(tmp_path, chip="H100", chips=16, link_between_nodes="25 GB/s"))
    assert (found.peak, found.link_between_nodes, found.family) == (989e12, 25e9, "H100")


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"peak": 312}, 'peak=312 needs a number and its unit, GFLOPS or TFLOPS or PFLOPS: "312'),
        ({"memory": "40 Gbit/s"}, "memory='40 Gbit/s' needs a number and its unit, GB or GiB"),
        ({"memory": "1e GB"}, "memory='1e GB' is not a number"),
        ({"link_within_node": "0 GB/s"}, "link_within_node=0 must be positive"),
        ({"link_within_node": "9 TB/s"}, "link_within_node='9 TB/s' needs a number and its unit"),
        ({"link_within_node": "9000 GB/s"}, "faster than the chip's memory_bandwidth"),
        ({"link_within_node": "10 GB/s"}, "link_between_nodes is faster than link_within_node"),
        ({"chips": 20}, "chips=20 does not fill nodes of chips_per_node=8"),
        ({"chips": 16.5}, "chips=16.5 must be a whole number"),
        ({"peek": "1 TFLOPS"}, "unknown key 'peek'"),
        ({"chip": "A1000"}, "unknown chip 'A1000'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_cluster_file_says_what_is_wrong(
    changes: dict[str, Any], fact: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        cluster.load(written(tmp_path, **{**WHOLE, **changes}))
    assert fact in str(caught.value)


def test_every_wrong_field_is_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"peak=1 needs.*memory is missing.*power is missing"):
        cluster.load(written(tmp_path, chips=8, chips_per_node=8, peak=1))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match="cluster file"):
        cluster.load(tmp_path / "broken.json")


@pytest.mark.parametrize(
    "name",
    ["glm-130b", "chatglm2-6b", "glm-4-9b", "glm-base", "glm-4.5", "glm-4.5-air", "glm-4.7-flash"],
)
def test_parameters_are_the_models(name: str) -> None:
    config = preset(name)
    with torch.device("meta"):
        real = GLM(config).num_parameters()
    assert cost.parameters(config) == pytest.approx(real, rel=0.005)


@pytest.mark.parametrize("name", ["glm-4.5", "glm-4.7-flash"])
def test_a_token_costs_its_own_experts_only(name: str) -> None:
    config = preset(name, num_mtp_layers=0)
    with torch.device("meta"):
        active = GLM(config).num_active_parameters()
    work = cost.Work(model=config, seq=4096)
    products = config.num_layers * cost.layer_flops(work) + cost.head_flops(work)
    assert products / (2 * 4096) == pytest.approx(active, rel=0.005)


def test_experts_are_split_over_data_parallel_chips() -> None:
    work = cost.Work(model=preset("glm-4.5-air"), seq=4096)
    whole, split = (Sizing(dp=64, ep=ep, zero=1, global_batch=64) for ep in (1, 8))
    experts = 46 * 3 * 4096 * 1408 * 128  # 45 sparse layers and that of multi-token prediction
    less = cost.memory(whole, work)["weights"] - cost.memory(split, work)["weights"]
    assert less == pytest.approx(2 * experts * 7 / 8)
    # ZeRO 1 has shared all of them out already
    assert cost.memory(whole, work)["optimizer"] == cost.memory(split, work)["optimizer"]


def test_the_last_stage_embeds_the_tokens_of_multi_token_prediction() -> None:
    model, plan = preset("glm-4.5-air"), Sizing(pp=2, global_batch=2)
    without = dataclasses.replace(model, num_mtp_layers=0)
    more = [cost.stage_shared(plan, c, 1) - cost.stage_shared(plan, c, 0) for c in (model, without)]
    assert more == [model.vocab * model.hidden, 0]


def test_rows_of_experts_travel_within_a_node_or_across() -> None:
    work, one = cost.Work(model=preset("glm-4.5-air"), seq=4096), cluster.preset("H100", 64)
    rows = 4 * 2 * 4096 * 8 * 4096 * 46 / 47  # four exchanges of a sparse layer
    plans = [Sizing(dp=64, ep=ep, global_batch=64) for ep in (1, 8, 16)]
    times = [cost.expert_parallel_seconds(p, work, one) for p in plans]
    across = rows * 8 / 16 / one.link_between_nodes
    assert times == pytest.approx([0.0, rows * 7 / 8 / one.link_within_node, across])


@pytest.mark.parametrize(
    ("sizes", "rule"),
    [({"dp": 8, "ep": 3}, "divide num_experts=128"), ({"dp": 4, "ep": 8}, "divide dp=4")],
)
def test_experts_that_do_not_divide(sizes: dict[str, int], rule: str) -> None:
    plan = Sizing(**sizes, global_batch=8)
    assert rule in broken_rules(plan, preset("glm-4.5-air"))[0]


@pytest.mark.parametrize(
    ("source", "model", "tflops"),
    [
        ("Smith 2022 section 2.4", "MT-NLG 530B 280 nodes", 126),
        ("Smith 2022 section 2.4", "MT-NLG 530B 420 nodes", 113),
        ("GLM-130B main-log", "GLM-130B 4224", 134),
        ("GLM-130B main-log", "GLM-130B 6144", 141),
        ("BLOOM", "BLOOM 176B", 149.77),
        ("BLOOM chronicles-prequel", "181B 8x6 mbs 4 gbs 2048", 141.27),
        ("BLOOM chronicles-prequel", "187B 4x10", 135.92),
    ],
)
def test_flops_give_the_published_tflops(source: str, model: str, tflops: float) -> None:
    """Computes TFLOPS from the published step times; three groups counted FLOPs themselves."""
    [run] = [r for r in published.runs() if (r.source, r.model) == (source, model)]
    flops = cost.hardware_flops(run.work, run.plan.recompute) * run.plan.global_batch
    assert flops / run.step_s / run.plan.chips / 1e12 == pytest.approx(tflops, rel=0.005)


def test_hardware_flops_add_what_is_computed_twice() -> None:
    model, selective, full = (
        cost.hardware_flops(GLM_130B, r) for r in ("none", "selective", "full")
    )
    attention = 70 * cost.attention_flops(GLM_130B)
    assert model == cost.model_flops(GLM_130B)
    assert selective - model == pytest.approx(attention)
    assert full - model == pytest.approx(70 * cost.layer_flops(GLM_130B) + attention)


def test_bubble_is_the_slides() -> None:
    n, t, m = 32, 4, 176
    assert AS_RUN.bubble == pytest.approx((n / t - 1) / (m + n / t - 1))
    assert dataclasses.replace(AS_RUN, virtual=2).bubble == pytest.approx(3.5 / (176 + 3.5))


def test_activations_are_korthikantis() -> None:
    """s b h (34 + 5 a s/h), eq. 1, and its tensor- and sequence-parallel forms, eq. 2 and 4."""
    config = dataclasses.replace(preset("glm-10b"), ffn=4 * 4096)
    work = cost.Work(model=config, seq=1024, fused_attention=False)
    sbh, scores = 1024 * 2 * 4096, 5 * 64 * 1024 / 4096
    plain = Sizing(micro_batch=2, global_batch=2)
    split = dataclasses.replace(plain, tp=8)
    assert cost.layer_activations(plain, work, "none") == pytest.approx(sbh * (34 + scores))
    assert cost.layer_activations(split, work, "none") == pytest.approx(
        sbh * (10 + 24 / 8 + scores / 8)
    )
    both = dataclasses.replace(split, sp=True)
    assert cost.layer_activations(both, work, "none") == pytest.approx(sbh * (34 + scores) / 8)
    assert cost.layer_activations(both, work, "selective") == pytest.approx(sbh * 34 / 8)
    assert cost.layer_activations(split, work, "full") == pytest.approx(2 * sbh)


def test_zero_shares_the_state() -> None:
    work = cost.Work(model=preset("glm-10b"), seq=1024)
    plans = [Sizing(dp=8, zero=z, global_batch=8, recompute="full") for z in range(4)]
    optimizer, gradients, weights = (
        [cost.memory(p, work)[part] for p in plans]
        for part in ("optimizer", "gradients", "weights")
    )
    n = cost.stage_parameters(plans[0], work.model)
    assert optimizer == pytest.approx([12 * n, *[12 * n / 8] * 3])
    assert gradients == pytest.approx([4 * n, 4 * n, 4 * n / 8, 4 * n / 8])
    assert weights[:3] == [2 * n] * 3
    assert 2 * n / 8 < weights[3] < n


def test_stages_hold_what_they_wait_for() -> None:
    held = cost.stages(AS_RUN, GLM_130B)
    activations = [s["activations"] for s in held]
    assert activations == sorted(activations, reverse=True)
    assert [bool(s["logits"]) for s in held] == [False] * 7 + [True]
    assert held[0]["weights"] == held[7]["weights"] > held[1]["weights"]
    assert cost.fullest_stage(AS_RUN, GLM_130B) == held[0]


def test_a_nodes_ranks_share_its_links() -> None:
    """Across two nodes a buffer crosses the border once, over eight links, not one."""
    two_nodes = cluster.preset("H100", 16)
    work = cost.Work(model=preset("chatglm2-6b"), seq=2048)
    n = cost.parameters(work.model)
    alone = Sizing(dp=16, global_batch=16)
    assert cost.data_parallel_seconds(alone, work, two_nodes) == pytest.approx(
        8 * n * 15 / 16 / (8 * 50e9)
    )
    split = Sizing(tp=8, dp=2, global_batch=16)
    assert cost.data_parallel_seconds(split, work, two_nodes) == pytest.approx(
        8 * cost.stage_parameters(split, work.model) / 2 / 50e9
    )


def test_broken_rules_name_values() -> None:
    wrong = Sizing(tp=5, pp=71, dp=3, virtual=2, zero=2, micro_batch=7, global_batch=100)
    facts = "; ".join(broken_rules(wrong, preset("glm-130b")))
    for fact in (
        "tp=5 does not divide num_heads=96",
        "pp=71 exceeds num_layers=70",
        "virtual=2 needs",
        "zero=2 with pp=71",
        "dp * micro_batch = 21 does not divide global_batch=100",
    ):
        assert fact in facts
    assert broken_rules(AS_RUN, preset("glm-130b")) == []


def test_search_prefers_speed_and_counts_what_it_rejects() -> None:
    found = search.search(GLM_130B, A100, 4224, BUDGET)
    seconds = [c.step.seconds for c in found.feasible]
    assert seconds == sorted(seconds)
    assert all(sum(c.memory.values()) <= A100.memory for c in found.feasible)
    assert found.rejected["memory"] > 100
    best = found.feasible[0]
    assert sum(best.step.parts.values()) == pytest.approx(best.step.seconds)
    assert 0.3 < best.step.mfu <= best.step.hfu < 0.6


def test_as_glm_130b_was_trained() -> None:
    fixed = {"tp": 4, "pp": 8, "zero": 1, "micro_batch": 1, "recompute": "full", "sp": False}
    [found] = search.search(GLM_130B, A100, 4224, BUDGET, {**fixed, "virtual": 1}).feasible
    assert sum(found.memory.values()) < 40e9
    assert found.plan == AS_RUN


def test_what_does_not_fit_says_by_how_much_and_what_does() -> None:
    wanted = {"tp": 4, "pp": 8, "recompute": "none", "micro_batch": 8}
    none = search.search(GLM_130B, A100, 4224, BUDGET, wanted)
    assert none.feasible == []
    assert none.nearest is not None
    closest, [reason] = none.nearest
    over = sum(closest.memory.values()) - 40e9
    assert reason == (
        f"memory: needs {(over + 40e9) / 1e9:.1f} GB a chip, {over / 1e9:.1f} more than 40.0"
    )
    others = search.search(GLM_130B, A100, 4224, BUDGET).feasible
    near = search.nearest_feasible(wanted, others)
    assert near is not None
    assert (near.plan.tp, near.plan.pp) == (4, 8)
    changed = [k for k, v in wanted.items() if getattr(near.plan, k) != v]
    assert len(changed) == 1


def test_a_budget_of_days_and_energy_rejects() -> None:
    tight = search.Budget(tokens=400e9, days=20, energy_mwh=100)
    found = search.search(GLM_130B, A100, 4224, tight)
    assert found.feasible == []
    assert found.rejected["days"] > 0 < found.rejected["energy"]


def test_the_fit_finds_planted_factors_and_keeps_its_floors() -> None:
    rng = np.random.default_rng(0)
    table = rng.uniform(0.1, 1.0, (12, 4))
    planted = np.array([1.6, 0.9, 0.7, 0.3])
    found = efficiency.fit_bounded(table, table @ planted, np.array(efficiency.FLOORS))
    assert found == pytest.approx(planted)
    low = efficiency.fit_bounded(table, table @ (planted - 0.8), np.array(efficiency.FLOORS))
    assert all(x >= floor for x, floor in zip(low, efficiency.FLOORS, strict=True))
    one = efficiency.fit_bounded(table[:1], np.array([3.0]), np.array(efficiency.FLOORS))
    assert table[0] @ one == pytest.approx(3.0)


def test_a_family_without_runs_borrows_and_says_so() -> None:
    own, borrowed = (efficiency.fitted(f, "megatron") for f in ("A100", "Ascend"))
    assert own.origin.startswith("6 of Narayanan 2021")
    assert borrowed == dataclasses.replace(own, origin=f"A100 runs, borrowed: {own.origin}")


def test_published_runs_are_predicted() -> None:
    report = validate.report()
    assert validate.passes(report)
    assert report["families"]["A100"]["held_out"] >= 30
    for family in ("A100", "H100"):
        assert report["families"][family]["median_abs_error"] < 0.05
    assert report["median_abs_memory_error"] < 0.1


def test_another_choice_of_fit_rows_does_as_well() -> None:
    """Twenty random splits of the same sizes: the roles in the file are no lucky draw."""
    rng, medians = random.Random(0), []
    runs = [r for r in published.runs() if r.role != "skip" and r.cluster.family != "TPU"]
    groups: dict[tuple[str, str], list[published.Run]] = {}
    for run in runs:
        groups.setdefault((run.cluster.family, run.stack), []).append(run)
    for _ in range(20):
        errors = []
        for rows in groups.values():
            fit = rng.sample(rows, sum(r.role == "fit" for r in rows))
            table = np.array([np.array(efficiency.terms(r.ideal)) / r.step_s for r in fit])
            factors = efficiency.fit_bounded(table, np.ones(len(fit)), np.array(efficiency.FLOORS))
            errors += [
                abs(float(np.dot(efficiency.terms(r.ideal), factors)) / r.step_s - 1)
                for r in rows
                if r not in fit
            ]
        medians.append(statistics.median(errors))
    assert statistics.median(medians) < 0.06


def test_a_miss_without_a_reason_or_a_large_median_fails() -> None:
    report = validate.report()
    [miss] = [r for r in report["rows"] if r["model"] == "PaLM 540B"]
    assert not validate.passes({**report, "rows": [{**miss, "note": ""}]})
    assert not validate.passes({**report, "median_abs_error_held_out": 0.11})


def test_every_row_has_its_source_and_says_how_it_was_checked() -> None:
    for run in published.runs():
        assert run.source
        assert run.checked
        assert run.url
        assert run.role in published.ROLES
        assert run.plan.chips == run.cluster.chips, run.model
        assert math.isfinite(run.step_s) or run.role == "skip"


def test_slides_are_reproduced() -> None:
    """Days within 2 % of those claimed; A100's implied peak is the data sheet's."""
    rows = {r["system"]: r for r in slides.table()}
    for r in rows.values():
        assert r["days"] == pytest.approx(r["days_claimed"], rel=0.02)
    for system in ("NVIDIA A100", "BMTrain on A100"):
        assert rows[system]["implied_peak_tflops"] == pytest.approx(312, rel=0.01)
    assert rows["Hygon DCU"]["implied_peak_tflops"] == pytest.approx(21.15, abs=0.01)
    assert rows["Sunway"]["implied_peak_tflops"] == pytest.approx(54.07, abs=0.01)
