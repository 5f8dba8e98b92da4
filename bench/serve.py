"""Sends many concurrent requests to a server of a small model and measures errors, the time to the
first token and for each token, and memory. The server is a process of its own."""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import socket
import sys
import time
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from glm_core.measure.memory import resident_peak_bytes
from glm_core.measure.timing import machine

TEXT = ["The quick brown fox jumps over the lazy dog. It runs again and again, then it sleeps."]


class Request(NamedTuple):
    """The result of one request, as the client saw it."""

    status: int
    first_s: float
    """seconds from sending to the first text"""
    token_s: float
    """mean seconds of a token after the first text"""
    tokens: int


def serve(listening: socket.socket, slots: int, queue: int, parent: Connection) -> None:
    """Runs the server: a GLM-130B-style model of 0.9M parameters with random weights. Sends its
    peak resident memory to `parent` at the start and when it is requested to end."""
    import threading

    import uvicorn

    from glm_core.backends import registry
    from glm_core.data import tokenizer
    from glm_core.model.glm import GLM
    from glm_core.model.presets import preset
    from glm_core.pretrained.chat_model import BlankFillingModel
    from glm_core.serve import api
    from glm_core.serve.engine import Engine
    from glm_core.serve.limits import Limits

    trained = tokenizer.Tokenizer(tokenizer.train(TEXT * 20, 320))
    model = GLM(preset("tiny", vocab=384)).init_weights(0).requires_grad_(False)
    chat_model = BlankFillingModel(
        model=model, tokenizer=trained, name="small", stop=(trained.eop, trained.eos)
    )
    engine = Engine(chat_model, registry.usable("cpu"), slots=slots, queue=queue)
    config = uvicorn.Config(api.app(engine, Limits()), log_level="error", backlog=4096)
    server = uvicorn.Server(config)

    def end() -> None:
        parent.send(resident_peak_bytes())
        parent.recv()
        parent.send(resident_peak_bytes())
        server.should_exit = True

    threading.Thread(target=end).start()
    server.run(sockets=[listening])
    engine.close()


async def send(port: int, number: int, max_tokens: int) -> Request:
    """Sends one streamed chat request over a connection of its own, without a client library's
    cost."""
    body = json.dumps(
        {
            "model": "small",
            "max_tokens": max_tokens,
            "seed": number,
            "stream": True,
            "stream_options": {"include_usage": True},
            "messages": [{"role": "user", "content": f"Question {number}: where is the fox?"}],
        }
    )
    begin, times, tokens = time.perf_counter(), list[float](), 0
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
    )
    status = int((await reader.readline()).split()[1])
    async for line in reader:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            status = 500
        elif event.get("usage"):
            tokens = event["usage"]["completion_tokens"]
        elif event["choices"][0]["delta"].get("content"):
            times.append(time.perf_counter() - begin)
    writer.close()
    first = times[0] if times else float("nan")
    rest = (times[-1] - times[0]) / (tokens - 1) if times and tokens > 1 else float("nan")
    return Request(status, first, rest, tokens)


async def send_all(port: int, requests: int, max_tokens: int) -> list[Request]:
    """Sends all requests at once."""
    return await asyncio.gather(*(send(port, i, max_tokens) for i in range(requests)))


def figures(done: list[Request], seconds: float) -> dict[str, Any]:
    """Returns counts, and percentiles in milliseconds over the requests that succeeded."""
    good = [r for r in done if r.status == 200]
    tokens = sum(r.tokens for r in good)
    row: dict[str, Any] = {
        "requests": len(done),
        "refused_429": sum(r.status == 429 for r in done),
        "errors": sum(r.status not in (200, 429) for r in done),
        "tokens": tokens,
        "tokens_s": tokens / seconds,
    }
    for name, values in (
        ("first_token", [r.first_s for r in good]),
        ("per_token", [r.token_s for r in good]),
    ):
        for q in (50, 99):
            row[f"{name}_p{q}_ms"] = float(np.nanpercentile(values, q)) * 1e3 if good else None
    return row


def main() -> None:
    """Runs the server and the requests, and prints the figures. Exits 1 where a request failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--queue", type=int, default=1000)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    connection, child_connection = multiprocessing.Pipe()
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listening:
        context = multiprocessing.get_context("spawn")
        server = context.Process(
            target=serve, args=(listening, args.slots, args.queue, child_connection)
        )
        server.start()
        before = connection.recv()
        port = listening.getsockname()[1]
        asyncio.run(send_all(port, 8, args.max_tokens))  # warm-up
        begin = time.perf_counter()
        done = asyncio.run(send_all(port, args.requests, args.max_tokens))
        row = figures(done, time.perf_counter() - begin)
        connection.send("end")
        row |= {
            "rss_before_bytes": before,
            "rss_peak_bytes": connection.recv(),
            "slots": args.slots,
            "queue": args.queue,
            **machine(),
        }
        server.join()
    if args.json:
        print(json.dumps({"rows": [row]}, indent=1))
    else:
        print("\n".join(f"{k:22} {v}" for k, v in row.items()))
    sys.exit(1 if row["errors"] else 0)


if __name__ == "__main__":
    main()
