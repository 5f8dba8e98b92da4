"""The server's Prometheus metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self.requests = Counter(
            "glm_core_requests", "requests by path and status", ["path", "status"], registry=r
        )
        self.tokens = Counter("glm_core_tokens", "tokens generated", registry=r)
        self.prompt_tokens = Counter("glm_core_prompt_tokens", "tokens of prompts", registry=r)
        self.reused_tokens = Counter(
            "glm_core_reused_tokens", "tokens of prompts that were in the cache", registry=r
        )
        self.running = Gauge("glm_core_running", "requests that run in a slot", registry=r)
        self.waiting = Gauge("glm_core_waiting", "requests that wait for a slot", registry=r)
        self.first_token_seconds = Histogram(
            "glm_core_first_token_seconds",
            "time from arrival to the first token",
            buckets=BUCKETS_S,
            registry=r,
        )
        self.step_seconds = Histogram(
            "glm_core_step_seconds",
            "duration of a decoding step, which makes one token for each running request",
            buckets=BUCKETS_S,
            registry=r,
        )

    def text(self) -> bytes:
        """Returns the metrics in Prometheus' text format."""
        return generate_latest(self.registry)
