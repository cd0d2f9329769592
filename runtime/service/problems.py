"""Everything that is refused or fails, as one form: a JSON problem (RFC 9457) whose detail is one line with the fix."""

from __future__ import annotations

import http
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse

MEDIA_TYPE = "application/problem+json"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"const": "about:blank"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "One line: what is wrong, and the limit or the fix."},
        "fields": {"type": "array", "items": {"type": "string"}, "description": "Which fields are wrong."},
    },
    "additionalProperties": False,
}
WHEN = {
    400: "The body is no JSON, or the Host is not this machine.",
    401: "The token is missing or wrong.",
    413: "The body is too large.",
    415: "The body's content type is not application/json.",
    422: "A field is missing, unknown, of the wrong type or outside its limits; the detail names it.",
    429: "The waiting list is full.",
    500: "The engine failed; the next request has a fresh try.",
    503: "The service stops, or cannot generate.",
}


class Problem(Exception):
    """Raised anywhere in a request, it becomes the answer."""

    def __init__(
        self, status: int, detail: str, fields: Sequence[str] = (), headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.status, self.detail, self.fields, self.headers = status, detail, fields, headers

    def response(self) -> JSONResponse:
        content: dict[str, Any] = {"type": "about:blank", "title": title(self.status), "status": self.status}
        content["detail"] = self.detail
        if self.fields:
            content["fields"] = [*self.fields]
        return JSONResponse(content, self.status, dict(self.headers or {}), MEDIA_TYPE)


def title(status: int) -> str:
    return http.HTTPStatus(status).phrase


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """These problems as OpenAPI has them."""
    return {status: {"description": WHEN[status], "content": {MEDIA_TYPE: {"schema": SCHEMA}}} for status in statuses}
