"""Runs SwissArmyTransformer's own GLM130B and ChatGLMModel on the CPU, inside `.venv-sat`.

    .venv-sat/bin/python tests/peers/sat_oracle.py FOLDER

answers every FOLDER/*.request.npz with a *.result.npz, saves the model's own float16 state as SAT
saves it, *.state.pt, and prints which SAT classes ran. A request:

- `model` (GLM130B or ChatGLMModel), `num_layers`, `num_attention_heads`, `inner_hidden_size` (of
  one half for GLM130B), and `weight/<name>` under the names of a GLM-130B checkpoint;
- `tokens`, `labels` [B, L] int64, `positions` [B, 2, L] int64 (GLM130B reads row 0), `visible`
  [B, L, L] bool, `token_weight` [B, L], `loss_scale`;
- `runs`: names `<dtype>` or `<dtype>-<mutation>`, a mutation being one of MUTATIONS.

A result has, for every run, `<run>/logits` [B, L, V], `<run>/hidden.<i>` [B, L, D] after layer i
(not normalised), `<run>/loss` = sum(token_weight * cross-entropy), `<run>/grad/<name>` (unscaled).

What is replaced because SAT assumes a GPU and its authors' packages, and nothing else: einops,
requests and a Triton kernel (stand-ins: imported, never called); `torch.cuda.current_device`; the
mask is made boolean again for GLM130B's `masked_fill_`; where the working dtype is wider than a
hard-wired `.half()` or `.float()` (GLM130B's softmax), that cast gives the working dtype. Rotary
frequencies stay float32 in every dtype, as SAT makes them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import sys
import types
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

# SAT scripts a few functions; scripted code may round differently from the same source run eagerly
os.environ["PYTORCH_JIT"] = "0"
# with a GPU in sight SAT would start NCCL
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import torch
from torch import Tensor

MODULES = {
    "GLM130B": "sat.model.official.glm130B_model",
    "ChatGLMModel": "sat.model.official.chatglm_model",
}
STAND_INS: dict[str, tuple[str, ...]] = {
    "einops": ("rearrange", "repeat"),
    "requests": (),
    "sat.model.position_embedding.triton_rotary": ("apply_rotary",),
}


def import_sat(name: str) -> Any:
    """Returns the SAT module that defines model `name`, imported with the stand-ins in place."""
    for path, names in STAND_INS.items():
        sys.modules[path] = types.ModuleType(path)
        vars(sys.modules[path]).update(dict.fromkeys(names))
    try:
        return importlib.import_module(MODULES[name])
    finally:
        for path in STAND_INS:
            del sys.modules[path]


def gelu(model: Any) -> None:
    """Swaps the form of GELU: tanh for erf (GLM130B), or the reverse (ChatGLMModel)."""
    for layer in model.transformer.layers:
        if hasattr(layer.mlp.activation_func, "activation_fn"):
            tanh = functools.partial(torch.nn.functional.gelu, approximate="tanh")
            layer.mlp.activation_func.activation_fn = tanh
        else:
            layer.mlp.activation_func = torch.nn.functional.gelu


def alpha(model: Any) -> None:
    """Uses DeepNorm's alpha of a model with one layer more."""
    for mixin in model.mixins.values():
        if hasattr(mixin, "num_layers"):
            mixin.num_layers += 1


def halves(model: Any) -> None:
    """Swaps the inner projection's halves, so that the gate is the first one."""
    for layer in model.transformer.layers:
        for parameter in layer.mlp.dense_h_to_4h.parameters():
            parameter.data = torch.cat(parameter.data.chunk(2)[::-1])


def frequencies(model: Any) -> None:
    """Rounds rotary frequencies to float16, as SAT's `get_model` leaves them by `model.half()`."""
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq"):
            buffer.data = buffer.data.to(torch.float16).to(buffer.dtype)


MUTATIONS: dict[str, Callable[[Any], None]] = {
    f.__name__: f for f in (gelu, alpha, halves, frequencies)
}


def build(module: Any, request: dict[str, Any], dtype: torch.dtype) -> Any:
    """Returns the model with the request's weights in `dtype`; its rotary frequencies stay
    float32."""
    weights = {k[7:]: torch.from_numpy(v) for k, v in request.items() if k.startswith("weight/")}
    vocab, hidden = weights["transformer.word_embeddings.weight"].shape
    sizes = ("num_layers", "num_attention_heads", "inner_hidden_size")
    args = Namespace(
        **{name: int(request[name]) for name in sizes},
        vocab_size=vocab,
        hidden_size=hidden,
        max_sequence_length=request["tokens"].shape[1],
        layernorm_order="post",
        skip_init=True,
        model_parallel_size=1,
        fp16=dtype == torch.float16,
        no_glu=False,
        position_encoding_2d=False,
        bos_token_id=0,
        mask_token_id=1,
        gmask_token_id=2,
        pad_token_id=3,
    )
    model = vars(module)[str(request["model"])](args)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not name.endswith("inv_freq")]
    if missing or unexpected:
        sys.exit(f"weights do not fit: missing {missing}, unexpected {unexpected}")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.train()


@contextlib.contextmanager
def casts_at_least(dtype: torch.dtype) -> Iterator[None]:
    """Makes `.half()` and `.float()` never give a narrower dtype than this one."""
    with contextlib.ExitStack() as stack:
        for name, narrow in (("half", torch.float16), ("float", torch.float32)):
            wide = torch.promote_types(narrow, dtype)
            cast = functools.partialmethod(Tensor.to, wide)
            stack.enter_context(mock.patch.object(Tensor, name, cast))
        yield


def answer(module: Any, request: dict[str, Any], run: str) -> dict[str, Tensor]:
    """Runs forward, loss and backward once."""
    name, _, mutation = run.partition("-")
    dtype: torch.dtype = getattr(torch, name)
    model = build(module, request, dtype)
    served_by = {hook: type(f.__self__).__name__ for hook, f in model.hooks.items()}
    print(json.dumps({"run": run, "model": type(model).__name__, "served_by": served_by}))
    if mutation:
        MUTATIONS[mutation](model)
    with casts_at_least(dtype):
        logits, hidden = forward(model, request, dtype)
        labels, weight = (torch.from_numpy(request[key]) for key in ("labels", "token_weight"))
        each = importlib.import_module("sat.mpu").vocab_parallel_cross_entropy(
            logits.float(), labels
        )
        loss = (each * weight).sum()
        scale = float(request["loss_scale"])
        (loss * scale).backward()
    grads = {f"grad/{n}": p.grad.double() / scale for n, p in model.named_parameters()}
    return {"logits": logits, "loss": loss, **hidden, **grads}


def forward(
    model: Any, request: dict[str, Any], dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns logits [B, L, V] and hidden states [B, L, D]. GLM130B takes one row of positions and
    a mask in which True = hidden, and works on [L, B, D]; ChatGLMModel takes two rows, and 1 =
    visible."""
    tokens, positions, visible = (
        torch.from_numpy(request[key]) for key in ("tokens", "positions", "visible")
    )
    visible = visible[:, None]  # [B, 1, L, L]
    sequence_first = type(model).__name__ == "GLM130B"
    if sequence_first:
        real = model.hooks["attention_fn"]
        model.hooks["attention_fn"] = lambda q, k, v, mask, *rest, **named: real(
            q, k, v, mask.bool(), *rest, **named
        )
    logits, *layers = model(
        tokens,
        position_ids=positions[:, 0] if sequence_first else positions,
        attention_mask=~visible if sequence_first else visible.to(dtype),
        output_hidden_states=True,
    )
    states = [layer["hidden_states"] for layer in layers]
    if sequence_first:
        states = [state.transpose(0, 1) for state in states]
    return logits, {f"hidden.{i}": state for i, state in enumerate(states)}


@mock.patch("torch.cuda.current_device", return_value="cpu")
def main(folder: Path, _: mock.Mock) -> None:
    """Answers every request in the folder."""
    for path in sorted(folder.glob("*.request.npz")):
        request = dict(np.load(path))
        module = import_sat(str(request["model"]))
        result: dict[str, Any] = {
            f"{run}/{key}": value.detach().numpy()
            for run in request["runs"]
            for key, value in answer(module, request, str(run)).items()
        }
        model = build(module, request, torch.float16)
        torch.save({"module": model.state_dict()}, path.with_name(f"{request['model']}.state.pt"))
        np.savez(path.with_name(path.name.replace(".request.", ".result.")), **result)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
