"""An ONNX file becomes a TensorRT plan: a strongly typed network, one optimization profile, the builder's options."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import cuda, tensorrt_api
from .errors import UserError
from .home import keep

Say = Callable[[str], object]
LATENTS = "latents"  # the graphs' name for the axis whose length `profile` gives


@dataclass(frozen=True)
class PlanOptions:
    """What changes a plan beside its graph; stored in the manifest, so that a run builds what the build proved.

    targets: compute capabilities, as `sm89` (TensorRT-RTX; default: its portable plan for 8.0 and later). profile:
    fewest, best and most latents of the step graph, for one plan that runs all of them. workspace: bytes that one
    kernel may use beside its tensors. weight_streaming: bytes of weights that stay on the device, the others are
    brought in at every step.
    """

    targets: tuple[str, ...] = ()
    profile: tuple[int, int, int] | None = None
    workspace: int | None = None
    weight_streaming: int | None = None

    def __post_init__(self) -> None:
        if self.profile is not None:
            low, best, high = self.profile
            if not 1 <= low <= best <= high:
                raise UserError(f"--profile {low},{best},{high} is not min,opt,max, three rising numbers of latents")
        for name in ("workspace", "weight_streaming"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} of {value} bytes: it must be positive")

    def to_dict(self) -> dict[str, Any]:
        """Those that are not the default, as JSON has them."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in vars(self).items()
            if value != getattr(PlanOptions(), name)
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PlanOptions:
        plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**plain)


CURRENT = "current"


def target_names() -> list[str]:
    """The compute capabilities that this TensorRT builds for by name; none where it builds for its own GPU alone.

    `current` is that of the GPU which builds, whether it has a name there or not.
    """
    kinds = getattr(tensorrt_api.api(), "ComputeCapability", None)
    return [] if kinds is None else sorted(n.lower() for n in dir(kinds) if n.startswith("SM") or n == CURRENT.upper())


def check_targets(targets: tuple[str, ...]) -> None:
    known = target_names()
    if unknown := [target for target in targets if target not in known]:
        what = f"it builds for: {', '.join(known)}" if known else "it builds for the GPU that it runs on"
        raise UserError(f"{tensorrt_api.version()} has no target {', '.join(unknown)}; {what}")
    if CURRENT in targets and (len(targets) > 1 or not cuda.device_count()):
        raise UserError(f"the target {CURRENT} stands alone, for the GPU that is here, on a machine with one")


def build_plan(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    options: PlanOptions | None = None,
    say: Say = lambda message: None,
    timing: Path | None = None,
) -> bytes:
    """Parse and build. Raises RuntimeError with the parser's or the builder's reason.

    timing: where the times of the kernels that were tried are kept from build to build (TensorRT's alone: TensorRT-RTX
    tries none).

    shapes: of every input; where the graph leaves an axis open it is fixed to this, but for `latents` with a profile.
    """
    options = options or PlanOptions()
    trt, log = tensorrt_api.api(), tensorrt_api.log()
    log.errors.clear()
    builder = trt.Builder(log)
    # From TensorRT 11 on every network is strongly typed, and the flag is gone.
    strongly = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly is None else 1 << int(strongly))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        raise RuntimeError(_parser_faults(parser) or log.take())
    config = _config(trt, builder, options)
    profile = builder.create_optimization_profile()
    names = {network.get_input(i).name for i in range(network.num_inputs)}
    if names != shapes.keys():
        raise RuntimeError(f"its inputs are {', '.join(sorted(names))}, not {', '.join(sorted(shapes))}")
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        if -1 in tuple(tensor.shape):
            profile.set_shape(tensor.name, *_bounds(tensor, shapes[tensor.name], options.profile))
    config.add_optimization_profile(profile)
    if timing is not None:
        known = timing.read_bytes() if timing.is_file() else b""
        config.set_timing_cache(config.create_timing_cache(known), False)  # another GPU's is not used
    start = time.monotonic()
    config.progress_monitor = monitor = _phases(trt, say)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        if monitor.interrupted is not None:
            raise monitor.interrupted
        raise RuntimeError(log.take())
    if timing is not None:
        keep(timing, bytes(config.get_timing_cache().serialize()))
    say(f"{tensorrt_api.version()} built {path.name} in {time.monotonic() - start:.1f} s")
    return bytes(plan)


def _config(trt: Any, builder: Any, options: PlanOptions) -> Any:
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # what a graph calls float32 is float32
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # so that the inspector names kernels and types
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if options.weight_streaming is not None:
        if not hasattr(trt.BuilderFlag, "WEIGHT_STREAMING"):
            raise RuntimeError(f"{tensorrt_api.version()} cannot stream weights")
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if options.targets:
        config.num_compute_capabilities = len(options.targets)
        for i, target in enumerate(options.targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), i)
    return config


def _bounds(tensor: Any, shape: tuple[int, ...], profile: tuple[int, int, int] | None) -> list[tuple[int, ...]]:
    """Least, best and largest shape of one input."""
    if profile is None:
        return [shape] * 3
    open_axes = [i for i, size in enumerate(tensor.shape) if size == -1 and tensor.get_dimension_name(i) == LATENTS]
    return [tuple(bound if i in open_axes else size for i, size in enumerate(shape)) for bound in profile]


def _parser_faults(parser: Any) -> str:
    """What the parser could not read, with the nodes' names."""
    errors = (parser.get_error(i) for i in range(parser.num_errors))
    return "; ".join(f"{error.node_name() or error.node_operator() or 'the graph'}: {error.desc()}" for error in errors)


def _phases(trt: Any, say: Say) -> Any:
    """Tells of the builder's outermost phases as they begin. Its steps are not even in time: a share would be made up.

    What `say` raises, Ctrl-C among it, stops the builder and is raised again behind it.
    """

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            super().__init__()
            self.interrupted: BaseException | None = None
            self._start = time.monotonic()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self._guarded(lambda: say(f"  {phase_name}, after {time.monotonic() - self._start:.0f} s"))

        def step_complete(self, phase_name: str, step: int) -> bool:
            return self.interrupted is None

        def phase_finish(self, phase_name: str) -> None: ...

        def _guarded(self, act: Callable[[], object]) -> None:
            try:
                act()
            except BaseException as error:
                self.interrupted = error

    return Monitor()
