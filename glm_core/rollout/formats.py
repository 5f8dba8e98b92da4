"""Reads rollouts of any known kind, and writes what transformers generates.

Kinds: ours; answers of an OpenAI-style API with `logprobs` (completions and chat; vLLM, SGLang and
our own server), one JSON object a line or a list of them; answers of SGLang's `/generate`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from glm_core.errors import RolloutError
from glm_core.rollout.files import Reply, Rollout, Settings, parsed, reply, well_formed

IDS = "ask vLLM or SGLang with return_token_ids=true, or SGLang's /generate"
NO_LOGPROB = -9999.0
"""what vLLM writes in place of minus infinity"""


def load(path: str | Path) -> Rollout:
    """Reads a rollout of any known kind. Raises RolloutError."""
    where = str(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RolloutError(f"{where}: cannot be read ({error}); give a file of text") from None
    lines = _objects(text, where)
    if "format" in lines[0]:
        return parsed(lines, where)
    found: list[Reply] = []
    for number, line in enumerate(lines, 1):
        with well_formed(f"{where}, answer {number}"):
            found += _answer(line, where, number)
    return Rollout(Settings(engine=str(lines[0].get("model", ""))), tuple(found), where)


def _objects(text: str, where: str) -> list[dict[str, Any]]:
    """Returns the objects of a file: one a line, or one JSON value that is an object or a list."""
    lines = [line for line in text.splitlines() if line.strip()]
    try:
        values = [json.loads(line) for line in lines]
    except ValueError:
        try:
            values = [json.loads(text)]
        except ValueError as error:
            raise RolloutError(
                f"{where}: is truncated or no JSON ({error}); write one JSON object a line"
            ) from None
    if len(values) == 1 and isinstance(values[0], list):
        values = values[0]
    if not values or not all(isinstance(v, dict) for v in values):
        raise RolloutError(f"{where}: holds no JSON objects; write one object a line")
    return values


def _answer(answer: dict[str, Any], where: str, number: int) -> Iterator[Reply]:
    """Yields the replies of one answer of an API."""
    place = f"{where}, answer {number}"
    step = answer.get("step", 0)
    if "meta_info" in answer:
        yield _generated(answer["meta_info"], place, step)
        return
    choices = answer.get("choices")
    if not isinstance(choices, list):
        raise RolloutError(f"{place}: not a rollout of a known kind; docs/rollout.md lists them")
    if any("delta" in c for c in choices) or str(answer.get("object", "")).endswith(".chunk"):
        raise RolloutError(f"{place}: is a part of a stream; ask with stream=false")
    usage = (answer.get("usage") or {}).get("prompt_tokens_details") or {}
    # vLLM counts the last prompt's hits, SGLang all of them: for one reply that is the same
    cached = usage.get("cached_tokens") or 0 if len(choices) == 1 else 0
    for choice in choices:
        prompt = choice.get("prompt_token_ids") or answer.get("prompt_token_ids")
        if not prompt:
            raise RolloutError(f"{place}: has no prompt_token_ids; {IDS}")
        facts = choice.get("meta_info") or {}  # SGLang with return_meta_info
        if "output_token_logprobs" in facts:
            ids, logprobs = _pairs(facts["output_token_logprobs"])
        else:
            ids, logprobs = _openai(choice, place)
        yield reply(place, prompt, ids, logprobs, step, facts.get("cached_tokens") or cached)


def _openai(choice: dict[str, Any], where: str) -> tuple[list[int], list[float]]:
    """Returns token ids and log probabilities of a choice: of a completion or of a chat message."""
    held = choice.get("logprobs")
    if not held:
        raise RolloutError(f"{where}: has no logprobs; ask with logprobs=1 (chat: true)")
    if held.get("content") is not None:
        names = [entry["token"] for entry in held["content"]]
        logprobs = [entry["logprob"] for entry in held["content"]]
    else:
        names, logprobs = held["tokens"], held["token_logprobs"]
    if NO_LOGPROB in logprobs:
        raise RolloutError(
            f"{where}: a log probability is {NO_LOGPROB:g}, which stands for minus infinity; no "
            "token of it can be drawn: leave this answer out"
        )
    ids = choice.get("token_ids")
    if ids is not None:  # with echo=true the prompt's log probabilities come first
        return ids, logprobs[max(len(logprobs) - len(ids), 0) :]
    # vLLM with return_tokens_as_token_ids: "token_id:123"
    parts = [str(name).partition("token_id:") for name in names]
    if any(before or not id.isdigit() for before, _, id in parts):
        raise RolloutError(f"{where}: names its tokens by text; {IDS}")
    if None in logprobs:
        raise RolloutError(f"{where}: holds the prompt's tokens too; ask with echo=false")
    return [int(id) for _, _, id in parts], logprobs


def _generated(facts: dict[str, Any], where: str, step: int) -> Reply:
    """Returns the reply of SGLang's `/generate`."""
    if "output_token_logprobs" not in facts or "input_token_logprobs" not in facts:
        raise RolloutError(
            f"{where}: has no output_token_logprobs and input_token_logprobs; ask with "
            "return_logprob=true and logprob_start_len=0"
        )
    prompt, _ = _pairs(facts["input_token_logprobs"])
    count = facts.get("prompt_tokens", len(prompt))
    if len(prompt) != count:
        raise RolloutError(
            f"{where}: input_token_logprobs holds {len(prompt)} of the prompt's {count} tokens; "
            "ask with logprob_start_len=0"
        )
    tokens, logprobs = _pairs(facts["output_token_logprobs"])
    return reply(where, prompt, tokens, logprobs, step, facts.get("cached_tokens") or 0)


def _pairs(entries: list[list[Any]]) -> tuple[list[int], list[float]]:
    """Returns ids and log probabilities of SGLang's lists, which hold [logprob, id, text]."""
    return [entry[1] for entry in entries], [entry[0] for entry in entries]


def from_transformers(
    output: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stop: Sequence[int] = (),
    step: int = 0,
    **settings: Any,
) -> Rollout:
    """Returns the rollout of what transformers' `generate(..., return_dict_in_generate=True,
    output_logits=True)` returned for `prompts` (without padding). Its `logits` are the model's own;
    where only `scores` are there, they are after penalty, temperature and top-p, and the rollout
    says so. stop: ids that end a reply and belong to it. settings: fields of Settings."""
    raw = getattr(output, "logits", None)
    rows: Sequence[Tensor] | None = raw if raw is not None else getattr(output, "scores", None)
    if not rows:
        raise RolloutError(
            "transformers: the output has neither logits nor scores; generate with "
            "return_dict_in_generate=True, output_logits=True"
        )
    new = output.sequences[:, -len(rows) :]  # [B, L]
    replies = []
    for b, prompt in enumerate(prompts):
        ids = new[b].tolist()
        end = next((i + 1 for i, t in enumerate(ids) if t in stop), len(ids))
        logprobs = [float(rows[i][b].float().log_softmax(-1)[ids[i]]) for i in range(end)]
        replies.append(reply(f"reply {b}", list(prompt), ids[:end], logprobs, step))
    facts = {"engine": "transformers", "processed": raw is None, **settings}
    return Rollout(Settings(**facts), tuple(replies))
