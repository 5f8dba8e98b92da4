"""The HTTP interface: OpenAI's completions and chat, ChatGLM-6B's POST /, a page, health,
metrics."""

from __future__ import annotations

import dataclasses
import json
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
from glm_core.pretrained.source import Message
from glm_core.serve.answer import Answer, Piece
from glm_core.serve.engine import BusyError, Engine
from glm_core.serve.guard import Guard, problem
from glm_core.serve.page import PAGE
from glm_core.serve.schema import Chat, Completion, Legacy, Shared

Frame = Callable[[Piece | None], dict[str, Any]]
"""a piece as the endpoint's chunk; None: the chunk before the first piece"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for."""

    max_tokens: int = 1024
    """new tokens"""
    max_body: int = 1 << 20
    """bytes"""
    token: str = ""
    """API key; empty: none is asked for"""


def app(engine: Engine, limits: Limits) -> FastAPI:
    """The application; `engine` is the caller's to close."""
    api = FastAPI(title="glm-core", docs_url=None, redoc_url=None, openapi_url=None)
    _errors(api)
    _openai(api, engine, limits)
    _rest(api, engine, limits)
    api.add_middleware(Guard, max_body=limits.max_body, token=limits.token, measure=engine.measure)
    return api


def _errors(api: FastAPI) -> None:
    """Every error is OpenAI's object."""

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        told = "; ".join(
            f"{'.'.join(map(str, e['loc'][1:])) or 'body'}: {e['msg']}" for e in error.errors()
        )
        return JSONResponse(problem(told), 400)

    @api.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        return JSONResponse(
            problem(f"{request.method} {request.url.path}: {error.detail}"), error.status_code
        )

    @api.exception_handler(GlmCoreError)
    async def failed(request: Request, error: GlmCoreError) -> Response:
        if isinstance(error, BusyError):
            return JSONResponse(problem(str(error), "rate_limit_error"), 429)
        ours = not isinstance(error, PromptError | ConfigError | DataError)
        kind = "server_error" if ours else "invalid_request_error"
        return JSONResponse(problem(str(error), kind), 500 if ours else 400)


def _openai(api: FastAPI, engine: Engine, limits: Limits) -> None:
    source, started = engine.source, int(time.time())

    def opened(body: Shared) -> None:
        if body.model != source.name:
            raise HTTPException(404, unknown("model", body.model, [source.name]))

    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        entry = {"id": source.name, "object": "model", "created": started, "owned_by": "glm-core"}
        return {"object": "list", "data": [entry]}

    @api.post("/v1/completions")
    async def completions(body: Completion, request: Request) -> Response:
        opened(body)
        sampling = body.sampling(body.max_tokens, limits.max_tokens, source.stop)
        answer = Answer(engine, request, source.complete(body.prompt), sampling, body.stops)
        head = _head("cmpl", "text_completion", source.name)

        def frame(piece: Piece | None) -> dict[str, Any]:
            text, finish = (piece.text, piece.finish or None) if piece else ("", None)
            return head | {
                "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": finish}]
            }

        if body.stream:
            return _stream(answer, frame, head, body, first=False)
        piece = await answer.whole()
        return JSONResponse(frame(piece) | {"usage": _usage(answer, piece)})

    @api.post("/v1/chat/completions")
    async def chat(body: Chat, request: Request) -> Response:
        opened(body)
        said = [
            Message("system" if m.role == "developer" else m.role, m.text) for m in body.messages
        ]
        wanted = body.max_completion_tokens or body.max_tokens
        sampling = body.sampling(wanted, limits.max_tokens, source.stop)
        answer = Answer(engine, request, source.chat(said), sampling, body.stops, spoken=True)
        if body.stream:
            head = _head("chatcmpl", "chat.completion.chunk", source.name)
            return _stream(answer, lambda piece: _delta(head, piece), head, body, first=True)
        piece = await answer.whole()
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": piece.finish}
        head = _head("chatcmpl", "chat.completion", source.name)
        return JSONResponse(head | {"choices": [choice], "usage": _usage(answer, piece)})


def _rest(api: FastAPI, engine: Engine, limits: Limits) -> None:
    @api.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return PAGE

    @api.post("/")
    async def legacy(body: Legacy, request: Request) -> dict[str, Any]:
        turns = [
            Message(r, t)
            for pair in body.history
            for r, t in zip(("user", "assistant"), pair, strict=True)
        ]
        prompt = engine.source.chat([*turns, Message("user", body.prompt)])
        room = max(1, min(limits.max_tokens, body.max_length - len(prompt.tokens)))
        sampling = Sampling(
            max_tokens=room,
            temperature=body.temperature,
            top_p=body.top_p,
            seed=secrets.randbits(63),
            stop=engine.source.stop,
        )
        piece = await Answer(engine, request, prompt, sampling, spoken=True).whole()
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        history = [*body.history, (body.prompt, piece.text)]
        return {"response": piece.text, "history": history, "status": 200, "time": now}

    @api.get("/health")
    async def health() -> Response:
        running, waiting = engine.load
        alive = engine.alive
        facts = {
            "status": "ok" if alive else "engine stopped",
            "model": engine.source.name,
            "slots": engine.slots,
            "running": running,
            "waiting": waiting,
        }
        return JSONResponse(facts, 200 if alive else 503)

    @api.get("/metrics")
    async def metrics() -> Response:
        return Response(engine.measure.text(), media_type="text/plain; version=0.0.4")


def _head(prefix: str, kind: str, model: str) -> dict[str, Any]:
    created = int(time.time())
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": created,
        "model": model,
    }


def _usage(answer: Answer, piece: Piece) -> dict[str, int]:
    asked, given = answer.num_prompt_tokens, piece.num_tokens
    return {"prompt_tokens": asked, "completion_tokens": given, "total_tokens": asked + given}


def _delta(head: dict[str, Any], piece: Piece | None) -> dict[str, Any]:
    delta = {"content": piece.text} if piece else {"role": "assistant", "content": ""}
    finish = piece.finish or None if piece else None
    return head | {
        "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]
    }


def _stream(
    answer: Answer, frame: Frame, head: dict[str, Any], body: Shared, first: bool
) -> Response:
    """Server-sent events; an error on the way is the last event."""
    usage = body.stream_options is not None and body.stream_options.include_usage

    async def events() -> AsyncIterator[str]:
        piece = None
        try:
            if first:
                yield _event(frame(None))
            async for piece in answer.pieces():
                yield _event(frame(piece))
            if usage and piece is not None:
                yield _event(head | {"choices": [], "usage": _usage(answer, piece)})
        except GlmCoreError as error:
            yield _event(problem(str(error), "server_error"))
        finally:
            answer.close()
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
