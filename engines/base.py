"""What every backend offers: an `Engine` runs one graph; `BACKENDS` says which module opens one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Literal, Protocol

from numpy.typing import NDArray

from .blobs import LIMIT, blob_folder
from .cpu import lacks_vnni
from .errors import UserError, last_line


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


@dataclass(frozen=True)
class Dialect:
    """How a backend wants its Q/DQ graphs.

    activation: the integer type of quantized activations. `uint8` is int8 plus 128, with zero point 128: the same
    values and the same sums, in the form for which ONNX Runtime's CPU kernels use VNNI.
    branch: what the low-rank branch, stored in 16 bits, is multiplied in. OpenVINO turns bfloat16 into float32 itself
    on a CPU without it; ONNX Runtime has no such product on a CPU.
    """

    activation: Literal["int8", "uint8"] = "int8"
    branch: Literal["float32", "bfloat16"] = "float32"


INT8 = Dialect()


@dataclass(frozen=True)
class Backend:
    """A module of this folder with `engine`, a class, and `unusable`, `runtime_version` and `check_device`.

    package: what must be importable. install: how a user gets it. keeps_blobs: compiling is slow enough to be cached.
    wants_vnni: on a CPU without it, see `saturates`.
    """

    module: str
    engine: str
    package: str
    install: str
    dialect: Dialect = INT8
    keeps_blobs: bool = False
    wants_vnni: bool = False

    def load(self) -> ModuleType:
        return import_module(f".{self.module}", __package__)

    def unusable(self) -> str | None:
        """Why nothing can run with it here, and the fix; None when it can."""
        if not find_spec(self.package):
            return f"the package {self.package} is not installed: {self.install}"
        return self.load().unusable()

    def saturates(self, device: str | None = None) -> bool:
        """Whether, on this CPU, it adds int8 products in 16 bits and multiplies weights that stay in 4 bits in float.

        device: of the backend (default: its CPU).
        """
        return self.wants_vnni and lacks_vnni() and (device or "CPU").upper().startswith("CPU")


# In the order of `auto`.
BACKENDS = {
    "openvino": Backend(
        "openvino",
        "OpenVINOEngine",
        "openvino",
        "pip install openvino",
        Dialect(branch="bfloat16"),
        keeps_blobs=True,
        wants_vnni=True,
    ),
    "onnxruntime": Backend(
        "onnxruntime",
        "ONNXRuntimeEngine",
        "onnxruntime",
        "pip install onnxruntime (or onnxruntime-gpu for CUDA, never both)",
        Dialect("uint8"),
    ),
}


def choose_backend(name: str, device: str | None = None) -> str:
    """`auto` becomes the first backend that can run here. Raises UserError for an unknown or unusable one.

    device: of the backend; raises UserError when it has none of that name.
    """
    name = _first_usable() if name == "auto" else _usable(name)
    if device is not None:
        BACKENDS[name].load().check_device(device)
    return name


def _first_usable() -> str:
    reasons = {}
    for name, backend in BACKENDS.items():
        reason = backend.unusable()
        if reason is None:
            return name
        reasons[name] = reason
    raise UserError("no backend can run here; " + "; ".join(f"{name}: {why}" for name, why in reasons.items()))


def _usable(name: str) -> str:
    if name not in BACKENDS:
        raise UserError(f"unknown backend {name!r} (one of: auto, {', '.join(BACKENDS)})")
    if (reason := BACKENDS[name].unusable()) is not None:
        raise UserError(f"the backend {name} cannot run here: {reason}")
    return name


def explain_auto(chosen: str) -> str:
    """One line on why `auto` became `chosen`: those before it in `BACKENDS` cannot run here."""
    passed_over = list(BACKENDS)[: list(BACKENDS).index(chosen)]
    reasons = [f"{name} cannot run here ({BACKENDS[name].unusable()})" for name in passed_over]
    rest = [name for name in BACKENDS if name not in passed_over]
    if not reasons:
        order = ", ".join(rest)
        return f"backend {chosen}: the fastest on a CPU with VNNI, and it can run here (tried in this order: {order})"
    return f"backend {chosen}: " + "; ".join(reasons)


def open_engine(
    backend: str,
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    device: str | None = None,
    digest: str | None = None,
    threads: int | None = None,
    precision: str | None = None,
) -> Engine:
    """Compile the ONNX file at `path` for fixed input `shapes`.

    digest: of the graph's bytes; given, the backend's compiled blob is kept in the home folder and used again.
    threads: how many of a CPU's to use (default: the backend's choice). precision: see OpenVINOEngine, which has it.
    """
    kind = BACKENDS[backend]
    module = kind.load()
    given = {"device": device, "threads": threads, "precision": precision}
    options = {name: value for name, value in given.items() if value is not None}
    engine = getattr(module, kind.engine)
    try:
        if digest is None or not kind.keeps_blobs or _data_bytes(path) > LIMIT // 2:
            return engine(path, shapes, **options)
        key = (backend, module.runtime_version(), sorted(options.items()), digest, sorted(shapes.items()))
        with blob_folder(key) as folder:
            return engine(path, shapes, cache=folder, **options)
    except RuntimeError as error:
        raise UserError(f"{backend} cannot compile {path.name}: {last_line(error)}") from error


def _data_bytes(path: Path) -> int:
    """Of a graph's weights, which its blob would hold once more."""
    data = path.with_name(path.name + ".data")
    return data.stat().st_size if data.is_file() else 0
