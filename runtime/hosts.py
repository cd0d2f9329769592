"""Which names a web page may know this machine by: a header's host, taken apart."""

from __future__ import annotations

from urllib.parse import urlsplit

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def hostname(host: str) -> str | None:
    """Of a Host header, without its port; None for what is none."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def is_foreign(origin: str, host: str) -> bool:
    """Whether a page of this Origin is none of the server that the request names as its Host.

    >>> from dit_trt.runtime.hosts import is_foreign
    >>> is_foreign("http://localhost:7860", "localhost:7860"), is_foreign("null", "localhost:7860")
    (False, True)
    """
    return origin.partition("://")[2].lower() != host.lower()
