"""Derives figures from each step of a run, for TensorBoard and a Prometheus endpoint. The names are
documented in docs/metrics.md."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

from glm_core.backends.base import Backend
from glm_core.errors import ConfigError
from glm_core.measure.memory import resident_peak_bytes

GAUGES = {
    "step": "optimizer steps done",
    "loss": "of the last step's global batch",
    "grad_norm": "global gradient norm before clipping",
    "learning_rate": "of the last step",
    "loss_scale": "dynamic loss scale, 1 unless float16",
    "step_seconds": "of the last step",
    "tokens_per_second": "of the last step",
    "mfu_ratio": "model FLOPs of the step over what the peak allows in its time",
    "memory_peak_bytes": "device memory allocated at most, of all ranks; on a CPU resident set",
    "last_step_timestamp_seconds": "when the last step ended, Unix time",
}
COUNTERS = {"tokens": "tokens trained on by this call", "skipped_steps": "updates left out"}
EXPERTS = {"expert_load_ratio": "largest load of an expert in the last step, over the mean"}
"""gauges of a model with experts"""
RANKS = {
    "slowest_rank": "of the last timed step, by own time: without waiting for others",
    "slowest_rank_ratio": "its own time over the median of the others'",
    "rank_variation_ratio": "standard deviation of the ranks' own times over their mean",
}
"""gauges of a run on many processes"""
PREFIX = "glm_core_train_"
_METRIC_KEYS = {"learning_rate": "lr"}
"""gauge name -> the key in the step's metrics, where they differ"""


class Live:
    """Keeps the figures of the last step."""

    def __init__(
        self,
        backend: Backend,
        flops_per_sequence: float,
        peak_tflops: float,
        port: int = 0,
        host: str = "127.0.0.1",
    ) -> None:
        """flops_per_sequence: of the model in forward and backward, without recompute. port: 0 for
        no endpoint. Raises ConfigError where the port is not free."""
        self.memory: Callable[[], int] = functools.partial(memory_peak_bytes, backend)
        self._flops, self._peak = flops_per_sequence, peak_tflops * 1e12
        self._endpoint = Endpoint(port, host) if port else None

    def update(self, values: dict[str, Any]) -> dict[str, float]:
        """Returns the figures derived from a step's values, which are as in metrics.jsonl."""
        seconds = values["step_ms"] / 1e3
        derived = {
            "tokens_per_second": values["tokens"] / seconds,
            "mfu_ratio": self._flops * values["global_batch"] / (seconds * self._peak),
            "memory_peak_bytes": float(self.memory()),
        }
        if self._endpoint is not None:
            self._endpoint.set({**values, "step_seconds": seconds, **derived})
            self._endpoint.some({n: values[n] for n in EXPERTS if n in values})
        return derived

    def ranks(self, values: dict[str, float]) -> None:
        """Serves the comparison of the ranks in a timed step, by the names of `RANKS`."""
        if self._endpoint is not None:
            self._endpoint.some(values)

    def close(self) -> None:
        """Frees the port."""
        if self._endpoint is not None:
            self._endpoint.close()


def memory_peak_bytes(backend: Backend) -> int:
    """Returns the peak the device counts, on a CPU the process's resident set."""
    if backend.device_type != "cpu":
        return backend.memory_peak_bytes()
    return resident_peak_bytes()


class Endpoint:
    """Serves `http://HOST:PORT/metrics` in Prometheus' exposition format."""

    def __init__(self, port: int, host: str) -> None:
        try:
            import prometheus_client as prometheus
        except ImportError as error:
            raise ConfigError(
                f"--metrics-port: {error}; pip install prometheus-client, or leave it out"
            ) from None
        registry = prometheus.CollectorRegistry()
        self._gauge = functools.partial(prometheus.Gauge, registry=registry)
        self._some: dict[str, Any] = {}
        self._gauges = {name: self._gauge(PREFIX + name, text) for name, text in GAUGES.items()}
        self._counters = {
            name: prometheus.Counter(PREFIX + name, text, registry=registry)
            for name, text in COUNTERS.items()
        }
        try:
            self._server, self._thread = prometheus.start_http_server(port, host, registry)
        except OSError as error:
            raise ConfigError(
                f"--metrics-port {port}: {error.strerror} on {host}; choose another port"
            ) from None

    def set(self, values: dict[str, Any]) -> None:
        """Takes the values of one step."""
        stamped = {**values, "last_step_timestamp_seconds": time.time()}
        for name, gauge in self._gauges.items():
            gauge.set(stamped[_METRIC_KEYS.get(name, name)])
        self._counters["tokens"].inc(values["tokens"])
        self._counters["skipped_steps"].inc(values["skipped"])

    def some(self, values: dict[str, float]) -> None:
        """Takes gauges that only some runs have; each is served from its first value on."""
        for name, value in values.items():
            if name not in self._some:
                self._some[name] = self._gauge(PREFIX + name, (EXPERTS | RANKS)[name])
            self._some[name].set(value)

    def close(self) -> None:
        """Stops the server."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
