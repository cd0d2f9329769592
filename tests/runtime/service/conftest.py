"""The service around the tiny bundle, in this process; its generating can be held between two steps.

Its client is starlette's, which is made of httpx2.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from dit_trt.engines.bundle import Bundle
from dit_trt.runtime.pipeline import Clip, Pipeline
from dit_trt.runtime.service.app import create_app
from dit_trt.runtime.service.fields import Limits
from dit_trt.runtime.service.metrics import Metrics
from dit_trt.runtime.service.worker import Worker

GENERATIONS = "/v1/audio/generations"


class Held(Pipeline):
    """A pipeline that, while `go` is not set, stops after the first step of a single clip, or of a batch.

    fail: what generating raises for a batch of so many clips.
    """

    def __init__(self, bundle: Bundle):
        super().__init__(bundle)
        self.go, self.go_together, self.begun = (threading.Event() for _ in range(3))
        self.batches: list[list[str]] = []
        self.fail: dict[int, Exception] = {}
        self.steps = 0
        self.go.set()
        self.go_together.set()

    def generate(self, prompts: Any, *args: Any, on_step: Any, **more: Any) -> Iterator[Clip]:
        self.batches.append(list(prompts))
        if (error := self.fail.get(len(prompts))) is not None:
            raise error

        def held(clip: int, step: int) -> None:
            if clip == 0 and step >= 0:
                self.steps += 1
                self.begun.set()
                assert (self.go if len(prompts) == 1 else self.go_together).wait(30)
            on_step(clip, step)

        return super().generate(prompts, *args, on_step=held, **more)


@dataclass
class Service:
    app: FastAPI
    worker: Worker
    pipeline: Held
    client: TestClient
    log: list[str] = field(default_factory=list)

    def post(self, **body: Any) -> Any:
        return self.client.post(GENERATIONS, json={"prompt": "dog barking", "steps": 2, **body})


@pytest.fixture
def serve(tiny_sqs: Bundle) -> Iterator[Callable[..., Service]]:
    """Make a service: serve(places=16, max_batch=4, steps=200, seconds=10, token=None)."""
    with ExitStack() as stack:

        def start(
            places: int = 16, max_batch: int = 4, steps: int = 200, seconds: float = 10, token: str | None = None
        ) -> Service:
            pipeline, metrics, log = Held(tiny_sqs), Metrics(), []
            worker = Worker({"tiny": pipeline}, places, max_batch, metrics.batch, log.append)
            stack.enter_context(worker)
            app = create_app(worker, Limits(steps, seconds), metrics, token, log.append)
            client = TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False)
            service = Service(app, worker, pipeline, stack.enter_context(client), log)
            stack.callback(pipeline.go_together.set)
            stack.callback(pipeline.go.set)
            return service

        yield start
