"""The server around the application: its socket, its token, and an end that loses nothing that was accepted."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from .app import create_app
from .fields import Limits
from .metrics import Metrics
from .worker import Worker


class _Server(uvicorn.Server):
    """The first signal: nothing new is taken (503), what was accepted is finished, within `grace` seconds, then the
    server ends. The second: now, between two steps.
    """

    def __init__(self, config: uvicorn.Config, worker: Worker, grace: float, ready: Callable[[], object]):
        super().__init__(config)
        self._worker, self._grace, self._ready = worker, grace, ready
        self._until: float | None = None
        self.finished = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Runs between any two instructions of the main thread: it takes no lock."""
        now = time.monotonic()
        self._until = now if self._until is not None else now + self._grace
        self._worker.draining = True

    async def on_tick(self, counter: int) -> bool:
        if self._until is not None:
            self.finished = self._worker.waiting.idle
            if self.finished or time.monotonic() >= self._until:
                self._worker.stop()
                return True
        return await super().on_tick(counter)


def serve(
    worker: Worker,
    limits: Limits,
    metrics: Metrics,
    bound: socket.socket,
    token: str | None,
    grace: float,
    log: Callable[[str], object],
    ready: Callable[[], object],
) -> bool:
    """Answer requests until SIGTERM or Ctrl-C -> whether all that was accepted was finished.

    ready is called when the first can come.
    """
    app = create_app(worker, limits, metrics, token, log)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        http="h11",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=5,
    )
    with worker:
        server = _Server(config, worker, grace, ready)
        server.run(sockets=[bound])
    return server.finished
