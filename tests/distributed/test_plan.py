"""A plan says what is wrong with it before a process starts; stages and parts cover everything
once."""

from __future__ import annotations

import pytest
import torch

from glm_core import versions
from glm_core.config import ModelConfig
from glm_core.distributed.apply import give_memory
from glm_core.distributed.layout import Place, chunks, splits_of, take
from glm_core.distributed.pipeline import Stage
from glm_core.distributed.plan import Plan, parse, require_fit, stage_layers, stages_of
from glm_core.errors import ConfigError
from glm_core.model.glm import GLM
from glm_core.model.presets import preset
from glm_core.sensitivity.plans.sample import batch_of


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("tp=0", "tp=0 must be positive"),
        ("tpp=2", "unknown plan key 'tpp'; known: .*did you mean tp"),
        ("tp=x,sp=1", "tp='x': expected int.*sp='1': expected bool"),
        ("sp=true", "sp=True needs tp > 1"),
        ("zero=4,dp=2", "zero=4 must be 0, 1, 2 or 3"),
        ("zero=1", "zero=1 needs dp > 1"),
        ("ep=2", "ep=2 does not divide dp=1, whose processes share the experts; use dp=2"),
        ("dp=4,ep=3", "ep=3 does not divide dp=4"),
        ("dp=2,pp=2,zero=3,schedule=zero-bubble,micro_batches=2", "zero=3 does not go with"),
        ("schedule=gpipe", "needs pp > 1"),
        ("pp=2,schedule=1f1bb", "schedule must be one of gpipe, 1f1b"),
        ("pp=2,schedule=zbv", "virtual=1 must be 2 with schedule='zbv'"),
        ("pp=2,virtual=2", "must be 1 with schedule='1f1b'; use interleaved"),
        ("pp=2,schedule=interleaved,virtual=2,micro_batches=3", "is no multiple of pp=2"),
        ("pp=2,schedule=zbv,virtual=2,recompute=full", "splits the backward pass"),
    ],
)
def test_a_bad_plan_says_why(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse(text)


def test_a_plan_reads_its_own_label() -> None:
    for text in ("tp=1", "tp=2,pp=2,dp=3,zero=2,sp=True,micro_batches=4,recompute=full"):
        assert parse(parse(text).label()) == parse(text)
        assert parse(text).label() == text


def test_every_misfit_is_listed_at_once() -> None:
    model = ModelConfig(num_layers=2, num_heads=4, num_kv_heads=2, ffn=510, vocab=4095)
    with pytest.raises(ConfigError) as caught:
        require_fit(Plan(tp=4, sp=True, pp=3, dp=2), model, world=16, global_batch=3, length=30)
    for fact in (
        "24 processes, started 16",
        "num_kv_heads=2; use 1, 2",
        "ffn=510",
        "vocab=4095",
        "3 stages exceed num_layers=2",
        "length=30",
        "= 2 does not divide global_batch=3",
    ):
        assert fact in str(caught.value)
    assert "num_heads=4;" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "changes", "reason"),
    [
        ("dp=3,ep=3", {}, "ep=3 does not divide num_experts=16; use 1, 2, 4, 8, 16"),
        ("dp=2,ep=2", {"num_experts": 0}, "ep=2 needs a model with experts; leave it out"),
        ("tp=2", {"expert_ffn": 87}, "tp=2 does not divide expert_ffn=87"),
        (
            "pp=2,schedule=zero-bubble,micro_batches=2",
            {"num_mtp_layers": 2},
            "twice through the layers of multi-token prediction, since num_mtp_layers=2",
        ),
        (
            "pp=2,schedule=zbv,virtual=2,micro_batches=2",
            {"num_mtp_layers": 1, "tied_head": True},
            "num_mtp_layers=1 and tied_head=true",
        ),
    ],
)
@pytest.mark.usefixtures("new_torch")
def test_a_sparse_model_that_a_plan_cannot_train(
    text: str, changes: dict[str, int], reason: str
) -> None:
    dense = {"experts_per_token": 0, "expert_ffn": 0, "num_shared_experts": 0}
    dense |= {"num_dense_layers": 0, "expert_groups": 1, "top_groups": 1}
    more = dense if "num_experts" in changes else {}
    plan = parse(text)
    with pytest.raises(ConfigError, match=reason):
        require_fit(
            plan,
            preset("tiny-moe", **more, **changes),
            world=plan.world,
            global_batch=6,
            length=32,
        )


@pytest.fixture
def new_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the plans of a torch that can do all of them pass for possible."""
    monkeypatch.setattr(versions, "torch_version", lambda: "2.13.0")


@pytest.mark.usefixtures("new_torch")
def test_a_tied_embedding_keeps_zero_out_of_a_v() -> None:
    plan = parse("pp=2,dp=2,virtual=2,schedule=zbv,zero=1,micro_batches=2")
    told = {"world": 4, "global_batch": 4, "length": 8}
    require_fit(plan, ModelConfig(tied_head=False), **told)
    with pytest.raises(ConfigError, match="zbv with zero=1"):
        require_fit(plan, ModelConfig(), **told)


@pytest.mark.usefixtures("new_torch")
def test_glm_130b_lies_on_eight_stages_as_published() -> None:
    plan = Plan(tp=4, pp=8, dp=24, zero=1, micro_batches=176, recompute="full")
    require_fit(plan, preset("glm-130b"), world=768, global_batch=4224, length=2048)
    assert [len(s) for s in stage_layers(70, 8)] == [8, 9, 9, 9, 9, 9, 9, 8]


@pytest.mark.parametrize("stages", range(1, 8))
@pytest.mark.parametrize("layers", [7, 12, 28, 70])
@pytest.mark.parametrize("further", [0, 1, 3])
def test_stages_hold_every_layer_once_and_none_is_empty(
    layers: int, stages: int, further: int
) -> None:
    split = stage_layers(layers, stages, further)
    assert [i for s in split for i in s] == list(range(layers))
    sizes = [len(s) for s in split]
    assert min(sizes) >= 1
    if further:
        return
    assert max(sizes) - min(sizes) <= 2
    assert max(sizes[0], sizes[-1]) <= max(sizes[1:-1], default=layers)


def test_the_last_stage_has_fewer_layers_where_it_predicts_further_tokens() -> None:
    """GLM-4.5's 92 layers; a layer of multi-token prediction counts as two."""
    assert [len(s) for s in stage_layers(92, 8, 1)] == [11, 12, 12, 12, 12, 12, 12, 9]
    assert [len(s) for s in stage_layers(2, 2, 1)] == [1, 1]


@pytest.mark.parametrize("schedule", ["interleaved", "zbv"])
def test_processes_hold_every_stage_once(schedule: str) -> None:
    plan = parse(f"pp=4,virtual=2,schedule={schedule},micro_batches=4")
    held = [stages_of(plan, r) for r in range(4)]
    assert sorted(i for stages in held for i in stages) == list(range(8))
    assert held[0] == ([0, 7] if schedule == "zbv" else [0, 4])


SPARSE = {"num_experts": 4, "experts_per_token": 2, "expert_ffn": 6, "num_shared_experts": 1}
LATENT = {"num_kv_heads": 4, "head_dim": 6, "kv_latent": 8, "q_latent": 5, "rope_head_dim": 2}
LATENT["value_head_dim"] = 7


@pytest.mark.parametrize("ep", [1, 2])
@pytest.mark.parametrize("activation", ["gelu", "geglu"])
def test_parts_of_all_ranks_cover_the_whole_once(activation: str, ep: int) -> None:
    sizes: dict[str, int] = {"num_heads": 4, "num_kv_heads": 2, "ffn": 8, "vocab": 12}
    sparse = SPARSE | LATENT if activation == "geglu" else {}
    config = ModelConfig(
        num_layers=1, hidden=16, **{**sizes, **sparse}, activation=activation, tied_head=False
    )
    model = GLM(config)
    for name, p in model.named_parameters():
        whole = torch.arange(p.numel()).reshape(p.shape)
        built = torch.full_like(whole, -1)
        for rank in range(2 * ep):
            place = Place(tp=2, tp_rank=rank % 2, ep=ep, ep_rank=rank // 2)
            splits = splits_of(name, config, place)
            part = take(whole, splits)
            cut = len(part) // 3  # the rows of two data-parallel ranks
            for first, half in ((0, part[:cut]), (cut, part[cut:])):
                for at, piece in chunks(half, splits, first):
                    spans = tuple(slice(a, a + n) for a, n in zip(at, piece.shape, strict=True))
                    held_by_all = len(splits) < (ep > 1) + 1
                    assert held_by_all or (built[spans] == -1).all()
                    built[spans] = piece
        assert torch.equal(built, whole), name


def test_heads_stay_whole_and_gates_stay_paired() -> None:
    config = ModelConfig(hidden=16, num_heads=4, num_kv_heads=2, ffn=8)  # E = 4
    second = Place(tp=2, tp_rank=1)
    [qkv], [up] = (
        splits_of(f"blocks.0.{n}", config, second) for n in ("attention.qkv.bias", "mlp.up.bias")
    )
    assert qkv.spans == ((8, 8), (20, 4), (28, 4))
    assert up.spans == ((4, 4), (12, 4))
    assert splits_of("position_embedding", config, second) == ()
    assert splits_of("blocks.0.attention.out.bias", config, second) == ()


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        ("dp=2,zero=1", "zero=1 needs torch 2.9"),
        (
            "pp=2,schedule=zero-bubble,micro_batches=2",
            "schedule=zero-bubble needs torch 2.13",
        ),
        ("pp=2,schedule=zbv,virtual=2", "schedule=zbv needs torch 2.13"),
    ],
)
def test_a_plan_that_needs_a_newer_torch_is_refused_before_the_work(
    monkeypatch: pytest.MonkeyPatch, text: str, needed: str
) -> None:
    monkeypatch.setattr(versions, "torch_version", lambda: "2.7.1+das.opt1")
    with pytest.raises(ConfigError, match=rf"{needed} or newer; here is 2\.7\.1\+das\.opt1"):
        require_fit(parse(text), preset("tiny"), world=2, global_batch=4, length=32)


def test_a_stage_of_all_layers_predicts_further_tokens() -> None:
    config = preset("tiny-moe", num_layers=2, hidden=32, ffn=32, vocab=64, max_length=32)
    whole, stage = GLM(config).init_weights(0), Stage(config, 0, 1)
    give_memory(stage, torch.device("cpu"), torch.float32)
    stage.load_state_dict(whole.state_dict())
    batch = batch_of([(torch.arange(13) * k % 64, 3) for k in (5, 7)])
    mask = {"key_start": batch.key_start, "key_end": batch.key_end}
    learned = {"labels": batch.labels, "token_weight": batch.loss_weight / batch.loss_weight.sum()}
    rest = {"positions": batch.positions, **mask, **learned}
    loss = stage(batch.tokens, tokens=batch.tokens, **rest)
    assert torch.equal(loss[0], whole.loss(batch.tokens, **rest))
    alone = whole.cross_entropy(whole(batch.tokens, batch.positions, *mask.values()), **learned)
    assert loss > alone  # and the further token's loss is in it
