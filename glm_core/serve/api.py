"""The HTTP API: OpenAI's completions and chat, ChatGLM-6B's POST /, a web page, health and
metrics."""

from __future__ import annotations

import json
import reprlib
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from glm_core.errors import ConfigError, DataError, GlmCoreError, PromptError, unknown
from glm_core.model.sample import Sampling
from glm_core.pretrained.templates import Message
from glm_core.serve.engine import BusyError, Engine, StoppedError
from glm_core.serve.limits import Limits, LimitsMiddleware, error_body
from glm_core.serve.page import PAGE
from glm_core.serve.reply import Chunk, Reply
from glm_core.serve.schema import ChatRequest, CompletionRequest, LegacyRequest, OpenAIRequest

Format = Callable[[Chunk | None], dict[str, Any]]
"""turns a chunk into the endpoint's JSON object; None stands for the object before the first
chunk"""


def app(engine: Engine, limits: Limits) -> FastAPI:
    """Returns the application. The caller closes `engine`."""
    api = FastAPI(title="glm-core", docs_url=None, redoc_url=None, openapi_url=None)
    _add_error_handlers(api)
    _add_openai_routes(api, engine, limits)
    _add_other_routes(api, engine, limits)
    api.add_middleware(LimitsMiddleware, limits=limits, metrics=engine.metrics)
    return api


def _add_error_handlers(api: FastAPI) -> None:
    """Makes every error OpenAI's error object."""

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return JSONResponse(error_body("; ".join(map(_sentence, error.errors()))), 400)

    @api.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        return JSONResponse(
            error_body(f"{request.method} {request.url.path}: {error.detail}"), error.status_code
        )

    @api.exception_handler(GlmCoreError)
    async def failed(request: Request, error: GlmCoreError) -> Response:
        if isinstance(error, BusyError):
            return JSONResponse(error_body(str(error), "rate_limit_error"), 429)
        if isinstance(error, PromptError | ConfigError | DataError):
            return JSONResponse(error_body(str(error)), 400)
        status = 503 if isinstance(error, StoppedError) else 500
        return JSONResponse(error_body(str(error), "server_error"), status)


def _sentence(error: dict[str, Any]) -> str:
    """Returns an error of the schema in our own words."""
    field = ".".join(map(str, error["loc"][1:])) or "body"
    match error["type"]:
        case "missing":
            return f"{field}: missing; give it"
        case "extra_forbidden":
            return f"{field}: unknown field; leave it out"
        case "json_invalid":
            return f"body: not JSON ({error['ctx']['error']}); send a JSON object"
    fact = error["msg"].replace("Input should be", "must be")
    return f"{field}: {fact}; received {reprlib.repr(error['input'])}"


def _add_openai_routes(api: FastAPI, engine: Engine, limits: Limits) -> None:
    chat_model, started = engine.chat_model, int(time.time())

    def require_model(name: str) -> None:
        if name != chat_model.name:
            raise HTTPException(404, unknown("model", name, [chat_model.name]))

    entry = {"id": chat_model.name, "object": "model", "created": started, "owned_by": "glm-core"}

    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [entry]}

    @api.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        require_model(name)
        return entry

    @api.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        require_model(body.model)
        sampling = body.sampling(body.max_tokens, limits.max_tokens, chat_model.stop)
        prompt = chat_model.completion_prompt(body.prompt)
        reply = Reply(engine, request, prompt, sampling, body.stop_strings)
        head = _head("cmpl", "text_completion", chat_model.name)

        def as_json(chunk: Chunk | None) -> dict[str, Any]:
            text, finish = (chunk.text, chunk.finish_reason or None) if chunk else ("", None)
            return head | {
                "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": finish}]
            }

        if body.stream:
            return _stream(reply, as_json, head, body, opening=False)
        chunk = await reply.whole()
        return JSONResponse(as_json(chunk) | {"usage": _usage(reply, chunk)})

    @api.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        require_model(body.model)
        messages = [
            Message("system" if m.role == "developer" else m.role, m.text) for m in body.messages
        ]
        max_tokens = body.max_completion_tokens or body.max_tokens
        sampling = body.sampling(max_tokens, limits.max_tokens, chat_model.stop)
        prompt = chat_model.chat_prompt(messages)
        reply = Reply(engine, request, prompt, sampling, body.stop_strings, strip_start=True)
        if body.stream:
            head = _head("chatcmpl", "chat.completion.chunk", chat_model.name)
            return _stream(reply, lambda chunk: _delta(head, chunk), head, body, opening=True)
        chunk = await reply.whole()
        message = {"role": "assistant", "content": chunk.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None}
        choice |= {"finish_reason": chunk.finish_reason}
        head = _head("chatcmpl", "chat.completion", chat_model.name)
        return JSONResponse(head | {"choices": [choice], "usage": _usage(reply, chunk)})


def _add_other_routes(api: FastAPI, engine: Engine, limits: Limits) -> None:
    @api.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return PAGE

    @api.post("/")
    async def legacy(body: LegacyRequest, request: Request) -> dict[str, Any]:
        history = [
            Message(role, text)
            for turn in body.history
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        prompt = engine.chat_model.chat_prompt([*history, Message("user", body.prompt)])
        max_tokens = max(1, min(limits.max_tokens, body.max_length - len(prompt.tokens)))
        sampling = Sampling(
            max_tokens=max_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
            seed=secrets.randbits(63),
            stop=engine.chat_model.stop,
        )
        chunk = await Reply(engine, request, prompt, sampling, strip_start=True).whole()
        return {
            "response": chunk.text,
            "history": [*body.history, (body.prompt, chunk.text)],
            "status": 200,
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        }

    @api.get("/health")
    async def health() -> Response:
        running, waiting = engine.load
        alive = engine.alive
        facts = {
            "status": "ok" if alive else "engine stopped",
            "model": engine.chat_model.name,
            "slots": engine.slots,
            "running": running,
            "waiting": waiting,
        }
        return JSONResponse(facts, 200 if alive else 503)

    @api.get("/metrics")
    async def metrics() -> Response:
        return Response(engine.metrics.text(), media_type="text/plain; version=0.0.4")


def _head(prefix: str, kind: str, model: str) -> dict[str, Any]:
    """Returns the fields that all JSON objects of one reply begin with."""
    created = int(time.time())
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": created,
        "model": model,
    }


def _usage(reply: Reply, chunk: Chunk) -> dict[str, int]:
    prompt, completion = reply.num_prompt_tokens, chunk.num_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def _delta(head: dict[str, Any], chunk: Chunk | None) -> dict[str, Any]:
    """Returns a streamed object of the chat endpoint."""
    delta = {"content": chunk.text} if chunk else {"role": "assistant", "content": ""}
    finish = chunk.finish_reason or None if chunk else None
    return head | {
        "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]
    }


def _stream(
    reply: Reply, as_json: Format, head: dict[str, Any], body: OpenAIRequest, *, opening: bool
) -> Response:
    """Returns the reply as server-sent events; an error is the last event. opening: whether an
    object comes before the first chunk."""
    usage = body.stream_options is not None and body.stream_options.include_usage

    async def events() -> AsyncIterator[str]:
        chunk = None
        try:
            if opening:
                yield _event(as_json(None))
            async for chunk in reply.chunks():
                yield _event(as_json(chunk))
            if usage and chunk is not None:
                yield _event(head | {"choices": [], "usage": _usage(reply, chunk)})
        except GlmCoreError as error:
            yield _event(error_body(str(error), "server_error"))
        finally:
            reply.close()
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
