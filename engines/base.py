"""What every backend offers: an `Engine` runs one graph; `BACKENDS` says which module opens one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol

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
    trunk: what the step graph computes in, but for integer products and what has to be float32 (see exporters/trunk).
    int4_block: 4-bit weights of an `expanded` graph have at least two scales an output channel, one for so many inputs
    at most; 0: also one.
    """

    activation: Literal["int8", "uint8"] = "int8"
    branch: Literal["float32", "float16", "bfloat16"] = "float32"
    trunk: Literal["float32", "float16", "bfloat16"] = "float32"
    int4_block: int = 0


INT8 = Dialect()


@dataclass(frozen=True)
class Backend:
    """A module of this folder with `engine`, a class, and `unusable`, `runtime_version` and `check_device`.

    packages: one of these must be importable. install: how a user gets it. dialects: by trunk (`fp32`, ...), how its
    graphs are written; the first is its default. keeps_blobs: compiling is slow enough to be cached. wants_vnni: on a
    CPU without it, see `saturates`. proof: the class that tells what a graph compiles to, where it is not the engine:
    it needs no device, and its module has `unbuildable`. engine_trunks: trunks that the engine, not the graph, makes.
    int16_kernels: its engine has faster int8 kernels for graphs all of whose sums of two products fit 16 bits.
    """

    module: str
    engine: str
    packages: tuple[str, ...]
    install: str
    dialects: Mapping[str, Dialect]
    keeps_blobs: bool = False
    wants_vnni: bool = False
    proof: str | None = None
    engine_trunks: tuple[str, ...] = ()
    int16_kernels: bool = False

    @property
    def dialect(self) -> Dialect:
        """Of its default trunk."""
        return next(iter(self.dialects.values()))

    def load(self) -> ModuleType:
        return import_module(f".{self.module}", __package__)

    def unusable(self) -> str | None:
        """Why nothing can run with it here, and the fix; None when it can."""
        return self._missing() or self.load().unusable()

    def unbuildable(self) -> str | None:
        """Why no bundle can be built with it here, and the fix; None when one can."""
        if self.proof is None:
            return self.unusable()
        return self._missing() or self.load().unbuildable()

    def _missing(self) -> str | None:
        if any(find_spec(package) for package in self.packages):
            return None
        return f"the package {self.packages[0]} is not installed: {self.install}"

    def saturates(self, device: str | None = None) -> bool:
        """Whether, on this CPU, it adds int8 products in 16 bits and multiplies weights that stay in 4 bits in float.

        device: of the backend (default: its CPU).
        """
        return self.wants_vnni and self.gains_from_int16(device)

    def gains_from_int16(self, device: str | None = None) -> bool:
        """Whether, on this CPU, sums of int8 products that fit 16 bits are added more exactly, or faster, than others.

        device: as for `saturates`.
        """
        on_cpu = (device or "CPU").upper().startswith("CPU")
        return (self.wants_vnni or self.int16_kernels) and on_cpu and lacks_vnni()


# In the order of `auto`.
BACKENDS = {
    "openvino": Backend(
        "openvino",
        "OpenVINOEngine",
        ("openvino",),
        "pip install openvino",
        {"fp32": Dialect(branch="bfloat16"), "bf16": Dialect(branch="bfloat16")},
        keeps_blobs=True,
        wants_vnni=True,
        engine_trunks=("bf16",),
    ),
    "onnxruntime": Backend(
        "onnxruntime",
        "ONNXRuntimeEngine",
        ("onnxruntime",),
        "pip install onnxruntime (or onnxruntime-gpu for CUDA, never both)",
        {"fp32": Dialect("uint8")},
        int16_kernels=True,
    ),
    # A branch in the trunk's own type keeps its attention from being fused.
    "tensorrt": Backend(
        "tensorrt",
        "TensorRTEngine",
        ("tensorrt", "tensorrt_rtx"),
        "pip install tensorrt (or tensorrt-rtx-cu13)",
        {
            "fp16": Dialect(branch="bfloat16", trunk="float16", int4_block=128),
            "bf16": Dialect(branch="float16", trunk="bfloat16", int4_block=128),
            "fp32": Dialect(branch="bfloat16", int4_block=128),
        },
        keeps_blobs=True,
        proof="TensorRTPlan",
    ),
}
TRUNKS = ("auto", *dict.fromkeys(trunk for backend in BACKENDS.values() for trunk in backend.dialects))


def choose_trunk(backend: str, trunk: str) -> str:
    """`auto` becomes the backend's default. Raises UserError for one that it has not, or that does nothing here."""
    known = BACKENDS[backend].dialects
    if trunk == "auto":
        return next(iter(known))
    if trunk not in known:
        raise UserError(f"the backend {backend} has no trunk {trunk!r} (one of: {', '.join(known)})")
    if trunk in BACKENDS[backend].engine_trunks and not BACKENDS[backend].load().has_bf16():
        raise UserError(f"this CPU does not multiply {trunk}: {backend} would compute in fp32; leave --trunk out")
    return trunk


def choose_backend(name: str, device: str | None = None, to_build: bool = False) -> str:
    """`auto` becomes the first backend that can run here. Raises UserError for an unknown or unusable one.

    device: of the backend; raises UserError when it has none of that name. to_build: one that can only build will do,
    where it is named.
    """
    name = _first_usable() if name == "auto" else _usable(name, to_build)
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


def _usable(name: str, to_build: bool) -> str:
    if name not in BACKENDS:
        raise UserError(f"unknown backend {name!r} (one of: auto, {', '.join(BACKENDS)})")
    backend = BACKENDS[name]
    to_build = to_build and backend.proof is not None
    reason = backend.unbuildable() if to_build else backend.unusable()
    if reason is not None:
        raise UserError(f"the backend {name} cannot {'build' if to_build else 'run'} here: {reason}")
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


def precision_of(backend: str, facts: Mapping[str, Any], graph: str) -> str | None:
    """The `precision` of a bundle's graph, for `open_engine`. facts: `trunk` and `int16_sums`, as in its manifest.

    A trunk that the engine makes, in the step graphs; `int16` where the backend has such kernels and 16 bits suffice.
    """
    kind, trunk = BACKENDS[backend], facts.get("trunk")
    if trunk in kind.engine_trunks and graph.partition("-")[0] == "step":
        return trunk
    return "int16" if kind.int16_kernels and facts.get("int16_sums") else None


def open_engine(
    backend: str,
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    device: str | None = None,
    digest: str | None = None,
    threads: int | None = None,
    precision: str | None = None,
    plan: Mapping[str, Any] | None = None,
    rebuild: bool = False,
    profile: bool | None = None,
) -> Engine:
    """Compile the ONNX file at `path` for fixed input `shapes`.

    digest: of the graph's bytes; given, the backend's compiled blob is kept in the home folder and used again.
    threads: how many of a CPU's to use (default: the backend's choice). precision: OpenVINO's, of what is not
    quantized (`f32`, `bf16`); ONNX Runtime's, of sums of int8 products (`int32`, `int16`); see `precision_of`.
    plan, rebuild: see TensorRTPlan, which has them. profile: count what layers take, see `Layer`.
    """
    given = {"device": device, "threads": threads, "precision": precision, "options": plan, "profile": profile}
    return _open(backend, BACKENDS[backend].engine, path, shapes, given, digest, rebuild)


class Proof(Protocol):
    """What a compiled graph tells of itself."""

    def int8_matmuls(self) -> set[str]: ...


def open_proof(
    backend: str,
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    device: str | None = None,
    digest: str | None = None,
    precision: str | None = None,
    plan: Mapping[str, Any] | None = None,
    say: Callable[[str], object] | None = None,
) -> Proof:
    """What `open_engine` would compile, to be asked about its kernels; where the backend can, without its device."""
    kind = BACKENDS[backend]
    given = {"device": device, "precision": precision, "options": plan, "say": say if kind.proof else None}
    return _open(backend, kind.proof or kind.engine, path, shapes, given, digest, kind.proof is not None)


def _open(
    backend: str,
    class_name: str,
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    given: Mapping[str, Any],
    digest: str | None,
    rebuild: bool,
) -> Any:
    kind = BACKENDS[backend]
    module = kind.load()
    options = {name: value for name, value in given.items() if value is not None}
    opened = getattr(module, class_name)
    # Plans say themselves which version made them; others' blobs are found by it.
    facts = () if kind.proof else (module.runtime_version(),)
    more = {"rebuild": rebuild} if kind.proof else {}
    keyed = [(name, value) for name, value in sorted(options.items()) if name != "say"]
    try:
        if digest is None or not kind.keeps_blobs or _data_bytes(path) > LIMIT // 2:
            return opened(path, shapes, **options, **more)
        keyed_shapes = module.plan_shapes(path, shapes, options.get("options")) if kind.proof else shapes
        with blob_folder((backend, *facts, keyed, digest, sorted(keyed_shapes.items()))) as folder:
            return opened(path, shapes, cache=folder, **options, **more)
    except RuntimeError as error:
        raise UserError(f"{backend} cannot compile {path.name}: {last_line(error)}") from error


def _data_bytes(path: Path) -> int:
    """Of a graph's weights, which its blob would hold once more."""
    data = path.with_name(path.name + ".data")
    return data.stat().st_size if data.is_file() else 0
