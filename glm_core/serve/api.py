"""The HTTP API: OpenAI's completions and chat, ChatGLM-6B's POST /, a web page, health and
metrics."""

from __future__ import annotations

import dataclasses
import json
import re
import reprlib
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from glm_core.errors import ConfigError, DataError, GlmCoreError, PromptError, unknown
from glm_core.model.prompt import Prompt
from glm_core.model.sample import Sampling
from glm_core.pretrained.templates import Message
from glm_core.serve import objects
from glm_core.serve.engine import BusyError, Engine, StoppedError
from glm_core.serve.grammar import Grammars
from glm_core.serve.limits import Limits, LimitsMiddleware, error_body
from glm_core.serve.page import PAGE
from glm_core.serve.parts import Tools
from glm_core.serve.reply import Choices, Reply
from glm_core.serve.schema import ChatRequest, CompletionRequest, LegacyRequest, OpenAIRequest


def app(engine: Engine, limits: Limits) -> FastAPI:
    """Returns the application. The caller closes `engine`."""
    api = FastAPI(title="glm-core", docs_url=None, redoc_url=None, openapi_url=None)
    _add_error_handlers(api)
    _add_openai_routes(api, engine, limits)
    _add_other_routes(api, engine, limits)
    api.add_middleware(LimitsMiddleware, limits=limits, metrics=engine.metrics)
    if limits.origins:  # outermost: a browser asks for leave without the API key
        api.add_middleware(
            CORSMiddleware, allow_origins=limits.origins, allow_methods=["*"], allow_headers=["*"]
        )
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
    fact = re.sub(r"^\w+ should", "must", error["msg"])
    return f"{field}: {fact}; received {reprlib.repr(error['input'])}"


def _add_openai_routes(api: FastAPI, engine: Engine, limits: Limits) -> None:
    chat_model, started = engine.chat_model, int(time.time())
    grammars = Grammars(chat_model)

    base = {"id": chat_model.name, "object": "model", "created": started, "owned_by": "glm-core"}
    loras = {n: base | {"id": n, "parent": chat_model.name} for n in engine.adapters}
    entries = {chat_model.name: base | {"parent": None}} | loras

    def require_model(name: str) -> None:
        if name not in entries:
            raise HTTPException(404, unknown("model", name, list(entries)))

    def require_possible(body: OpenAIRequest) -> None:
        require_model(body.model)
        engine.require_places(body.n)

    def adapted(prompt: Prompt, name: str) -> Prompt:
        return dataclasses.replace(prompt, adapter=name if name in loras else "")

    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": list(entries.values())}

    @api.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        require_model(name)
        return entries[name]

    @api.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        require_possible(body)
        prompt = adapted(chat_model.completion_prompt(body.prompt), body.model)

        def queue(index: int) -> Reply:
            sampling = body.sampling(body.max_tokens, limits.max_tokens, chat_model, index)
            return Reply(engine, request, prompt, sampling, body.stop_strings)

        head = objects.head("cmpl", "text_completion", body.model)
        form = objects.Completion(head, chat_model.tokenizer)
        return await _respond(Choices(queue, body.n), form, body)

    @api.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        require_possible(body)
        prompt = chat_model.chat_prompt(body.conversation, body.offered_tools)
        prompt = adapted(prompt, body.model)
        max_tokens = body.max_completion_tokens or body.max_tokens
        wanted = body.wanted

        def queue(index: int) -> Reply:
            sampling = body.sampling(max_tokens, limits.max_tokens, chat_model, index)
            if not wanted.is_free:
                constraint = grammars.constraint(wanted)
                sampling = dataclasses.replace(sampling, constraint=constraint)
            return Reply(engine, request, prompt, sampling, body.stop_strings, strip_start=True)

        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        head = objects.head("chatcmpl", kind, body.model)
        tools = Tools([t.name for t in body.callable_tools], body.tool_choice.type)
        form = objects.Chat(head, chat_model.tokenizer, chat_model.thought, tools)
        return await _respond(Choices(queue, body.n), form, body)


async def _respond(choices: Choices, form: objects.Form, body: OpenAIRequest) -> Response:
    """Returns the replies whole, or as server-sent events."""
    if body.stream:
        return _stream(choices, form, body)
    chunks = await choices.whole()
    whole = [form.whole(i, chunk) for i, chunk in enumerate(chunks)]
    usage = objects.usage(choices.prompt_tokens, sum(c.num_tokens for c in chunks))
    return JSONResponse(form.head | {"choices": whole, "usage": usage})


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


def _stream(choices: Choices, form: objects.Form, body: OpenAIRequest) -> Response:
    """Returns the replies as server-sent events; an error is the last event."""
    with_usage = body.stream_options is not None and body.stream_options.include_usage

    async def events() -> AsyncIterator[str]:
        num_tokens = dict.fromkeys(range(body.n), 0)
        try:
            for index in num_tokens:
                if (first := form.opening(index)) is not None:
                    yield _event(form.head | {"choices": [first]})
            async for index, chunk in choices.chunks():
                num_tokens[index] = chunk.num_tokens
                if (part := form.part(index, chunk)) is not None:
                    yield _event(form.head | {"choices": [part]})
            if with_usage:
                usage = objects.usage(choices.prompt_tokens, sum(num_tokens.values()))
                yield _event(form.head | {"choices": [], "usage": usage})
        except GlmCoreError as error:
            yield _event(error_body(str(error), "server_error"))
        finally:
            choices.close()
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
