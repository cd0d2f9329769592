"""Two bundles of one model: how far one's velocities stray from the other's, step by step, on the same inputs.

The reference samples each prompt with the production sampler; every input it saw is then given to both engines
(teacher forcing), and Polygraphy compares the CFG-combined velocities, which is what the sampler sees. Rollouts of
their own are compared once, by the signal-to-noise ratio of the final latents under the deterministic sampler.
"""

from __future__ import annotations

import shlex
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator, CosineSimilarityCompareFunc
from polygraphy.exception import PolygraphyException
from polygraphy.json import save_json
from polygraphy.logger import G_LOGGER

from ..engines import tensorrt_api
from ..engines.bundle import Bundle
from ..engines.errors import UserError, last_line
from ..runtime.denoiser import guide
from ..runtime.pipeline import Pipeline, Settings
from ..runtime.step_engine import Conditioning, StepEngine
from .fidelity import rollout, snr_db, trajectory
from .trt_runner import by_trt_runner

Float = NDArray[np.float32]
# Below what the trained demo's SQS reaches at cfg 7 (.923, .920, .841), above what wrong ranges give (halved: .78).
MIN_COSINE = {"w8a8": 0.9, "w7a8": 0.9, "w4a8": 0.8, "fp32": 0.999}


@dataclass(frozen=True)
class Difference:
    """cosine and relative_error: [prompts, steps], of the velocity; snr_db: [prompts], of the final latents.

    trt_runner: of a TensorRT bundle, [prompts, steps], the cosines of the same plans as Polygraphy's TrtRunner runs
    them, without our runtime; None where it does not run, and `trt_runner_says` why.
    """

    cosine: NDArray[np.float64]
    relative_error: NDArray[np.float64]
    snr_db: NDArray[np.float64]
    polygraphy_commands: tuple[str, ...]
    trt_runner: NDArray[np.float64] | None = None
    trt_runner_says: str | None = None

    @property
    def worst_step(self) -> int:
        return int(self.cosine.mean(axis=0).argmin())

    @property
    def worst_step_cosine(self) -> float:
        """The lowest mean over prompts of any step."""
        return float(self.cosine.mean(axis=0).min())

    @property
    def trt_runner_worst_step_cosine(self) -> float | None:
        """The same of Polygraphy's TrtRunner; None where it did not run."""
        return None if self.trt_runner is None else float(self.trt_runner.mean(axis=0).min())


class VelocityRunner(BaseRunner):
    """A Polygraphy runner around our own engine: one call of the DiT with both CFG halves, then their combination.

    through: what is to run the step engine, while this is active (default: it runs itself).
    Feeds: x [channels, latents] as the model sees it (scaled by c_in), and prompt, step: int64 scalars that choose the
    conditioning, which each bundle computes with its own graphs. Output: velocity [channels, latents].
    """

    def __init__(
        self,
        name: str,
        pipeline: Pipeline,
        conditionings: Sequence[Conditioning],
        cfg_scale: float,
        on_call: Callable[[], object],
        through: Callable[[StepEngine], AbstractContextManager[StepEngine]] = nullcontext,
    ):
        super().__init__(name=name)
        self._pipeline, self._conditionings, self._cfg_scale = pipeline, conditionings, cfg_scale
        self._on_call, self._through = on_call, through

    def activate_impl(self) -> None:
        self._open = self._through(self._pipeline.step_engine_for(self._conditionings[0]))
        self._engine = self._open.__enter__()

    def deactivate_impl(self) -> None:
        self._open.__exit__(None, None, None)
        del self._open, self._engine

    def get_input_metadata_impl(self) -> TensorMetadata:
        shape = self._engine.latent_shape
        metadata = TensorMetadata()
        metadata.add("x", np.float32, shape).add("prompt", np.int64, ()).add("step", np.int64, ())
        return metadata

    def infer_impl(self, feed_dict: dict[str, NDArray]) -> OrderedDict[str, NDArray]:
        prompt, step = int(feed_dict["prompt"]), int(feed_dict["step"])
        start = time.perf_counter()
        conditioning = self._conditionings[prompt]
        outputs = self._engine.run(conditioning, step, np.stack((feed_dict["x"],) * conditioning.batch))
        self.inference_time = time.perf_counter() - start
        self._on_call()
        return OrderedDict(velocity=guide(outputs["velocity"], self._cfg_scale))


def compare(
    bundle: Bundle,
    reference: Bundle,
    prompts: Sequence[str],
    settings: Settings | None = None,
    inputs_folder: Path | None = None,
    bar: float = MIN_COSINE["w8a8"],
    on_call: Callable[[int], object] = lambda done: None,
    negative_prompt: str | None = None,
) -> Difference:
    """Compare `bundle` with `reference` on `prompts`; on_call counts the calls, `calls_a_step` a prompt and step.

    negative_prompt: of every prompt.
    inputs_folder: where to keep the first prompt's inputs of the worst step, for the plain `polygraphy run` commands
    of the result, which pass when their cosine reaches `bar`.
    Raises UserError when the two are not of one model.
    """
    settings = settings or Pipeline(bundle).settings()
    if bundle.manifest["model"]["digest"] != reference.manifest["model"]["digest"]:
        raise UserError(f"{bundle.folder.name} and {reference.folder.name} were built from different models")
    count = _Counter(on_call)
    ours, theirs = Pipeline(bundle.verify()), Pipeline(reference)
    seconds = theirs.check_seconds(None)
    conditionings = {
        pipeline: [pipeline.condition(prompt, settings, seconds, negative_prompt) for prompt in prompts]
        for pipeline in (ours, theirs)
    }
    feeds = [
        feed
        for index, conditioning in enumerate(conditionings[theirs])
        for feed in _record(theirs, conditioning, index, _reseed(settings, index), count)
    ]
    runners = [
        VelocityRunner(name, pipeline, conditionings[pipeline], settings.cfg_scale, count.one)
        for name, pipeline in (("reference", theirs), ("bundle", ours))
    ]
    shape = (len(prompts), settings.steps)
    says = None
    with _quiet_polygraphy():
        results = Comparator.run(runners, data_loader=feeds)
        if bundle.backend == "tensorrt":
            args = ("trt_runner", ours, conditionings[ours], settings.cfg_scale, count.one, by_trt_runner)
            try:
                results.extend(Comparator.run([VelocityRunner(*args)], data_loader=feeds))
            except (PolygraphyException, OSError) as error:
                says = last_line(error)
        pairs = [(0, i) for i in range(1, len(results))]
        compared = Comparator.compare_accuracy(
            results, compare_func=CosineSimilarityCompareFunc(-1.0), comparisons=pairs
        )
    cosines = {
        name: np.array([step["velocity"].cosine_similarity for step in steps], np.float64).reshape(shape)
        for (_, name), steps in compared[0].items()
    }
    cosine_table = cosines["bundle"]
    expected, found = (
        [np.asarray(iteration["velocity"]) for iteration in results[name]] for name in ("reference", "bundle")
    )
    errors = [np.linalg.norm(f - e) / np.linalg.norm(e) for e, f in zip(expected, found)]
    commands: tuple[str, ...] = ()
    if inputs_folder is not None:
        worst = int(cosine_table.mean(axis=0).argmin())
        commands = _polygraphy_commands(
            inputs_folder,
            {
                "reference": (theirs, conditionings[theirs][0]),
                "bundle": (ours, conditionings[ours][0]),
            },
            feeds[worst]["x"],
            worst,
            settings.cfg_scale,
            bar,
        )
    snr = [
        snr_db(*(rollout(p, conditionings[p][i], _reseed(settings, i), count.one) for p in (theirs, ours)))
        for i in range(len(prompts))
    ]
    error_table = np.array(errors, np.float64).reshape(shape)
    return Difference(cosine_table, error_table, np.array(snr), commands, cosines.get("trt_runner"), says)


def calls_a_step(bundle: Bundle) -> int:
    """How often the DiT is called for each prompt and step of a comparison."""
    return 6 if bundle.backend == "tensorrt" else 5


@contextmanager
def _quiet_polygraphy() -> Iterator[None]:
    severity, G_LOGGER.module_severity = G_LOGGER.module_severity, {"": G_LOGGER.CRITICAL}
    try:
        yield
    finally:
        G_LOGGER.module_severity = severity


class _Counter:
    def __init__(self, on_call: Callable[[int], object]):
        self._on_call, self._done = on_call, 0

    def one(self, step: int = 0) -> None:
        if step >= 0:
            self._done += 1
            self._on_call(self._done)


def _reseed(settings: Settings, index: int) -> Settings:
    return replace(settings, seed=settings.seed + index)


def _record(
    pipeline: Pipeline, conditioning: Conditioning, prompt: int, settings: Settings, count: _Counter
) -> list[dict[str, NDArray]]:
    """Every input of the step engine on one trajectory, as feeds of VelocityRunner."""
    xs, _ = trajectory(pipeline, conditioning, settings, count.one)
    return [{"x": x, "prompt": np.array(prompt), "step": np.array(step)} for step, x in enumerate(xs)]


def _polygraphy_commands(
    folder: Path, sides: dict[str, tuple[Pipeline, Conditioning]], x: Float, step: int, cfg_scale: float, bar: float
) -> tuple[str, ...]:
    """Save one step's inputs for both step graphs; the two commands that compare them with ONNX Runtime alone.

    Inputs differ beside x: a smoothed model's context values are scaled, and its step graph expects them so. Of a
    TensorRT bundle a third lets Polygraphy build and run a plan of its own from the same graph, on a GPU.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shapes: dict[str, str] = {}
    for name, (_, conditioning) in sides.items():
        feed = {"x": np.stack((x,) * conditioning.batch), **conditioning.at(step), **conditioning.constants}
        shapes[name] = " ".join(f"{input}:{list(value.shape)}".replace(" ", "") for input, value in feed.items())
        file = folder / f"{name}_inputs.json"
        try:
            save_json([OrderedDict(feed)], str(file))
        except OSError:  # a full disk: half a file helps nobody
            file.unlink(missing_ok=True)
            raise
    run = "polygraphy run {graph} {runner} --load-inputs {inputs} {rest}"
    outputs = shlex.quote(str(folder / "reference_outputs.json"))

    def line(name: str, rest: str, runner: str = "--onnxrt") -> str:
        pipeline, conditioning = sides[name]
        file = f"{pipeline.step_engine_for(conditioning).graph(conditioning, step)}.onnx"
        graph = shlex.quote(str(pipeline.bundle.path(file)))
        inputs = shlex.quote(str(folder / f"{name}_inputs.json"))
        return run.format(graph=graph, runner=runner, inputs=inputs, rest=rest)

    script = folder / "guided_cosine.py"
    script.write_text(_COMPARE_SCRIPT.format(cfg=cfg_scale, bar=bar), "utf-8")
    compared = f"--load-outputs {outputs} --compare-func-script {shlex.quote(str(script))}"
    by_tensorrt: tuple[str, ...] = ()
    if sides["bundle"][0].bundle.backend == "tensorrt":
        rtx = "POLYGRAPHY_USE_TENSORRT_RTX=1 " if tensorrt_api.is_rtx() else ""
        by_tensorrt = (rtx + line("bundle", compared, f"--trt --strongly-typed --input-shapes {shapes['bundle']}"),)
    return line("reference", f"--save-outputs {outputs}"), line("bundle", compared), *by_tensorrt


_COMPARE_SCRIPT = """# The cosine of one step's CFG-combined velocities, as `dit-trt diff` computes it.
from collections import OrderedDict

import numpy as np


def compare_outputs(reference, bundle):
    halves = (np.asarray(result["velocity"], np.float64) for result in (reference, bundle))
    a, b = (half[-1] + (half[0] - half[-1]) * {cfg} for half in halves)  # the prompt's first, then the other
    cosine = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
    print(f"cosine of the guided velocities: {{cosine:.4f}}, bar {bar}")
    return OrderedDict(velocity=bool(cosine >= {bar}))
"""
