"""A model and how to talk to it from a checkpoint of any readable layout, by what its files say."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import torch

from glm_core.errors import CheckpointError, DataError, PromptError
from glm_core.export.run import Exported
from glm_core.model.glm import GLM
from glm_core.model.prompt import Prompt, causal
from glm_core.pretrained.source import Message, Source, from_run
from glm_core.pretrained.tokenizers import (
    CONFIG,
    GLM4,
    ChatGLM2,
    Fast,
    Tokenizers,
    Vocabulary,
    beside,
    read_json,
)
from glm_core.pretrained.weights import open_checkpoint
from glm_core.pretrained.weights.writing import BESIDE
from glm_core.training import checkpoint

ROLES = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""GLM-4's, after the prefix, where the files bring none (tokenization_chatglm.py,
build_single_message)"""
SPACED = ROLES.replace("|>\n", "|>\n ")
"""ChatGLM3's (its tokenizer_config.json): its code encodes each message alone, and sentencepiece
puts a blank before what is encoded alone"""
ROUNDS = (
    "{% for m in messages %}{% if m.role == 'user' %}[Round {{ loop.index0 // 2 + 1 }}]\n\n"
    "问：{{ m.content }}\n\n答：{% else %}{{ m.content }}\n\n{% endif %}{% endfor %}"
)
"""ChatGLM2's (tokenization_chatglm.py, build_prompt)"""
HOLE = re.compile("\ue000(\\d+)\ue001")
"""what stands for what people wrote while a template is filled in"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Causal(Source):
    """A model that goes on from a text, and is talked to by its tokenizer's template."""

    tokenizer: Any
    template: str
    ends: tuple[int, ...]
    """tokens that end an answer"""

    @property
    def fills(self) -> bool:
        return False

    @property
    def stop(self) -> tuple[int, ...]:
        return self.ends

    def complete(self, text: str) -> Prompt:
        """The prefix and the text. Raises PromptError for an empty text."""
        if not text:
            raise PromptError("prompt: is empty; write something to go on from")
        return causal([*self.tokenizer.prefix, *self.tokenizer.encode(text)])

    def chat(self, messages: Sequence[Message]) -> Prompt:
        """The template filled in. What people write is text, also where it spells a special
        token. Raises PromptError where the last word is not the user's."""
        if not messages or messages[-1].role != "user":
            raise PromptError("messages: the last one must be the user's; add a question")
        ids = self._encoded(self._filled(messages, True), messages)
        prefix = self.tokenizer.prefix
        return causal(ids if ids[: len(prefix)] == prefix else [*prefix, *ids])

    def answer(self, messages: Sequence[Message]) -> list[int]:
        """As the template puts it after the words that ask for it, a newline perhaps before it."""
        told, asked = self._filled(messages, False), self._filled(messages[:-1], True)
        hole = f"\ue000{len(messages) - 1}\ue001"
        said = told.removeprefix(asked).partition(hole)[0] if told.startswith(asked) else ""
        return self._encoded(said + hole, messages)

    def _filled(self, messages: Sequence[Message], asking: bool) -> str:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True
        )
        given = [{"role": m.role, "content": f"\ue000{i}\ue001"} for i, m in enumerate(messages)]
        try:
            return environment.from_string(self.template).render(
                messages=given, add_generation_prompt=asking
            )
        except jinja2.TemplateError as error:
            raise PromptError(f"chat template: {error}; give other roles or order") from None

    def _encoded(self, told: str, messages: Sequence[Message]) -> list[int]:
        """Special tokens where the template spells them; all between two of them is one text,
        whoever wrote it."""
        special, encode = self.tokenizer.special, self.tokenizer.encode
        names = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
        ids: list[int] = []
        for part in re.split(f"({names})", told) if names else [told]:
            if part in special:
                ids.append(special[part])
            elif part:
                ids += encode(HOLE.sub(lambda hole: messages[int(hole[1])].content, part))
        return ids


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blanks(Source):
    """A model that fills blanks, with the stop tokens of its files."""

    ends: tuple[int, ...]

    @property
    def stop(self) -> tuple[int, ...]:
        return self.ends


def from_path(path: str | Path, dtype: torch.dtype = torch.float32) -> Source:
    """A training run of ours (its folder or one of its checkpoints), or the folder of a checkpoint
    of any layout with its tokenizer. Quantized linears stay as they are stored. Raises
    CheckpointError, DataError."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such checkpoint; give a run's folder, or a checkpoint's with its tokenizer"
        )
    if not path.is_dir() or _is_run(path):
        return from_run(path, dtype=dtype)
    return from_checkpoint(path, dtype)


def _is_run(path: Path) -> bool:
    folders = (path, path / checkpoint.FOLDER)
    return any(
        (f / checkpoint.LATEST).is_file() and any(f.glob(checkpoint.PATTERN)) for f in folders
    )


def from_checkpoint(path: Path, dtype: torch.dtype) -> Source:
    """The model of a checkpoint's folder; sizes, stop tokens and chat template are those of its
    files."""
    found = open_checkpoint(path)
    tokenizer = beside(path, found.layout.name)
    if tokenizer.vocab > found.config.vocab:
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.vocab} tokens, the model {found.config.vocab}; "
            "check that they belong together"
        )
    ends = _ends(path, found.files.config, getattr(tokenizer, "special", {}))
    model = found.load(dtype, quantized=True).requires_grad_(False)
    return _source(path, model, tokenizer, ends)


def from_export(folder: str | Path) -> tuple[Source, Exported]:
    """A folder of `glm-core export`: how it is talked to, by a model without weights, and what runs
    it. Raises CheckpointError, DataError, UnsupportedOpError."""
    folder, runner = Path(folder), Exported(folder)
    tokenizer = beside(folder, "of an exported model")
    if tokenizer.sha256 != runner.facts.get("tokenizer"):
        raise CheckpointError(f"{folder}: was exported with another tokenizer; export it again")
    with torch.device("meta"):
        model = GLM(runner.config)
    ends = tuple(int(i) for i in json.loads(runner.facts.get("stop", "[]")))
    return _source(folder, model, tokenizer, ends), runner


def _source(path: Path, model: GLM, tokenizer: Tokenizers, ends: tuple[int, ...]) -> Source:
    files = tuple(f for n in BESIDE if (f := path / n).is_file())
    about: dict[str, Any] = {"model": model, "name": path.resolve().name, "files": files}
    if isinstance(tokenizer, Fast | ChatGLM2 | GLM4):
        template, ends = _template(path, tokenizer), ends or _named(tokenizer)
        return Causal(tokenizer=tokenizer, template=template, ends=ends, **about)
    return Blanks(tokenizer=tokenizer, ends=ends or (tokenizer.eop, tokenizer.eos), **about)


ANSWERING = ("<|user|>", "<|observation|>")
"""roles whose tokens end an answer: it is their turn"""


def _ends(folder: Path, config: dict[str, Any], special: dict[str, int]) -> tuple[int, ...]:
    """eos_token_id, a number or several, of generation_config.json; or of config.json, and beside
    it the tokens of the roles that answer, as ChatGLM3's chat has it (modeling_chatglm.py)."""
    own = read_json(folder / "generation_config.json")
    value = own.get("eos_token_id")
    roles: tuple[str, ...] = ()
    if value is None or own.get("_from_model_config"):
        value, roles = config.get("eos_token_id", value), ANSWERING
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if strange := [i for i in ids if type(i) is not int]:
        raise DataError(f"{folder}: eos_token_id holds {strange[0]!r}; it must hold token ids")
    return tuple(dict.fromkeys([*ids, *(special[r] for r in roles if r in special and ids)]))


def _named(tokenizer: Vocabulary) -> tuple[int, ...]:
    """Special tokens that end an answer by their names."""
    ends = ("<|endoftext|>", "<|user|>", "<|observation|>", "eop", "</s>")
    return tuple(tokenizer.special[n] for n in ends if n in tokenizer.special)


def _template(folder: Path, tokenizer: Vocabulary) -> str:
    """chat_template.jinja, or tokenizer_config.json's, or what the special tokens imply."""
    if (file := folder / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    listed = read_json(folder / CONFIG).get("chat_template")
    if isinstance(listed, list):  # several, by name
        listed = next((t["template"] for t in listed if t.get("name") == "default"), None)
    if listed:
        return str(listed)
    if "<|user|>" not in tokenizer.special:
        return ROUNDS
    return SPACED if isinstance(tokenizer, ChatGLM2) else ROLES
