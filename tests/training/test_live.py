"""The figures of a run while it runs: read back from the endpoint and from TensorBoard."""

from __future__ import annotations

import socket
import sys
import urllib.request
from pathlib import Path

import pytest
import toy

from glm_core import cli
from glm_core.backends import registry
from glm_core.errors import ConfigError
from glm_core.training import live
from glm_core.training.run import run

STEP = {
    "step": 3,
    "loss": 2.5,
    "grad_norm": 0.5,
    "lr": 1e-3,
    "tokens": 400,
    "global_batch": 4,
    "loss_scale": 1.0,
    "skipped": True,
    "step_ms": 500.0,
}


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def scraped(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        text = response.read().decode()
    pairs = (line.split() for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in pairs if not name.endswith("_created")}


def test_every_documented_name_is_served_and_no_other(port: int) -> None:
    pytest.importorskip("prometheus_client", reason="prometheus-client is not installed")
    # 2 TFLOPS over half a second allow 1e12; four sequences of 1e11 are 0.4 of it
    figures = live.Live(registry.get("reference"), 1e11, 2.0, port)
    for _ in range(2):
        figures.update(STEP)
    seen = scraped(port)
    figures.close()
    names = {f"{live.PREFIX}{n}" for n in live.GAUGES}
    assert set(seen) == names | {f"{live.PREFIX}{n}_total" for n in live.COUNTERS}
    found = {k.removeprefix(live.PREFIX): v for k, v in seen.items()}
    assert found["mfu_ratio"] == pytest.approx(0.4)
    assert found["tokens_per_second"] == 800
    assert (found["tokens_total"], found["skipped_steps_total"]) == (800, 2)
    assert (found["step"], found["loss"], found["learning_rate"]) == (3, 2.5, 1e-3)
    assert found["memory_peak_bytes"] > 1e7
    documented = (Path(__file__).parents[2] / "docs/metrics.md").read_text()
    ranks = [f"{live.PREFIX}{n}" for n in live.RANKS]
    assert [n for n in (*seen, *ranks) if f"`{n}`" not in documented] == []


def test_port_in_use_and_missing_package(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("prometheus_client", reason="prometheus-client is not installed")
    with socket.create_server(("127.0.0.1", port)), pytest.raises(ConfigError) as caught:
        live.Endpoint(port, "127.0.0.1")
    assert str(caught.value) == (
        f"--metrics-port {port}: Address already in use on 127.0.0.1; choose another port"
    )
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigError, match="pip install prometheus-client, or leave it out"):
        live.Endpoint(port, "127.0.0.1")


def test_tensorboard_shows_them_and_the_metrics_file_stays_as_it_was(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    figures = live.Live(registry.get("reference"), 1e6, 1.0)
    run(toy.config(steps=2), tmp_path, sampler=toy.Sampler(), tensorboard=True, live=figures)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    wanted = {"loss", "grad_norm", "loss_scale", "mfu_ratio", "tokens_per_second"}
    assert wanted | {"memory_peak_bytes"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("mfu_ratio")] == [1, 2]
    assert "mfu_ratio" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_port_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--backend", "reference", "--out", str(tmp_path / "run")]
    assert cli.main([*words, "--metrics-port", "70000"]) == 2
    assert "--metrics-port 70000: must lie in 1 ... 65535" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
