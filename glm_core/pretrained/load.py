"""Loads a model with its tokenizer and chat format from a training run, a published checkpoint of
any layout, or an ONNX export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from glm_core import config, environment
from glm_core.data import corpus
from glm_core.data import tokenizer as run_tokenizers
from glm_core.data.tokenizer import Tokenizer
from glm_core.errors import CheckpointError, DataError
from glm_core.export.run import Exported
from glm_core.model.glm import GLM
from glm_core.pretrained.chat_model import BlankFillingModel, CausalModel, ChatModel
from glm_core.pretrained.templates import find_template
from glm_core.pretrained.tokenizers import (
    AnyTokenizer,
    ChatGLM2Tokenizer,
    ChatTokenizer,
    FastTokenizer,
    GLM4Tokenizer,
    load_tokenizer,
    read_json,
)
from glm_core.pretrained.weights import runs
from glm_core.pretrained.weights.reading import Checkpoint, open_checkpoint
from glm_core.pretrained.weights.writing import COMPANIONS
from glm_core.training import checkpoint

NEXT_SPEAKERS = ("<|user|>", "<|observation|>")
"""role tokens that end a reply, because another speaker's turn begins"""
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""keys of generation_config.json that are fields of Sampling"""
END_NAMES = ("<|endoftext|>", *NEXT_SPEAKERS, "eop", "</s>")
"""special tokens that end a reply where no config file names any"""


Build = Callable[[Checkpoint], GLM]
"""makes the model of an opened checkpoint, in place of reading all of it into main memory"""


def from_path(
    path: str | Path, dtype: torch.dtype = torch.float32, build: Build | None = None
) -> ChatModel:
    """Loads a training run (its folder or one of its checkpoints), or a checkpoint of any layout
    (its folder or file) with the tokenizer beside it. Quantized linears stay quantized. Raises
    CheckpointError, DataError."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such checkpoint; give the folder of a run, or of a checkpoint with its "
            "tokenizer"
        )
    if _is_run(path):
        return from_run(path, dtype=dtype, build=build)
    return from_checkpoint(path, dtype, build)


def _is_run(path: Path) -> bool:
    if path.is_file():
        return path.match(checkpoint.PATTERN) or runs.run_config(path) is not None
    folders = (path, path / checkpoint.FOLDER)
    return any(
        (f / checkpoint.LATEST).is_file() and any(f.glob(checkpoint.PATTERN)) for f in folders
    )


def from_run(
    path: str | Path,
    cache_dir: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    build: Build | None = None,
) -> BlankFillingModel:
    """Loads the model of a training run (its folder, or one of its checkpoints), rounded to
    `dtype`. Raises CheckpointError, DataError."""
    file = checkpoint.find(Path(path))
    model, settings, facts = load_run_model(file, build)
    run = file.parent.parent
    tokenizer_file = run / checkpoint.TOKENIZER
    if tokenizer_file.is_file():
        tokenizer = Tokenizer(tokenizer_file.read_bytes())
    else:  # old runs did not save it: train it again from the run's text
        folder = Path(cache_dir or environment.cache())
        text = corpus.load(settings.data, folder)
        tokenizer = run_tokenizers.load(text, settings.data.vocab, folder)
    trained_with = facts["sampler"].get("of", {}).get("tokenizer", tokenizer.sha256)
    if trained_with != tokenizer.sha256:
        raise CheckpointError(
            f"{file}: was trained with another tokenizer ({trained_with[:12]}, found "
            f"{tokenizer.sha256[:12]}); put the run's tokenizer.model beside its config.toml"
        )
    return BlankFillingModel(
        model=model.to(dtype),
        tokenizer=tokenizer,
        name=run.resolve().name,
        stop=(tokenizer.eop, tokenizer.eos),
        files=(tokenizer_file,) if tokenizer_file.is_file() else (),
    )


def load_run_model(
    file: Path, build: Build | None = None
) -> tuple[GLM, config.RunConfig, dict[str, Any]]:
    """Returns the frozen float32 model of a run's checkpoint, or what `build` makes of it, the
    run's config and the checkpoint's metadata. Raises CheckpointError."""
    tensors, facts = checkpoint.load(file)
    settings = config.from_dict(config.RunConfig, facts["config"])
    with torch.device("meta" if build else "cpu"):
        model = GLM(settings.model)
    weights = {n: tensors.get(f"master.{n}") for n, _ in model.named_parameters()}
    if missing := [n for n, w in weights.items() if w is None]:
        raise CheckpointError(
            f"{file}: lacks {missing[0]} and {len(missing) - 1} more, it holds adapters without "
            "their base; give the base, and this run as --adapter"
        )
    if build:
        del weights, tensors
        model = build(open_checkpoint(file, settings.model))
    else:
        model.load_state_dict(weights)
    return model.requires_grad_(False), settings, facts


def from_checkpoint(path: Path, dtype: torch.dtype, build: Build | None = None) -> ChatModel:
    """Loads a checkpoint; sizes, stop tokens and chat template come from the files of its
    folder."""
    weights = open_checkpoint(path)
    folder = weights.files.home
    tokenizer = load_tokenizer(folder, weights.layout.name)
    if tokenizer.vocab > weights.config.vocab:
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.vocab} tokens, the model "
            f"{weights.config.vocab}; check that they belong together"
        )
    stop = _stop_ids(folder, weights.files.config, getattr(tokenizer, "special", {}))
    model = build(weights) if build else weights.load(dtype, quantized=True)
    model.requires_grad_(False)
    return _chat_model(folder, model, tokenizer, stop)


def from_export(folder: str | Path) -> tuple[ChatModel, Exported]:
    """Loads a folder of `glm-core export`. Returns its tokenizer and chat format with a model that
    has no weights, and the runner that computes in the model's place. Raises CheckpointError,
    DataError, UnsupportedOpError."""
    folder, runner = Path(folder), Exported(folder)
    tokenizer = load_tokenizer(folder, "of an exported model")
    if tokenizer.sha256 != runner.facts.get("tokenizer"):
        raise CheckpointError(f"{folder}: was exported with another tokenizer; export it again")
    with torch.device("meta"):
        model = GLM(runner.config)
    stop = tuple(int(i) for i in json.loads(runner.facts.get("stop", "[]")))
    return _chat_model(folder, model, tokenizer, stop), runner


def _chat_model(
    path: Path, model: GLM, tokenizer: AnyTokenizer, stop: tuple[int, ...]
) -> ChatModel:
    name, files = path.resolve().name, tuple(f for n in COMPANIONS if (f := path / n).is_file())
    if isinstance(tokenizer, FastTokenizer | ChatGLM2Tokenizer | GLM4Tokenizer):
        return CausalModel(
            model=model,
            tokenizer=tokenizer,
            name=name,
            stop=stop or _stop_ids_by_name(tokenizer),
            sampling=_recommended(path),
            files=files,
            template=find_template(path, tokenizer),
        )
    stop = stop or (tokenizer.eop, tokenizer.eos)
    return BlankFillingModel(
        model=model,
        tokenizer=tokenizer,
        name=name,
        stop=stop,
        sampling=_recommended(path),
        files=files,
    )


def _stop_ids(folder: Path, config: dict[str, Any], special: dict[str, int]) -> tuple[int, ...]:
    """Returns eos_token_id, one or several, of generation_config.json; else of config.json,
    together with the role tokens of the next speakers (ChatGLM3's modeling_chatglm.py, chat)."""
    own = read_json(folder / "generation_config.json")
    value = own.get("eos_token_id")
    roles: tuple[str, ...] = ()
    if value is None or own.get("_from_model_config"):
        value, roles = config.get("eos_token_id", value), NEXT_SPEAKERS
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if invalid := [i for i in ids if type(i) is not int]:
        raise DataError(f"{folder}: eos_token_id holds {invalid[0]!r}; it must hold token ids")
    return tuple(dict.fromkeys([*ids, *(special[r] for r in roles if r in special and ids)]))


def _recommended(folder: Path) -> dict[str, float]:
    """Returns the sampling settings of generation_config.json; `do_sample: false` is temperature
    0. Raises DataError for one that is no number."""
    stated = read_json(folder / "generation_config.json")
    values = {name: stated[name] for name in SAMPLING if stated.get(name) is not None}
    if stated.get("do_sample") is False:
        values["temperature"] = 0.0
    if odd := [f"{k}={v!r}" for k, v in values.items() if type(v) not in (int, float)]:
        raise DataError(f"{folder}: generation_config.json has {', '.join(odd)}; write numbers")
    return values


def _stop_ids_by_name(tokenizer: ChatTokenizer) -> tuple[int, ...]:
    return tuple(tokenizer.special[n] for n in END_NAMES if n in tokenizer.special)
