"""Answers of vLLM and SGLang in exactly the fields that their sources define are read. The values
are made up: no server ran here.

Sources (field names and order, what is null, what is left out):
vLLM: vllm/entrypoints/openai/completion/protocol.py and chat_completion/protocol.py at d5dba2d7,
completion/serving.py at cc139d8e (echo, cached tokens, -9999).
SGLang: python/sglang/srt/entrypoints/openai/protocol.py at 004c82e0, utils.py at 9e738dba; its
`/generate`: managers/tokenizer_manager.py, meta_info."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from glm_core.errors import RolloutError
from glm_core.rollout.files import Reply
from glm_core.rollout.formats import load

PROMPT, TOKENS, LOGPROBS = (5, 6, 7), (8, 9), (-0.5, -1.25)
REPLY = Reply(PROMPT, TOKENS, LOGPROBS, cached=2)

VLLM_COMPLETION: dict[str, Any] = {
    "id": "cmpl-8c1d",
    "object": "text_completion",
    "created": 1760000000,
    "model": "glm",
    "choices": [
        {
            "index": 0,
            "text": " a b",
            "logprobs": {
                "text_offset": [0, 2],
                "token_logprobs": [-0.5, -1.25],
                "tokens": [" a", " b"],
                "top_logprobs": [{" a": -0.5, " c": -1.0}, {" b": -1.25, " c": -0.75}],
            },
            "finish_reason": "length",
            "stop_reason": None,
            "token_ids": [8, 9],
            "prompt_logprobs": None,
            "prompt_token_ids": [5, 6, 7],
        }
    ],
    "service_tier": None,
    "system_fingerprint": None,
    "usage": {
        "prompt_tokens": 3,
        "total_tokens": 5,
        "completion_tokens": 2,
        "prompt_tokens_details": {"cached_tokens": 2},
    },
    "kv_transfer_params": None,
}
VLLM_CHAT: dict[str, Any] = {
    "id": "chatcmpl-8c1d",
    "object": "chat.completion",
    "created": 1760000000,
    "model": "glm",
    "choices": [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": " a b",
                "refusal": None,
                "annotations": None,
                "audio": None,
                "function_call": None,
                "tool_calls": [],
                "reasoning": None,
            },
            "logprobs": {
                "content": [
                    {"token": " a", "logprob": -0.5, "bytes": [32, 97], "top_logprobs": []},
                    {"token": " b", "logprob": -1.25, "bytes": [32, 98], "top_logprobs": []},
                ]
            },
            "finish_reason": "stop",
            "stop_reason": None,
            "token_ids": [8, 9],
        }
    ],
    "service_tier": None,
    "system_fingerprint": None,
    "usage": VLLM_COMPLETION["usage"],
    "prompt_logprobs": None,
    "prompt_token_ids": [5, 6, 7],
    "kv_transfer_params": None,
}
SGLANG_USAGE = {
    "prompt_tokens": 3,
    "total_tokens": 5,
    "completion_tokens": 2,
    "prompt_tokens_details": {"cached_tokens": 2},
    "reasoning_tokens": 0,
}
SGLANG_COMPLETION: dict[str, Any] = {
    "id": "7f3a",
    "object": "text_completion",
    "created": 1760000000,
    "model": "default",
    "choices": [
        {
            "index": 0,
            "text": " a b",
            "logprobs": {
                "text_offset": [-1, -1],
                "token_logprobs": [-0.5, -1.25],
                "tokens": [" a", " b"],
                "top_logprobs": [{" a": -0.5}, {" c": -0.75}],
            },
            "finish_reason": "length",
            "matched_stop": None,
            "token_ids": [8, 9],
            "prompt_token_ids": [5, 6, 7],
        }
    ],
    "usage": SGLANG_USAGE,
    "metadata": None,
}
META_INFO: dict[str, Any] = {
    "id": "7f3a",
    "finish_reason": {"type": "length", "length": 2},
    "prompt_tokens": 3,
    "weight_version": "default",
    "num_retractions": 0,
    "input_token_logprobs": [[None, 5, None], [-1.0, 6, None], [-2.0, 7, None]],
    "output_token_logprobs": [[-0.5, 8, None], [-1.25, 9, None]],
    "output_token_logprobs_length": 2,
    "completion_tokens": 2,
    "cached_tokens": 2,
    "e2e_latency": 0.25,
}
SGLANG_GENERATE: dict[str, Any] = {"text": " a b", "output_ids": [8, 9], "meta_info": META_INFO}
SGLANG_CHAT: dict[str, Any] = {
    "id": "7f3a",
    "object": "chat.completion",
    "created": 1760000000,
    "model": "default",
    "choices": [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": " a b",
                "reasoning_content": None,
                "tool_calls": None,
            },
            "logprobs": VLLM_CHAT["choices"][0]["logprobs"],
            "finish_reason": "stop",
            "matched_stop": 9,
            "prompt_token_ids": [5, 6, 7],
            "token_ids": [8, 9],
        }
    ],
    "usage": SGLANG_USAGE,
    "metadata": None,
}


def read(folder: Path, *answers: Any) -> tuple[Reply, ...]:
    path = folder / "answers.jsonl"
    path.write_text("\n".join(json.dumps(a) for a in answers), encoding="utf-8")
    return load(path).replies


def changed(answer: dict[str, Any], **choice: Any) -> dict[str, Any]:
    """Returns an answer whose first choice has other fields; None: without the field."""
    other = copy.deepcopy(answer)
    fields = other["choices"][0] | choice
    other["choices"][0] = {k: v for k, v in fields.items() if k not in choice or v is not None}
    return other


def renamed(answer: dict[str, Any]) -> dict[str, Any]:
    """Returns an answer to a request with return_tokens_as_token_ids alone."""
    other = changed(answer, token_ids=None)
    held = other["choices"][0]["logprobs"]
    names = [f"token_id:{i}" for i in TOKENS]
    if "content" in held:
        for entry, name in zip(held["content"], names, strict=True):
            entry["token"] = name
    else:
        held["tokens"] = names
    return other


ECHO = {
    "text_offset": [0, 1, 2, 3, 5],
    "token_logprobs": [None, -1.0, -2.0, -0.5, -1.25],
    "tokens": ["x", "y", "z", " a", " b"],
    "top_logprobs": [None, {"y": -1.0}, {"z": -2.0}, {" a": -0.5}, {" b": -1.25}],
}


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(VLLM_COMPLETION, id="vllm-completion"),
        pytest.param(renamed(VLLM_COMPLETION), id="vllm-completion-token_id-names"),
        pytest.param(changed(VLLM_COMPLETION, logprobs=ECHO), id="vllm-completion-echo"),
        pytest.param(VLLM_CHAT, id="vllm-chat"),
        pytest.param(renamed(VLLM_CHAT), id="vllm-chat-token_id-names"),
        pytest.param(SGLANG_COMPLETION, id="sglang-completion"),
        pytest.param(changed(SGLANG_COMPLETION, logprobs=ECHO), id="sglang-completion-echo"),
        pytest.param(SGLANG_CHAT, id="sglang-chat"),
        pytest.param(
            changed(SGLANG_CHAT, token_ids=None, meta_info=META_INFO), id="sglang-chat-meta_info"
        ),
        pytest.param(SGLANG_GENERATE, id="sglang-generate"),
    ],
)
def test_an_answer_is_read(tmp_path: Path, answer: dict[str, Any]) -> None:
    assert read(tmp_path, answer, answer) == (REPLY, REPLY)
    assert read(tmp_path, [answer | {"step": 3}]) == (dataclasses.replace(REPLY, step=3),)


@pytest.mark.parametrize("answer", [VLLM_COMPLETION, SGLANG_COMPLETION], ids=["vllm", "sglang"])
def test_hits_of_several_replies_are_not_told_apart(tmp_path: Path, answer: dict[str, Any]) -> None:
    both = {**answer, "choices": answer["choices"] * 2}
    assert [r.cached for r in read(tmp_path, both)] == [0, 0]


def partly(start: int) -> dict[str, Any]:
    facts = META_INFO | {"input_token_logprobs": META_INFO["input_token_logprobs"][start:]}
    return SGLANG_GENERATE | {"meta_info": facts}


CHUNK = {
    "id": "chatcmpl-8c1d",
    "object": "chat.completion.chunk",
    "created": 1760000000,
    "model": "glm",
    "choices": [{"index": 0, "delta": {"content": " a"}, "logprobs": None, "token_ids": [8]}],
}
NOWHERE = {"content": [{"token": "a", "logprob": -9999.0, "bytes": None, "top_logprobs": []}]}


@pytest.mark.parametrize(
    ("answer", "fact"),
    [
        pytest.param(changed(VLLM_COMPLETION, token_ids=None), "return_token_ids", id="text"),
        pytest.param(changed(SGLANG_CHAT, prompt_token_ids=None), "no prompt_token_ids", id="ids"),
        pytest.param(changed(VLLM_COMPLETION, logprobs=None), "has no logprobs", id="logprobs"),
        pytest.param(changed(VLLM_CHAT, logprobs=NOWHERE), "minus infinity", id="9999"),
        pytest.param(
            changed(renamed(VLLM_COMPLETION), logprobs=ECHO | {"tokens": ["token_id:1"] * 5}),
            "echo=false",
            id="echo-without-ids",
        ),
        pytest.param(
            partly(2), "1 of the prompt's 3 tokens; ask with logprob_start_len=0", id="-1"
        ),
        pytest.param(CHUNK, "part of a stream", id="chunk"),
    ],
)
def test_an_answer_that_lacks_something_is_refused(
    tmp_path: Path, answer: dict[str, Any], fact: str
) -> None:
    with pytest.raises(RolloutError) as caught:
        read(tmp_path, answer)
    assert fact in str(caught.value)
    assert "\n" not in str(caught.value)
