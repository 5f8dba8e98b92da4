"""Fine-tunes an adapter (LoRA or P-Tuning v2) beside a frozen base model, or prepares a plan to
train all of its weights."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from glm_core import config as configs
from glm_core import environment
from glm_core.config import ModelConfig, RunConfig
from glm_core.data.open import open_sampler
from glm_core.data.tokenizer import Tokenizer
from glm_core.errors import ConfigError
from glm_core.model.adapters import AdapterConfig, attach
from glm_core.model.glm import GLM
from glm_core.pretrained.adapters import FILE_NAME, save_adapter
from glm_core.pretrained.chat_model import CausalModel, ChatModel
from glm_core.pretrained.conversations import ExampleSampler, read_examples, to_example
from glm_core.pretrained.load import Build, from_path
from glm_core.pretrained.templates import Message
from glm_core.pretrained.tokenizers import FILES, load_tokenizer
from glm_core.pretrained.weights.plan_parts import read_part
from glm_core.pretrained.weights.reading import Checkpoint, open_checkpoint
from glm_core.training import checkpoint
from glm_core.training.batches import Sampler
from glm_core.training.live import Live
from glm_core.training.loop import Result
from glm_core.training.run import run

if TYPE_CHECKING:  # its imports take a second
    from glm_core.distributed.apply import Source

Conversations = str | Path | Sequence[Sequence[Message]]
"""a JSONL file (docs/checkpoints.md), or conversations whose last message is the assistant's"""


class Finetuned(NamedTuple):
    """A finished fine-tuning run."""

    result: Result
    adapter: Path
    """the adapter's file, for `load_adapter` and the --adapter option"""


def finetune(
    base: str | Path,
    out_dir: str | Path,
    conversations: Conversations | None = None,
    *,
    adapter: AdapterConfig | None = None,
    config: RunConfig | None = None,
    base_config: ModelConfig | None = None,
    resume: bool = False,
) -> Finetuned:
    """Trains an adapter on conversations, or without any on the text of `config.data` by blank
    infilling. The base's files stay unchanged; `out_dir` gets the run and adapter.safetensors.

    base: a training run, or a checkpoint's folder of any layout. adapter: default LoRA of rank 8.
    config: data and training settings; its model is replaced by the base's. base_config: sizes of a
    base that is stored without config.json. Raises GlmCoreError."""
    job = prepare(
        base,
        conversations,
        adapter=adapter or AdapterConfig(),
        config=config or RunConfig(),
        base_config=base_config,
    )
    return job.run(out_dir, resume=resume)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneJob:
    """A fine-tuning run that is ready to start."""

    config: RunConfig
    """the run's config, with the base's model"""
    model: GLM
    """the frozen base with a new adapter"""
    sampler: Sampler | None
    """batches of the conversations or of text; None: of `config.data`, with a new tokenizer"""
    adapter: AdapterConfig

    def run(
        self,
        out_dir: str | Path,
        *,
        resume: bool = False,
        tensorboard: bool = False,
        live: Live | None = None,
        timeout_s: float = 0.0,
    ) -> Finetuned:
        """Trains and saves the adapter; the options are those of `run`."""
        result = run(
            self.config,
            out_dir,
            resume=resume,
            sampler=self.sampler,
            model=self.model,
            tensorboard=tensorboard,
            live=live,
            timeout_s=timeout_s,
        )
        path = Path(out_dir) / FILE_NAME
        save_adapter(path, self.model, self.adapter)
        return Finetuned(result, path)


def prepare(
    base: str | Path,
    conversations: Conversations | None,
    *,
    adapter: AdapterConfig,
    config: RunConfig,
    base_config: ModelConfig | None = None,
) -> FinetuneJob:
    """Loads the base and the training data, and attaches a new adapter; the arguments are those of
    `finetune`. Raises GlmCoreError."""
    sampler: Sampler | None
    if conversations is not None:
        config, model, sampler = _with_conversations(base, conversations, config)
    else:
        config, model, sampler = _with_text(Path(base), config, base_config)
    attach(model, adapter, config.train.seed)
    return FinetuneJob(config=config, model=model, sampler=sampler, adapter=adapter)


def planned(
    base: str | Path, conversations: Conversations, config: RunConfig
) -> tuple[RunConfig, Sampler, Source]:
    """Returns what a plan needs to train all weights of a base on conversations: the config with
    the base's model, the conversations in its chat format, and where each process reads its part of
    the weights. No values are read before. Raises GlmCoreError."""
    opened: list[Checkpoint] = []

    def without_weights(checkpoint: Checkpoint) -> GLM:
        opened.append(checkpoint)
        with torch.device("meta"):
            return GLM(checkpoint.config)

    config, _, sampler = _with_conversations(base, conversations, config, without_weights)
    return config, sampler, functools.partial(read_part, opened[0])


def _with_conversations(
    base: str | Path, source: Conversations, config: RunConfig, build: Build | None = None
) -> tuple[RunConfig, GLM, Sampler]:
    """Returns the base, and a sampler of conversations in the base's chat format."""
    chat_model = from_path(base, getattr(torch, config.train.dtype), build)
    _warn_of_date(chat_model)
    if isinstance(source, str | Path):
        examples = read_examples(chat_model, source)
    else:
        examples = [to_example(chat_model, messages) for messages in source]
    model = chat_model.model
    length = min(config.data.length, model.config.max_length)
    data_config = dataclasses.replace(config.data, length=length, vocab=chat_model.tokenizer.vocab)
    config = dataclasses.replace(config, model=model.config, data=data_config)
    sampler = ExampleSampler(examples, length, config.train.seed)
    return config, model, sampler


def _warn_of_date(chat_model: ChatModel) -> None:
    """Says on stderr that the run can be resumed today only, where that is so."""
    dated = isinstance(chat_model, CausalModel) and chat_model.template.prints_date
    if dated and environment.date() is None:
        print(
            "chat template: prints today's date, so tomorrow the conversations have other ids; "
            f"set {environment.DATE}={datetime.date.today()} to resume on another day",
            file=sys.stderr,
        )


def _with_text(
    base: Path, config: RunConfig, base_config: ModelConfig | None
) -> tuple[RunConfig, GLM, Sampler | None]:
    """Returns the base, and a sampler of the config's text in the base's tokens, None if the base
    has no tokenizer. Raises ConfigError for a tokenizer that is not glm-core's: text needs its
    blanks."""
    tokenizer = _run_tokenizer(base)
    if (base / "config.toml").is_file():
        base_config = configs.load(base / "config.toml").model
        base = base / checkpoint.FOLDER
    weights = open_checkpoint(base, base_config)
    model = weights.load(getattr(torch, config.train.dtype), quantized=True)
    if tokenizer is None:
        return dataclasses.replace(config, model=model.config), model, None
    data_config = dataclasses.replace(config.data, vocab=tokenizer.vocab)
    config = dataclasses.replace(config, model=model.config, data=data_config)
    sampler = open_sampler(
        data_config,
        config.train.seed,
        ".cache",
        positions=model.config.positions,
        tokenizer=tokenizer,
    )
    return config, model, sampler


def _run_tokenizer(base: Path) -> Tokenizer | None:
    folder = base if base.is_dir() else base.parent
    if not any((folder / name).is_file() for name in FILES):
        return None
    tokenizer = load_tokenizer(folder, "of a base")
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    raise ConfigError(
        f"base {base}: text is learned with a tokenizer of glm-core, this base has another; give "
        "conversations instead (--pairs FILE)"
    )
