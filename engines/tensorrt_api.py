"""TensorRT's Python module, whichever there is: `tensorrt`, else `tensorrt_rtx`, which has the same interface."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

INSTALL = "pip install tensorrt (or tensorrt-rtx-cu13, whose engines are for GeForce RTX and later)"
_MODULES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}


@cache
def found() -> tuple[ModuleType | None, str]:
    """The module and its product's name; None and why, when neither can be imported."""
    reasons = []
    for name in _MODULES:
        try:
            return import_module(name), _MODULES[name]
        except ImportError as error:  # not there, or a wheel whose libraries are not
            reasons.append(str(error).splitlines()[0])
    return None, "; ".join(reasons)


def api() -> Any:
    """The module. Raises RuntimeError when there is none."""
    module, why = found()
    if module is None:
        raise RuntimeError(f"{why}: {INSTALL}")
    return module


def is_rtx() -> bool:
    """Whether it is TensorRT-RTX, which builds portable engines without a GPU."""
    return found()[1] == "TensorRT-RTX"


def version() -> str:
    """Product and version, as `TensorRT-RTX 1.7.1.116`."""
    return f"{found()[1]} {api().__version__}"


@cache
def log() -> Any:
    """The one logger of this process: TensorRT keeps the first it is given. Its `errors` are what was complained of."""
    trt = api()

    class Log(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message)

        def take(self) -> str:
            """What went wrong since it was last asked: the first complaint, which names the cause."""
            first = self.errors[0] if self.errors else "no reason given"
            self.errors.clear()
            return " ".join(first.split())

    return Log()
