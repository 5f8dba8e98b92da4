"""A signal in the middle of a stream: the client is told, and the command ends with exit code 0 and
without a traceback. Other machines without a key are warned of."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from folders import chatglm3

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
httpx = pytest.importorskip("httpx", reason="httpx is not installed")

SLOWLY = """
import sys, time
from glm_core import cli
from glm_core.model.generate import Decoder
step = Decoder.step
Decoder.step = lambda self: (time.sleep(0.1), step(self))[1]  # so the signal comes in between
sys.exit(cli.main(["serve", "--backend", "reference", "--port", "0",
                   "--model", *sys.argv[1:]]))
"""
ASK = {"messages": [{"role": "user", "content": "the fox"}], "stream": True}


def test_a_signal_in_a_stream(tmp_path: Path) -> None:
    """SIGTERM here; tests/cli ends a server by SIGINT."""
    folder = chatglm3(tmp_path / "their")
    command = [sys.executable, "-c", SLOWLY, str(folder), "--host", "0.0.0.0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            said, error, end = _interrupted(process, folder.name)
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert "the server is shutting down" in json.loads(error)["error"]["message"]
    assert end == "[DONE]"
    assert said.startswith("warning: 0.0.0.0 is not this machine alone, and there is no API key")
    assert said.count("\n") == 1


def _interrupted(process: Any, model: str) -> tuple[str, str, str]:
    """Returns what the server writes to stderr after its address, and the last two events of a
    reply that a signal ends."""
    port = process.stderr.readline().partition("http://0.0.0.0:")[2].partition(",")[0]
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    with httpx.stream("POST", url, json={**ASK, "model": model}, timeout=60) as reply:
        events = (line[6:] for line in reply.iter_lines() if line)
        next(events)
        next(events)
        process.send_signal(signal.SIGTERM)
        *_, error, end = events
    return process.stderr.read(), error, end


def test_a_stopped_engine_answers_503(serving: Any) -> None:
    """Requests that wait or come later are answered, not left."""
    with serving() as served:
        served.engine.stop()
        body = {**ASK, "model": "small", "stream": False}
        response = httpx.post(f"{served.url}/v1/chat/completions", json=body)
        assert response.status_code == 503
        assert "shutting down" in response.json()["error"]["message"]
