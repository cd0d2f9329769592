"""Where a server of this machine listens, and which names a web page may know it by."""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

from ..engines.errors import UserError

BACKLOG = 2048  # as uvicorn has it


def hostname(host: str) -> str | None:
    """Of a Host header, without its port; None for what is none."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def is_loopback_name(host: str) -> bool:
    """Whether a Host header names the loopback: as localhost, or by an address, which no web page can make its own.

    >>> from dit_trt.runtime.hosts import is_loopback_name
    >>> [is_loopback_name(host) for host in ("localhost:8000", "127.0.0.2:8000", "[::1]", "127.0.0.1.evil.example")]
    [True, True, True, False]
    """
    name = hostname(host) or ""
    return name == "localhost" or _is_loopback_address(name)


def is_foreign(origin: str, host: str) -> bool:
    """Whether a page of this Origin is none of the server that the request names as its Host.

    >>> from dit_trt.runtime.hosts import is_foreign
    >>> is_foreign("http://localhost:7860", "localhost:7860"), is_foreign("null", "localhost:7860")
    (False, True)
    """
    return origin.partition("://")[2].lower() != host.lower()


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there (port 0: any free one); who connects waits for `serve`. Raises UserError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise UserError(f"--host {host} is no address of this machine; give 127.0.0.1, or 0.0.0.0 for all") from None
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(BACKLOG)  # or another server could bind it, too
    except OSError as error:
        bound.close()
        reason = (error.strerror or str(error)).lower()
        raise UserError(
            f"cannot listen on {_authority(host, port)}: {reason}; choose another --port (0: any free one) or --host"
        ) from None
    return bound


def url(bound: socket.socket) -> str:
    return f"http://{_authority(*bound.getsockname()[:2])}"


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(bound: socket.socket) -> bool:
    """Whether only this machine can reach it."""
    return _is_loopback_address(bound.getsockname()[0].partition("%")[0])


def _is_loopback_address(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).is_loopback
    except ValueError:
        return False
