"""Runs SwissArmyTransformer's own GLM130B and ChatGLMModel on the CPU, inside `.venv-sat`.

    .venv-sat/bin/python tests/peers/sat_oracle.py FOLDER

answers every FOLDER/*.request.npz with a *.result.npz and prints the SAT code that ran. A request has

- `model` (GLM130B or ChatGLMModel), `num_layers`, `num_heads`, `ffn` (of one half for GLM130B), `runs`: names
  `<dtype>` or `<dtype>-<mutation>`, the mutations being the functions of this file listed in MUTATIONS;
- `tokens` [B, L], `positions` [B, L] (ChatGLMModel: [B, 2, L]), `visible` [B, L, L], `labels` [B, L],
  `loss_mask` [B, L], `loss_scale`;
- `weight/<name>` under the names of a GLM-130B checkpoint.

A result has, for every run, `<run>/logits` [B, L, V], `<run>/hidden.<i>` [B, L, D] after layer i (not
normalised), `<run>/loss` and `<run>/grad/<name>` (unscaled).

What is replaced because SAT assumes a GPU and its authors' packages, and nothing else: triton, einops and
requests (stand-ins: imported, never called); `torch.cuda.current_device`; the mask is made boolean again for GLM130B's `masked_fill_`; in float32 and
float64 its hard-wired `.half()` gives the working dtype, in float64 so do `.float()` and the frequencies.
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

# SAT scripts a few functions; scripted code may round differently from the same source run eagerly.
os.environ["PYTORCH_JIT"] = "0"

import numpy as np
import torch
from torch import Tensor

Arrays = dict[str, np.ndarray[Any, Any]]
MODULES = {"GLM130B": "sat.model.official.glm130B_model", "ChatGLMModel": "sat.model.official.chatglm_model"}


def import_sat(name: str) -> Any:
    """The SAT module that defines model `name`, imported with the stand-ins in place."""
    stand_ins = {path: types.ModuleType(path) for path in ("triton", "triton.language", "einops", "requests")}
    vars(stand_ins["triton"]).update(jit=lambda kernel: kernel, language=stand_ins["triton.language"])
    vars(stand_ins["triton.language"]).update(constexpr=object)
    vars(stand_ins["einops"]).update(rearrange=None, repeat=None)
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module(MODULES[name])
    finally:
        for path in stand_ins:
            del sys.modules[path]


def gelu(model: Any) -> None:
    """The tanh form of GELU for the erf form (GLM130B), or the reverse (ChatGLMModel)."""
    for layer in model.transformer.layers:
        if hasattr(layer.mlp.activation_func, "activation_fn"):
            tanh = functools.partial(torch.nn.functional.gelu, approximate="tanh")
            layer.mlp.activation_func.activation_fn = tanh
        else:
            layer.mlp.activation_func = torch.nn.functional.gelu


def alpha(model: Any) -> None:
    """DeepNorm's alpha of a model with one layer more."""
    for mixin in model.mixins.values():
        if hasattr(mixin, "num_layers"):
            mixin.num_layers += 1


def halves(model: Any) -> None:
    """The inner projection's halves exchanged: the gate is the first one."""
    for layer in model.transformer.layers:
        for parameter in layer.mlp.dense_h_to_4h.parameters():
            parameter.data = torch.cat(parameter.data.chunk(2)[::-1])


def frequencies(model: Any) -> None:
    """Rotary frequencies rounded to float16, as `model.half()` leaves them."""
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq"):
            buffer.data = buffer.data.half().to(buffer.dtype)


MUTATIONS: dict[str, Callable[[Any], None]] = {f.__name__: f for f in (gelu, alpha, halves, frequencies)}


def build(module: Any, request: Arrays, dtype: torch.dtype) -> Any:
    """The model with the request's weights in `dtype`; frequencies float32, in a float64 model float64."""
    weights = {k[7:]: torch.from_numpy(v) for k, v in request.items() if k.startswith("weight/")}
    vocab, hidden = weights["transformer.word_embeddings.weight"].shape
    model = vars(module)[str(request["model"])](Namespace(
        num_layers=int(request["num_layers"]), num_attention_heads=int(request["num_heads"]), vocab_size=vocab,
        hidden_size=hidden, inner_hidden_size=int(request["ffn"]), max_sequence_length=request["tokens"].shape[1],
        layernorm_order="post", model_parallel_size=1, fp16=dtype == torch.float16, skip_init=True, no_glu=False,
        position_encoding_2d=False, bos_token_id=0, mask_token_id=1, gmask_token_id=2, pad_token_id=3,
    ))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not name.endswith("inv_freq")]
    if missing or unexpected:
        sys.exit(f"weights do not fit {request['model']}: missing {missing}, unexpected {unexpected}")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and dtype == torch.float64:
            exponent = torch.arange(len(buffer), dtype=dtype) / len(buffer)
            buffer.data = 10000.0**-exponent
    return model.train()


@contextlib.contextmanager
def on_cpu(module: Any, dtype: torch.dtype) -> Iterator[None]:
    """The replacements listed at the top of the file."""
    mixin = vars(module).get("SelfAttentionWithFP32SoftmaxMixin")
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("torch.cuda.current_device", lambda: "cpu"))
        if mixin is not None:
            real = mixin.attention_fn

            def attention_fn(self: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *rest: Any, **named: Any) -> Any:
                return real(self, q, k, v, mask.bool(), *rest, **named)

            stack.enter_context(mock.patch.object(mixin, "attention_fn", attention_fn))
        if dtype != torch.float16:
            stack.enter_context(mock.patch.object(Tensor, "half", lambda x: x.to(dtype)))
        if dtype == torch.float64:
            stack.enter_context(mock.patch.object(Tensor, "float", lambda x: x.to(dtype)))
        yield


def answer(module: Any, request: Arrays, run: str) -> dict[str, Tensor]:
    """Forward, loss and backward of one run."""
    name, _, mutation = run.partition("-")
    dtype: torch.dtype = getattr(torch, name)
    with on_cpu(module, dtype):
        model = build(module, request, dtype)
        if mutation:
            MUTATIONS[mutation](model)
        # GLM130B takes True = hidden, ChatGLMModel 1 = visible.
        visible = torch.from_numpy(request["visible"]).bool()[:, None]  # [B, 1, L, L]
        mask = ~visible if str(request["model"]) == "GLM130B" else visible.to(dtype)
        logits, *layers = model(
            torch.from_numpy(request["tokens"]), position_ids=torch.from_numpy(request["positions"]),
            attention_mask=mask, output_hidden_states=True,
        )
        labels, loss_mask = torch.from_numpy(request["labels"]), torch.from_numpy(request["loss_mask"])
        mpu = sys.modules["sat.mpu"]
        losses = mpu.vocab_parallel_cross_entropy(logits.float(), labels)
        loss = (losses * loss_mask).sum() / loss_mask.sum()
        scale = float(request["loss_scale"])
        (loss * scale).backward()
    print(json.dumps({"run": run, "model": type(model).__name__, "hooks": hooks(model)}))
    hidden = [out["hidden_states"] for out in layers]
    if str(request["model"]) == "GLM130B":
        hidden = [h.transpose(0, 1) for h in hidden]  # [L, B, D] -> [B, L, D]
    return {
        "logits": logits, "loss": loss, **{f"hidden.{i}": h for i, h in enumerate(hidden)},
        **{f"grad/{n}": p.grad.double() / scale for n, p in model.named_parameters()},
    }


def hooks(model: Any) -> dict[str, str]:
    """Hook name -> the class that serves it."""
    return {name: type(hook.__self__).__name__ for name, hook in model.hooks.items()}


def main(folder: Path) -> None:
    """Answers every request in the folder."""
    for path in sorted(folder.glob("*.request.npz")):
        request = dict(np.load(path))
        module = import_sat(str(request["model"]))
        result = {f"{run}/{key}": value.detach().numpy()
                  for run in map(str, request["runs"]) for key, value in answer(module, request, run).items()}
        np.savez(path.with_name(path.name.replace(".request.", ".result.")), **result)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
