"""Compares our GLM with SwissArmyTransformer's own GLM130B and ChatGLMModel, gradients included.

The truth is SAT run in float64, by `sat_oracle.py` in `.venv-sat`; all weights are float16 numbers,
so that every dtype starts from the same ones. Two rules, neither with a hand-set tolerance:

- size: the root mean square error of a tensor is at most RATIO times the error of SAT's own run in
  the same dtype. In float64, where SAT is the truth, its float32 error scaled by the dtypes' eps
  stands for both errors, so RATIO + 1 of it are allowed.
- direction: half precision hides a small wrong formula beneath rounding, but rounding does not
  point to it. With d = (SAT with that formula) - truth, in float64, the logits' error projected on
  d must be nearer to 0 than to d.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peer_environments
import pytest
import torch
from foreign import cut_130b, cut_qkv_blocks
from torch import Tensor, nn

from glm_core import ops
from glm_core.config import ModelConfig
from glm_core.model.glm import GLM
from glm_core.pretrained.weights.reading import open_checkpoint
from glm_core.pretrained.weights.writing import convert, target

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-sat/bin/python"
ORACLE = Path(__file__).with_name("sat_oracle.py")
RATIO = 2.0
LOSS_SCALE = 1024.0
EPS_32, EPS_64 = (torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64))
DTYPES = ("float16", "float32", "float64")
MUTATIONS = {
    "GLM130B": ("gelu", "alpha", "halves", "frequencies"),
    "ChatGLMModel": ("gelu", "alpha", "frequencies"),
}
SERVED_BY = {
    "GLM130B": {
        "layer_forward": "DeepNormWithGLUMixin",
        "attention_fn": "SelfAttentionWithFP32SoftmaxMixin",
        "attention_forward": "RotaryEmbeddingMixin",
        "final_forward": "FinalForwardMixin",
    },
    "ChatGLMModel": {
        "layer_forward": "ChatGLMLayerMixin",
        "attention_forward": "ChatGLMAttnMixin",
        "final_forward": "ChatGLMFinalMixin",
    },
}
B, L, D, H, F, V, LAYERS = 4, 64, 64, 4, 160, 1024, 3
COMMON: dict[str, Any] = {
    "num_layers": LAYERS,
    "hidden": D,
    "num_heads": H,
    "ffn": F,
    "vocab": V,
    "max_length": L,
    "placement": "deepnorm",
    "qk_layer_scaling": True,
}
CONFIGS = {
    "GLM130B": ModelConfig(**COMMON, activation="geglu", positions="rope"),
    "ChatGLMModel": ModelConfig(**COMMON, activation="gelu", positions="rope_2d", tied_head=False),
}
SAT_NAMES = {
    "embedding": "transformer.word_embeddings.weight",
    "head": "mixins.chatglm-final.lm_head.weight",
    "final_norm": "transformer.final_layernorm",
    "input_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention.qkv": "attention.query_key_value",
    "attention.out": "attention.dense",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
}

Arrays = dict[str, np.ndarray[Any, Any]]


def sat_name(name: str) -> str:
    """Returns the GLM-130B checkpoint's name of our parameter."""
    if name in SAT_NAMES:
        return SAT_NAMES[name]
    body, _, leaf = name.rpartition(".")
    if not body.startswith("blocks."):
        return f"{SAT_NAMES[body]}.{leaf}"
    _, layer, module = body.split(".", 2)
    return f"transformer.layers.{layer}.{SAT_NAMES[module]}.{leaf}"


def sat_layout(model: str, name: str, value: Tensor) -> Tensor:
    """Orders QKV rows: GLM130B's go by head [q_h, k_h, v_h]; ours and ChatGLMModel's are blocks."""
    if model == "GLM130B" and "attention.qkv" in name:
        return value.view(3, H, D // H, -1).transpose(0, 1).reshape(value.shape)
    return value


def draw_weights(glm: GLM, generator: torch.Generator) -> None:
    """Returns float16 numbers at which the formulas can be told apart: gate inputs lie around
    +-2.3, where tanh-GELU and erf-GELU differ most, their factors around 1, so that the differences
    add up."""
    for name, p in glm.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if name == "embedding":
            p.data = noise
        elif p.ndim == 2:
            p.data = noise * (0.3 if "up" in name or name == "head" else 1.0) / p.shape[1] ** 0.5
        else:
            p.data = noise * 0.1 + (1.0 if name.endswith("norm.weight") else 0.0)
        if name.endswith("up.bias"):
            gate = noise[-F:].sign() * 2.3
            p.data = torch.cat((torch.ones(len(noise) - F), gate))
        p.data = p.data.half().float()


def draw_inputs(generator: torch.Generator) -> dict[str, Tensor]:
    """Returns four masks in one batch: prefix-LM with [MASK]'s repeated position, causal with
    positions far apart, two packed samples, a prefix-LM whose first three keys are hidden from the
    rest."""
    i = torch.arange(L)
    start, sep, positions = (torch.zeros(B, L, dtype=torch.long) for _ in range(3))
    sep[:] = torch.tensor([23, 0, 17, 11])[:, None]
    start[2, 40:], sep[2, 40:], start[3, 3:] = 40, 47, 3
    positions[:] = i
    positions[0, 23:] = 9
    positions[1] = torch.randint(0, 2048, (L,), generator=generator).sort().values
    positions[2, 40:] -= 40
    block = (i - sep + 1).clamp(min=0)
    tokens, labels = torch.randint(0, V, (2, B, L), generator=generator)
    counted = (i >= sep).float()
    return {
        "tokens": tokens,
        "labels": labels,
        "positions": torch.stack((positions, block), 1),
        "key_start": start.int(),
        "key_end": torch.maximum(i + 1, sep).int(),
        "token_weight": counted / counted.sum(),
    }


@dataclasses.dataclass(frozen=True)
class Case:
    """One model with its weights and inputs, and SAT's results."""

    model: str
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    sat: Arrays
    served_by: list[dict[str, str]]
    state: dict[str, Tensor]
    """SAT's own state_dict in float16"""

    def ours(self, dtype: str, mutate: Callable[[GLM], None] | None = None) -> Arrays:
        """Our GLM's answers in SAT's names, layout and units."""
        glm = GLM(CONFIGS[self.model])
        glm.load_state_dict(self.weights)
        glm.to(getattr(torch, dtype))
        if mutate is not None:
            mutate(glm)
        hidden: list[Tensor] = []
        for block in glm.blocks:
            block.register_forward_hook(
                lambda block, _, out: hidden.append(out[0] + block.alpha * out[1])
            )
        inputs = dict(self.inputs)
        labels, token_weight = inputs.pop("labels"), inputs.pop("token_weight")
        logits = glm.logits(**inputs)
        states = {f"hidden.{i}": h for i, h in enumerate(hidden)}
        loss = glm.loss(**inputs, labels=labels, token_weight=token_weight)
        torch.autograd.backward(loss * LOSS_SCALE)
        grads = {
            f"grad/{sat_name(n)}": sat_layout(self.model, n, p.grad.double()) / LOSS_SCALE
            for n, p in glm.named_parameters()
            if p.grad is not None
        }
        answers = {"logits": logits, **states, **grads}
        return {name: value.detach().double().numpy() for name, value in answers.items()}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Returns both models with the results of one oracle process."""
    if reason := peer_environments.lack("sat", "peers"):
        pytest.skip(f"SwissArmyTransformer: {reason}")
    folder = tmp_path_factory.mktemp("sat")
    drawn = {model: draw(model, folder) for model in CONFIGS}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [str(PYTHON), str(ORACLE), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {
        model: Case(
            model,
            *parts,
            dict(np.load(folder / f"{model}.result.npz")),
            [line["served_by"] for line in said if line["model"] == model],
            torch.load(folder / f"{model}.state.pt", weights_only=True)["module"],
        )
        for model, parts in drawn.items()
    }


def draw(model: str, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Makes weights and inputs of the model's case; writes the oracle's request."""
    generator = torch.Generator().manual_seed(20)
    glm = GLM(CONFIGS[model])
    draw_weights(glm, generator)
    inputs = draw_inputs(generator)
    keys = torch.arange(L)
    start, end = inputs["key_start"][..., None], inputs["key_end"][..., None]
    weights = {k: v.detach() for k, v in glm.state_dict().items()}
    mutations = (f"float64-{name}" for name in MUTATIONS[model])
    request = {
        **{k: v.numpy() for k, v in inputs.items() if not k.startswith("key_")},
        **{f"weight/{sat_name(k)}": sat_layout(model, k, v).numpy() for k, v in weights.items()},
        "visible": ((keys >= start) & (keys < end)).numpy(),
        "model": model,
        "num_layers": LAYERS,
        "num_attention_heads": H,
        "inner_hidden_size": F,
        "loss_scale": LOSS_SCALE,
        "runs": [*DTYPES, *mutations],
    }
    arrays: dict[str, Any] = request
    np.savez(folder / f"{model}.request.npz", **arrays)
    return weights, inputs


def rms(x: np.ndarray[Any, Any]) -> float:
    return math.sqrt(float(np.mean(np.square(x, dtype=np.float64))))


def oversized(case: Case, ours: Arrays, dtype: str) -> list[str]:
    """Returns the tensors whose error exceeds what SAT's own rounding allows, and by what
    factor."""
    found = []
    for name, value in ours.items():
        truth = case.sat[f"float64/{name}"]
        if dtype == "float64":
            single = rms(case.sat[f"float32/{name}"] - truth)
            allowed = (RATIO + 1) * single * EPS_64 / EPS_32
        else:
            allowed = RATIO * rms(case.sat[f"{dtype}/{name}"] - truth)
        error = rms(value - truth)
        if not error <= allowed:
            found.append(f"{name}: {error / allowed:.3g} times the allowed error")
    return found


def leaning(case: Case, logits: np.ndarray[Any, Any]) -> dict[str, float]:
    """Returns, for each mutation, where the logits lie on the line from the truth (0) to it (1)."""
    truth = case.sat["float64/logits"]
    found = {}
    for name in MUTATIONS[case.model]:
        d = case.sat[f"float64-{name}/logits"] - truth
        found[name] = float(np.vdot(logits - truth, d) / np.vdot(d, d))
    return found


def rejections(case: Case, ours: Arrays, dtype: str) -> list[str]:
    """Applies both rules; returns nothing if the results pass."""
    leans = leaning(case, ours["logits"])
    return oversized(case, ours, dtype) + [
        f"logits lean {share:.2f} of the way to the formula {name!r}"
        for name, share in leans.items()
        if not abs(share) < 0.5
    ]


@pytest.mark.parametrize("model", CONFIGS)
def test_the_real_classes_ran(cases: dict[str, Case], model: str) -> None:
    assert cases[model].served_by
    for served_by in cases[model].served_by:
        assert SERVED_BY[model].items() <= served_by.items()


@pytest.mark.parametrize("model", CONFIGS)
def test_the_peer_passes_its_own_rule(cases: dict[str, Case], model: str) -> None:
    """SAT's float16 rounding favours no formula; otherwise the second rule would be a lottery."""
    leans = leaning(cases[model], cases[model].sat["float16/logits"])
    assert all(abs(share) < 0.5 for share in leans.values()), leans


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", CONFIGS)
def test_matches(cases: dict[str, Case], model: str, dtype: str) -> None:
    case = cases[model]
    ours = case.ours(dtype)
    assert {f"{dtype}/{name}" for name in ours} | {f"{dtype}/loss"} == {
        name for name in case.sat if name.startswith(f"{dtype}/")
    }
    assert not rejections(case, ours, dtype)


def gelu(glm: GLM) -> None:
    """Uses the other form of GELU."""
    exact = nn.functional.gelu
    for block in glm.blocks:
        mlp: Any = block.mlp
        gated = mlp.activation is ops.geglu
        mlp.activation = tanh_geglu if gated else exact


def tanh_geglu(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return a * nn.functional.gelu(b, approximate="tanh")


def alpha(glm: GLM) -> None:
    """Uses alpha of a model with one layer more."""
    for block in glm.blocks:
        vars(block)["alpha"] = math.sqrt(2 * (LAYERS + 1))


def halves(glm: GLM) -> None:
    """Takes the first half as the gate."""
    for name, p in glm.named_parameters():
        if ".up." in name:
            p.data = torch.cat(p.data.chunk(2)[::-1])


def frequencies(glm: GLM) -> None:
    """Rounds rotary frequencies to float16."""
    cos, sin = glm.rotary(torch.ones(1, 2, 1, dtype=torch.long))
    inverse = torch.atan2(sin, cos).half().float()  # [1, 1, G, P], the angles at position 1

    def rotary(positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[:, : inverse.shape[2]].transpose(1, 2)[..., None] * inverse
        return angles.cos(), angles.sin()

    vars(glm)["rotary"] = rotary


def mask(glm: GLM) -> None:
    """Makes the mask causal."""
    causal = torch.arange(1, L + 1, dtype=torch.int32).expand(B, L)
    glm.register_forward_pre_hook(lambda _, args: (*args[:3], causal))


def layout(glm: GLM) -> None:
    """Puts QKV rows in the other order."""
    for name, p in glm.named_parameters():
        p.data = sat_layout("GLM130B", name, p.data)


MUTANTS = {f.__name__: f for f in (gelu, alpha, halves, frequencies, mask, layout)}


@pytest.mark.parametrize(
    ("model", "mutant"),
    [(model, name) for model in CONFIGS for name in (*MUTATIONS[model], "mask", "layout")],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_wrong_formulas_are_rejected(
    cases: dict[str, Case], model: str, mutant: str, dtype: str
) -> None:
    case = cases[model]
    assert rejections(case, case.ours(dtype, MUTANTS[mutant]), dtype)


MODEL_CONFIG = {
    "num_layers": LAYERS,
    "hidden_size": D,
    "num_attention_heads": H,
    "inner_hidden_size": F,
    "vocab_size": V,
    "max_sequence_length": L,
    "layernorm_order": "post",
}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("model", CONFIGS)
def test_its_checkpoints_are_read(
    cases: dict[str, Case], model: str, size: int, tmp_path: Path
) -> None:
    """SAT's state, cut into ranks by the rules of convert_tp.py, gives SAT's logits; ChatGLM-6B
    also by way of its authors' layout."""
    case = cases[model]
    cut = cut_130b if model == "GLM130B" else cut_qkv_blocks
    (tmp_path / "sat/7").mkdir(parents=True)
    (tmp_path / "sat/latest").write_text("7")
    for r, rank in enumerate(cut(case.state, size)):
        torch.save({"module": rank}, tmp_path / f"sat/7/mp_rank_{r:02d}_model_states.pt")
    described = json.dumps({"model_class": model, **MODEL_CONFIG})
    (tmp_path / "sat/model_config.json").write_text(described)
    checkpoint = open_checkpoint(tmp_path / "sat")
    if model == "ChatGLMModel":
        convert(checkpoint, tmp_path / "authors", target("chatglm-6b"))
        checkpoint = open_checkpoint(tmp_path / "authors")
    # SAT rounded its rotary frequencies to float16 when the published models were trained; the one
    # here has that line commented out, so the logits are compared without it
    assert checkpoint.config == dataclasses.replace(CONFIGS[model], rope_float16=True)
    loaded = dataclasses.replace(case, weights=checkpoint.load(torch.float32).state_dict())
    assert not rejections(case, loaded.ours("float16"), "float16")
