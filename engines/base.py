"""What every backend offers: an `Engine` runs one graph; `BACKENDS` says which module opens one."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from numpy.typing import NDArray

from .errors import UserError


class Engine(Protocol):
    """One graph with fixed shapes. `run` takes and returns numpy arrays by name; inputs stay bound between runs.

    An input of another shape, or one never given, is a ValueError.
    """

    inputs: dict[str, tuple[int, ...]]
    outputs: list[str]

    def run(self, inputs: Mapping[str, NDArray]) -> dict[str, NDArray]: ...

    def int8_matmuls(self) -> set[str]:
        """The graph's MatMul nodes that really run as int8 x int8, by node name, from the runtime's own account."""
        ...


# backend -> (module, class, the package it needs)
BACKENDS = {"openvino": ("openvino", "OpenVINOEngine", "openvino")}


def choose_backend(name: str) -> str:
    """`auto` becomes a backend that can run here. Raises UserError for an unknown or uninstalled one."""
    if name == "auto":
        name = next((b for b, (_, _, package) in BACKENDS.items() if find_spec(package)), "")
        if not name:
            raise UserError("no backend is installed: pip install openvino")
    if name not in BACKENDS:
        raise UserError(f"unknown backend {name!r} (one of: auto, {', '.join(BACKENDS)})")
    package = BACKENDS[name][2]
    if not find_spec(package):
        raise UserError(f"the backend {name} needs the package {package}: pip install {package}")
    return name


def open_engine(
    backend: str,
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    device: str | None = None,
    cache: Path | None = None,
) -> Engine:
    """Compile the ONNX file at `path` for fixed input `shapes`; `cache` is a folder for the backend's own blobs."""
    module, engine, _ = BACKENDS[backend]
    options = {} if device is None else {"device": device}
    kind = getattr(import_module(f".{module}", __package__), engine)
    try:
        return kind(path, shapes, cache=cache, **options)
    except RuntimeError as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or ["no reason given"]
        raise UserError(f"{backend} cannot compile {path.name}: {lines[-1].strip()}") from error
