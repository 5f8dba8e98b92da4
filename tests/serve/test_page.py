"""The web page works in a headless Chromium, driven over its debugging pipe."""

from __future__ import annotations

import copy
import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from glm_core.model.adapters import AdapterConfig, adapter_state, attach
from glm_core.model.loras import LoRAs

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
QUIET = "--disable-quic --no-first-run --disable-background-networking --disable-component-update"
FLAGS = "--headless --no-sandbox --disable-gpu --disable-sync --remote-debugging-pipe"

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine; install chromium"
)


class Browser:
    """A browser with one page, driven by the Chrome DevTools Protocol: JSON messages that end with
    NUL."""

    def __init__(self, profile: Path) -> None:
        (read, self._to), (self._from, write) = os.pipe(), os.pipe()
        command = [str(CHROMIUM), *FLAGS.split(), *QUIET.split(), f"--user-data-dir={profile}"]
        line = f"exec {shlex.join(command)} 3<&{read} 4>&{write}"
        self._process = subprocess.Popen(
            ["bash", "-c", line], pass_fds=(read, write), stderr=subprocess.DEVNULL
        )
        os.close(read)
        os.close(write)
        self._left, self._id, self._session = b"", 0, ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = session
        self.call("Page.enable")

    def call(self, method: str, **params: Any) -> Any:
        """Calls a method and returns its result."""
        self._id += 1
        message = {"id": self._id, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (reply := self._next()).get("id") != self._id:
            pass
        assert "error" not in reply, reply
        return reply["result"]

    def open(self, url: str) -> None:
        """Opens a URL and waits until it is loaded."""
        self.call("Page.navigate", url=url)
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def run(self, script: str) -> Any:
        """Returns the value of a JavaScript expression, awaited."""
        done = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def until(self, condition: str) -> None:
        """Waits in the page until a JavaScript condition is true."""
        self.run(
            "new Promise(done => { const look = setInterval(() => { if (" + condition + ") "
            "{ clearInterval(look); done(); } }, 10); })"
        )

    def close(self) -> None:
        """Closes the browser."""
        self._session = ""
        self.call("Browser.close")
        os.close(self._to)
        os.close(self._from)
        self._process.wait(60)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            part = os.read(self._from, 1 << 16)
            assert part, "the browser is gone"
            self._left += part
        message, _, self._left = self._left.partition(b"\0")
        decoded: dict[str, Any] = json.loads(message)
        return decoded


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    chromium = Browser(tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.close()


def ask(browser: Browser, question: str) -> None:
    browser.run("delete document.body.dataset.state")
    browser.run(f"get('question').value = {json.dumps(question)}; get('send').click()")


def texts(browser: Browser, kind: str) -> list[str]:
    contents: list[str] = browser.run(
        f"[...document.querySelectorAll('#talk .{kind}')].map(box => box.textContent)"
    )
    return contents


def test_a_conversation(server: Any, browser: Browser) -> None:
    browser.open(server.url)
    browser.until("get('model').textContent === 'small'")
    ask(browser, "the fox <b>&amp;</b>")
    browser.until("document.body.dataset.state")
    ask(browser, "你好")
    browser.until("document.body.dataset.state")
    assert texts(browser, "user") == ["the fox <b>&amp;</b>", "你好"]
    assert texts(browser, "error") == []
    replies = texts(browser, "assistant")
    assert len(replies) == 2
    assert all(replies)
    assert browser.run("messages.map(m => m.role)") == ["user", "assistant"] * 2
    assert browser.run("messages.map(m => m.content)")[1::2] == replies


def test_an_adapter_is_chosen(
    serving: Any, chat_model: Any, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = AdapterConfig(rank=1, targets="attention.out")
    loras = LoRAs(chat_model.model)
    loras.add("fox", how, adapter_state(attach(copy.deepcopy(chat_model.model), how)))
    with serving(loras=loras) as served:
        submit, asked = served.engine.submit, []
        monkeypatch.setattr(
            served.engine, "submit", lambda p, *more: (asked.append(p.adapter), submit(p, *more))[1]
        )
        browser.open(served.url)
        browser.until("get('model').options.length === 2")
        for name in ("small", "fox"):
            browser.run(f"get('model').value = '{name}'")
            ask(browser, "the dog")
            browser.until("document.body.dataset.state")
    assert asked == ["", "fox"]


def test_a_question_in_the_address(server: Any, browser: Browser) -> None:
    browser.open(f"{server.url}/?q=the+fox")
    browser.until("document.body.dataset.state === 'answered'")
    assert texts(browser, "user") == ["the fox"]


def test_errors_and_the_key(serving: Any, browser: Browser) -> None:
    with serving(token="secret", max_tokens=20) as served:
        browser.open(served.url)
        ask(browser, "hello")
        browser.until("document.body.dataset.state")
        assert texts(browser, "error") == ["authorization: wrong or missing; send the API key"]
        browser.run("get('key').value = 'secret'")
        ask(browser, "hello")
        browser.until("document.body.dataset.state === 'answered'")
        browser.open("about:blank")


def test_one_question_at_a_time(server: Any, browser: Browser) -> None:
    """Enter while a reply streams sends nothing; the text stays where it is typed."""
    browser.open(server.url)
    browser.until("get('model').textContent === 'small'")
    enter = "get('question').dispatchEvent(new KeyboardEvent('keydown', { key: 'Enter' }))"
    browser.run(f"get('question').value = 'a'; {enter}; get('question').value = 'b'; {enter}; 0")
    browser.until("document.body.dataset.state === 'answered'")
    assert texts(browser, "user") == ["a"]
    assert browser.run("get('question').value") == "b"
    assert browser.run("messages.map(m => m.role)") == ["user", "assistant"]
    browser.run(f"delete document.body.dataset.state; {enter}; 0")
    browser.until("document.body.dataset.state === 'answered'")
    assert texts(browser, "user") == ["a", "b"]


def test_a_server_that_ends(serving: Any, browser: Browser) -> None:
    """The error says what happened, no empty reply is left, and the question can be sent again."""
    with serving() as served:
        browser.open(served.url)
        browser.until("get('model').textContent === 'small'")
        served.engine.stop()
        ask(browser, "a")
        browser.until("document.body.dataset.state === 'failed'")
    ask(browser, "b")
    browser.until("document.body.dataset.state === 'failed'")
    stopping, gone = texts(browser, "error")
    assert stopping == "the server is shutting down; ask again when it is back"
    assert gone == "the server does not answer; see that it runs, then send again"
    assert texts(browser, "assistant") == []
    assert browser.run("messages") == []
    assert browser.run("get('question').value") == "b"
    browser.open("about:blank")


def test_a_stopped_reply_is_kept(serving: Any, browser: Browser) -> None:
    with serving(max_tokens=480) as served:
        step = served.engine._decoder.step
        served.engine._decoder.step = lambda: (time.sleep(0.02), step())[1]
        browser.open(served.url)
        browser.until("get('model').textContent === 'small'")
        ask(browser, "a")
        browser.until("document.querySelector('.assistant').textContent")
        browser.run("get('stop').click()")
        browser.until("document.body.dataset.state === 'stopped'")
        assert browser.run("messages.map(m => m.content)") == ["a", *texts(browser, "assistant")]
        assert browser.run("get('send').disabled") is False
        browser.open("about:blank")
