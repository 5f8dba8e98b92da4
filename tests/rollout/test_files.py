"""Rollouts are read in every kind that docs/rollout.md lists; what does not fit is refused in one
line with the first difference."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from glm_core.cli import main
from glm_core.errors import ConfigError, RolloutError
from glm_core.rollout import files
from glm_core.rollout.files import Reply, Rollout, Settings, require_same
from glm_core.rollout.formats import from_transformers, load

PROMPT, TOKENS, LOGPROBS = (5, 6, 7), (8, 9), (-0.5, -1.25)
REPLY = Reply(PROMPT, TOKENS, LOGPROBS, step=3, cached=2)


def written(folder: Path, *lines: Any) -> Path:
    path = folder / "file.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_our_own_kind_comes_back_as_it_was(tmp_path: Path) -> None:
    first = Rollout(Settings(temperature=0.7, tokenizer="abc"), (REPLY, REPLY))
    files.save(first, tmp_path / "a.jsonl")
    again = load(tmp_path / "a.jsonl")
    assert again == dataclasses.replace(first, name=str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("raw", [True, False])
def test_what_transformers_generates_is_written(raw: bool) -> None:
    logits = tuple(torch.randn(1, 12) for _ in range(3))
    output = SimpleNamespace(
        sequences=torch.tensor([[*PROMPT, 8, 9, 1]]),
        logits=logits if raw else None,
        scores=logits,
    )
    found = from_transformers(output, [PROMPT], stop=[9], temperature=0.5)
    [reply] = found.replies
    assert (reply.prompt, reply.tokens) == (PROMPT, TOKENS)
    assert reply.logprobs[1] == float(logits[1][0].log_softmax(-1)[9])
    assert found.settings.processed is not raw
    assert found.settings.temperature == 0.5


HEAD = {"format": files.FORMAT}
BODY = {"prompt": [1], "tokens": [2], "logprobs": [-1.0]}


@pytest.mark.parametrize(
    ("lines", "fact"),
    [
        pytest.param([{"format": "other"}], "not a rollout of a known kind", id="format"),
        pytest.param([{**HEAD, "temperature_": 1}], "did you mean temperature", id="setting"),
        pytest.param([{**HEAD, "top_p": 0}], "top_p=0 must lie in (0, 1]", id="top_p"),
        pytest.param([{**HEAD, "temperature": "hot"}], "line 1: ", id="temperature"),
        pytest.param([HEAD, {"prompt": [1]}], "line 2: not a reply", id="keys"),
        pytest.param([HEAD, {**BODY, "tokens": ["a"]}], "'a' is no token id", id="text"),
        pytest.param([HEAD, {**BODY, "tokens": [2, 3]}], "2 tokens and 1 logprobs", id="length"),
        pytest.param([HEAD, {**BODY, "logprobs": [0.5]}], "it must be a finite", id="positive"),
        pytest.param([HEAD, {**BODY, "logprobs": [None]}], "is None", id="none"),
        pytest.param([HEAD, {**BODY, "prompt": []}], "must not be empty", id="empty"),
        pytest.param([{"choices": [{}]}], "no prompt_token_ids", id="no-prompt"),
        pytest.param([{"meta_info": {}}], "return_logprob=true", id="sglang"),
        pytest.param([HEAD, {**BODY, "step": "a"}], "line 2: reply: step and cached", id="step"),
        pytest.param([3], "holds no JSON objects", id="number"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, lines: list[Any], fact: str) -> None:
    with pytest.raises(RolloutError) as caught:
        load(written(tmp_path, *lines))
    assert fact in str(caught.value)
    assert "\n" not in str(caught.value)


LOGPROB = {"tokens": ["x"], "token_logprobs": [-1.0]}
OPENAI = {
    "choices": [{"prompt_token_ids": [1], "token_ids": [2], "logprobs": LOGPROB}],
    "usage": {"prompt_tokens_details": {"cached_tokens": 0}},
}
SGLANG = {"meta_info": {"input_token_logprobs": [[None, 1]], "output_token_logprobs": [[-1.0, 2]]}}
JUNK = (None, 3, -1.5, "x", [], {}, [None], [[1]], True)


def changed(value: Any) -> Iterator[Any]:
    """Yields a file's value with junk in the place of each of its parts, and with each left out."""
    yield from JUNK
    if isinstance(value, dict):
        for key, part in value.items():
            rest = {k: v for k, v in value.items() if k != key}
            yield rest
            yield from ({**rest, key: junk} for junk in changed(part))
    elif isinstance(value, list):
        for i, part in enumerate(value):
            yield from ([*value[:i], junk, *value[i + 1 :]] for junk in changed(part))


@pytest.mark.parametrize(
    "lines", [[HEAD, BODY], [OPENAI], [SGLANG]], ids=["ours", "openai", "sglang"]
)
def test_whatever_a_field_holds_the_file_is_read_or_refused(
    tmp_path: Path, lines: list[Any]
) -> None:
    assert load(written(tmp_path, *lines)).replies
    for line in changed(lines[-1]):
        with suppress(RolloutError):
            files.per_token(load(written(tmp_path, *lines[:-1], line)).replies)


@pytest.mark.parametrize(
    "setting", [{"dtype": "float99"}, {"dtype": 3}, {"chunk": "x"}, {"processed": 1}], ids=str
)
def test_settings_of_another_type_are_refused(tmp_path: Path, setting: dict[str, Any]) -> None:
    with pytest.raises(RolloutError, match=f"line 1: Settings: {next(iter(setting))}=.* must be"):
        load(written(tmp_path, {**HEAD, **setting}, BODY))


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl"
    path.write_text(json.dumps(HEAD) + '\n{"prompt": [1', encoding="utf-8")
    with pytest.raises(RolloutError, match=r"truncated or no JSON"):
        load(path)


def other(**changes: Any) -> Rollout:
    fields = [f.name for f in dataclasses.fields(Reply)]
    reply = dataclasses.replace(REPLY, **{k: v for k, v in changes.items() if k in fields})
    rest = {k: v for k, v in changes.items() if k not in fields}
    settings = Settings(**{"tokenizer": "a", "temperature": 1.0, **rest})
    return Rollout(settings, (REPLY, reply), "b.jsonl")


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"tokens": (8, 4)}, "reply 1: token 1 of tokens is 9 and 4"),
        ({"prompt": (5, 6)}, "reply 1: prompt of 3 and 2 tokens"),
        ({"step": 4}, "reply 1: step 3 and 4"),
        ({"tokenizer": "b"}, "tokenizer is 'a' and 'b'"),
        ({"temperature": 0.5}, "temperature is 1.0 and 0.5"),
        ({"processed": True}, "processed is False and True"),
    ],
)
def test_the_first_difference_is_named(changes: dict[str, Any], fact: str) -> None:
    require_same(other(), other(tokenizer=""))  # unknown: no difference
    with pytest.raises(RolloutError) as caught:
        require_same(other(), other(**changes))
    assert fact in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_command_line_states_what_a_file_does_not(tmp_path: Path) -> None:
    first = load(written(tmp_path, HEAD, BODY))
    found = files.stated(first, ["temperature=0.5", "processed=true", "tokenizer=123"]).settings
    assert (found.temperature, found.processed, found.tokenizer) == (0.5, True, "123")
    for words, fact in {
        "heat=1": "unknown setting",
        "top_p=2": "top_p",
        "top_p=x": "numbers",
    }.items():
        with pytest.raises(ConfigError, match=fact):
            files.stated(first, [words])


@pytest.mark.parametrize(
    ("words", "code", "fact"),
    [
        ("--backend cpu", 2, "--backend needs the weights; give --model too"),
        ("--before x", 2, "--before needs the weights"),
        ("--exact", 2, "--exact needs the weights"),
        ("--model x --control x", 2, "--control stands in for --model"),
        ("--model x --backend cude", 2, "did you mean cuda?"),
        ("--model x", 2, "x: no such checkpoint; give the folder of a run"),
    ],
    ids=str,
)
def test_options_that_would_do_nothing_are_refused_first(
    words: str, code: int, fact: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(written(tmp_path, HEAD, BODY))
    assert main(["align", "rollout", file, file, *words.split()]) == code
    assert fact in capsys.readouterr().err


def test_replies_of_another_number_do_not_match() -> None:
    with pytest.raises(RolloutError, match="2 and 1 replies"):
        require_same(other(), dataclasses.replace(other(), replies=(REPLY,)))
