"""The web application: a request becomes a job, its sound the answer. Nothing here asks another host for anything."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from ...engines.errors import UserError
from ..pipeline import Pipeline
from ..samplers import SAMPLERS_OF
from ..settings import check_clips
from .fields import FORMATS, Limits, faults, request_model
from .gate import GENERATIONS, GONE, NOTE, Gate, too_large
from .jobs import Closed, Full, Job, Sound
from .metrics import Metrics
from .page import page
from .problems import Problem, documented
from .worker import EngineFailed, Worker

DRAINING = "the service is stopping; send the request to another one, or later"
HEADERS = {
    "X-Model": ("string", "The bundle, percent-encoded."),
    "X-Seed": ("integer", "Of the clip."),
    "X-Steps": ("integer", "Sampling steps."),
    "X-Batch": ("integer", "Clips that were computed at once."),
}
AUDIO = {
    "description": "The sound.",
    "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in FORMATS.values()},
    "headers": {name: {"description": text, "schema": {"type": kind}} for name, (kind, text) in HEADERS.items()},
}


def create_app(
    worker: Worker,
    limits: Limits,
    metrics: Metrics,
    token: str | None = None,
    log: Callable[[str], object] = lambda line: None,
) -> FastAPI:
    """The application of a worker, which must be running. /openapi.json describes it, and /docs as a page."""
    app = FastAPI(title="dit-trt", version="1", docs_url=None, redoc_url=None, description="Prompts become sound.")
    app.add_middleware(Gate, token=token, metrics=metrics, log=log)
    names = [*worker.pipelines]
    body = request_model(names, [*worker.pipelines.values()], limits)
    always = (401,) if token is not None else ()
    metrics.watch(lambda: len(worker.waiting), lambda: worker.running)

    async def generate(request: Request, asked: BaseModel) -> Response:
        """Make one clip. The answer comes when it is finished; who goes away before frees the place."""
        job = _job(worker, limits, asked, names[0])
        what = f"seed={job.settings.seed} steps={job.settings.steps} seconds={job.seconds:.3g}"
        request.scope[NOTE] = f" {quote(job.model)} {what}"
        sound = await _sound(worker, job, request)
        if sound is None:
            return Response(status_code=GONE)
        request.scope[NOTE] += f" batch={sound.batch}"
        headers = dict(zip(HEADERS, (quote(job.model), job.settings.seed, job.settings.steps, sound.batch)))
        return Response(sound.content, 200, {name: str(it) for name, it in headers.items()}, FORMATS[job.format])

    generate.__annotations__["asked"] = body  # known here alone: its limits are those of these bundles
    app.post(
        GENERATIONS,
        response_class=Response,
        responses={200: AUDIO, **documented(400, *always, 413, 415, 422, 429, 500, 503)},
    )(generate)

    @app.get("/v1/models", responses=documented(400, *always))
    async def models() -> dict[str, Any]:
        """The bundles, the default first."""
        return {"object": "list", "data": [_model(name, p, limits) for name, p in worker.pipelines.items()]}

    @app.get("/healthz", responses=documented(400, 503))
    async def healthz() -> dict[str, str]:
        """200 while requests are taken."""
        if worker.draining or not worker.alive:
            raise Problem(503, DRAINING if worker.draining else "the generating thread has ended; restart the service")
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response, responses={200: _TEXT, **documented(400, *always)})
    async def numbers() -> Response:
        """Numbers for Prometheus."""
        return Response(metrics.text(), media_type=metrics.content_type)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(page(app.openapi()))

    @app.exception_handler(Problem)
    async def problem(request: Request, error: Problem) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        found = faults(body, error.errors())
        return Problem(422, "; ".join(found.values()), [*found]).response()

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        if error.status_code == 413:
            return too_large().response()
        return Problem(error.status_code, str(error.detail), headers=error.headers).response()

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return Problem(500, "a defect of the service; its log has the traceback").response()

    if token is not None:
        _document_token(app)
    return app


_TEXT = {"description": "Prometheus' text format.", "content": {"text/plain": {"schema": {"type": "string"}}}}


def _job(worker: Worker, limits: Limits, asked: Any, default: str) -> Job:
    """Raises Problem 422 for what the schema alone does not tell: this model's own limits."""
    name = asked.model or default
    pipeline = worker.pipelines[name]
    given = {"steps": asked.steps, "cfg_scale": asked.cfg, "sampler": asked.sampler, "seed": asked.seed}
    try:
        settings = limits.settings(pipeline, **{key: value for key, value in given.items() if value is not None})
        seconds = limits.length(pipeline, asked.seconds)
        check_clips([asked.prompt], settings, negative_prompt=asked.negative_prompt)
    except UserError as error:
        named = [field for field in type(asked).model_fields if field in str(error).split()]
        raise Problem(422, str(error), named) from None
    return Job(name, asked.prompt, settings, seconds, asked.negative_prompt, asked.format)


async def _sound(worker: Worker, job: Job, request: Request) -> Sound | None:
    """Wait for a job; None when the client has gone, which cancels it. Raises Problem."""
    try:
        worker.submit(job)
    except Full:
        wait = worker.retry_after()
        told = f"{worker.waiting.places} requests wait already; try again in {wait} s"
        raise Problem(429, told, headers={"Retry-After": str(wait)}) from None
    except Closed:
        raise Problem(503, DRAINING) from None
    made, left = asyncio.wrap_future(job.result), asyncio.ensure_future(_left(request))
    try:
        waiting: set[asyncio.Future[Any]] = {made, left}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        return made.result() if made.done() else None
    except EngineFailed as error:
        raise Problem(500, str(error)) from None
    except Closed:
        raise Problem(503, DRAINING) from None
    finally:
        left.cancel()
        made.cancel()  # or asyncio would complain of an error that nobody takes
        if not job.result.done():
            worker.cancel(job)


async def _left(request: Request) -> None:
    """Until the client closes its connection. The body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _model(name: str, pipeline: Pipeline, limits: Limits) -> dict[str, Any]:
    manifest, default = pipeline.bundle.manifest, limits.settings(pipeline)
    return {
        "id": name,
        "object": "model",
        "model": manifest["model"]["name"],
        "method": manifest["recipe"]["method"],
        "bits": manifest["recipe"]["bits"],
        "backend": pipeline.bundle.backend,
        "sample_rate": pipeline.sample_rate,
        "max_seconds": limits.longest(pipeline),
        "max_steps": limits.steps,
        "samplers": [*SAMPLERS_OF[pipeline.objective]],
        "defaults": {
            "seconds": limits.length(pipeline, None),
            "seed": 1000,
            "steps": default.steps,
            "cfg": default.cfg_scale,
            "sampler": default.sampler,
        },
    }


def _document_token(app: FastAPI) -> None:
    """Say in OpenAPI which paths want it."""
    schema = app.openapi()
    schema.setdefault("components", {})["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            if path != "/healthz":
                operation["security"] = [{"bearer": []}]
