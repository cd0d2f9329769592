"""What Prometheus may know: requests by status, who waits, how long generating takes and how many go together."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

SECONDS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class Metrics:
    """A registry of its own, so that a process can hold several."""

    content_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "dit_trt_requests", "Answered requests; 499: the client went away.", ["path", "status"], registry=registry
        )
        self._queue = Gauge("dit_trt_queue_length", "Requests that wait.", registry=registry)
        self._running = Gauge("dit_trt_running", "Clips being generated.", registry=registry)
        self._seconds = Histogram(
            "dit_trt_generation_seconds", "Of one batch, encoding included.", registry=registry, buckets=SECONDS
        )
        self._batches = Histogram(
            "dit_trt_batch_size", "Clips generated at once.", registry=registry, buckets=(1, 2, 4, 8, 16, 32, 64)
        )
        ProcessCollector(registry=registry)

    def watch(self, waiting: Callable[[], float], running: Callable[[], float]) -> None:
        """Ask these whenever somebody wants the numbers."""
        self._queue.set_function(waiting)
        self._running.set_function(running)

    def batch(self, clips: int, seconds: float) -> None:
        self._batches.observe(clips)
        self._seconds.observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self._registry)
