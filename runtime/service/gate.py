"""What every request passes before anything reads it: Host, token, size, content type; and its one line of log."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable
from datetime import datetime
from urllib.parse import quote

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..hosts import is_loopback_name
from .fields import MAX_BODY
from .metrics import Metrics
from .problems import Problem

OPEN = "/healthz"  # the path that needs no token
GENERATIONS = "/v1/audio/generations"
PATHS = (GENERATIONS, "/v1/models", "/metrics", "/openapi.json", "/docs", OPEN)
GONE = 499  # the status in log and metrics of a request whose client did not wait
NOTE = "dit_trt.note"  # the key of the scope under which a request leaves words for its line of log


class Gate:
    """ASGI middleware. token: what requests must bear; without one only a loopback Host is answered.

    (A page in the user's browser reaches a port of this machine by a name of its own, but not by these, and sends JSON
    elsewhere only after it has asked.)
    """

    def __init__(
        self, app: ASGIApp, token: str | None, metrics: Metrics, log: Callable[[str], object] = lambda line: None
    ):
        self.app, self.metrics, self.log = app, metrics, log
        self._token = None if token is None else _digest(token.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status = time.perf_counter(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if (problem := self._refused(scope)) is not None:
                await problem.response()(scope, receive, watched)
            else:
                await self.app(scope, _limited(receive), watched)
        finally:
            path = scope["path"]
            self.metrics.requests.labels(path if path in PATHS else "other", status).inc()
            client = (scope.get("client") or ("-",))[0]
            now = datetime.now().isoformat(" ", "seconds")
            line = f"{now} {client} {scope['method']} {quote(path)[:100]} {status} {time.perf_counter() - begun:.3f} s"
            self.log(line + scope.get(NOTE, ""))

    def _refused(self, scope: Scope) -> Problem | None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self._token is None:
            host = headers.get(b"host", b"").decode("latin-1")
            if not is_loopback_name(host):
                return Problem(400, "without a token only 127.0.0.1 and localhost are served; start with --token-file")
        elif scope["path"] != OPEN:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            right = hmac.compare_digest(_digest(given.strip()), self._token)
            if scheme.lower() != b"bearer" or not right:
                told = "send the header `Authorization: Bearer TOKEN` with this server's token"
                return Problem(401, told, headers={"WWW-Authenticate": "Bearer"})
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > MAX_BODY:
            return too_large()
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if (scope["method"], scope["path"]) == ("POST", GENERATIONS) and kind != b"application/json":
            return Problem(415, "send the body as JSON, with the header `Content-Type: application/json`")
        return None


def too_large() -> Problem:
    return Problem(413, f"the body is larger than {MAX_BODY} bytes")


def _limited(receive: Receive) -> Receive:
    """A body that does not tell its length is cut off where it grows too large."""
    size = 0

    async def limited() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > MAX_BODY:
            raise HTTPException(413)  # what FastAPI lets through while it reads a body
        return message

    return limited


def _digest(token: bytes) -> bytes:
    """Equally long for every token, so that comparing tells nothing of its length."""
    return hashlib.sha256(token).digest()
