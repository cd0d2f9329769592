"""How a step's time grows with the clip's length, with clips computed at once and with threads, and a model of it.

    python -m dit_trt.tooling.scaling BUNDLE --output scaling.md

writes the table, the numbers beside it as .json and the plots as .png. The model has three terms, fitted by least
squares of relative errors: t = a + b T + c T L, of L tokens a clip's half and T tokens altogether. a is what a step
costs however short it is; b is products, norms and all else that goes token by token; c is attention, where each token
meets the L of its own half.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from ..engines.bundle import Bundle, find_bundle
from ..engines.errors import UserError
from ..runtime.pipeline import Pipeline
from ..runtime.step_engine import Conditioning
from .cli.common import dit_command, path_option, progress, say, show
from .plots import check_matplotlib, new_figure
from .timed_steps import cores, open_step_engine, turn, turns

PROMPT = "dog barking"
FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)  # of the model's full length
CLIPS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Point:
    """One setting: clips at once, latents a clip, threads; ms: of a step, the median of the rounds."""

    clips: int
    latents: int
    threads: int
    ms: float

    @property
    def tokens(self) -> int:
        """Of both CFG halves of all clips: the global embedding is one more in each."""
        return 2 * self.clips * (self.latents + 1)


@dataclass(frozen=True)
class Model:
    """t = fixed + by_token T + by_pair T L, milliseconds; of points with all threads."""

    fixed: float
    by_token: float
    by_pair: float

    def __call__(self, point: Point) -> float:
        return self.fixed + point.tokens * (self.by_token + self.by_pair * (point.latents + 1))


@dataclass(frozen=True)
class Scaling:
    """Points over length and over clips (all threads), over threads (full length, one clip), and the model."""

    bundle: str
    backend: str
    rounds: int
    points: tuple[Point, ...]
    model: Model


def settings_of(max_latents: int, threads: int) -> list[tuple[int, int, int]]:
    """clips, latents, threads of every point: lengths, then clips at a quarter of the full length, then threads."""
    lengths = sorted({max(2, round(max_latents * fraction)) for fraction in FRACTIONS})
    quarter = max(2, max_latents // 4)
    wanted = [(1, length, threads) for length in lengths]
    wanted += [(clips, quarter, threads) for clips in CLIPS]
    wanted += [
        (1, max_latents, count) for count in (*(2**i for i in range(threads.bit_length()) if 2**i < threads), threads)
    ]
    return list(dict.fromkeys(wanted))


def measure(bundle: Bundle, rounds: int, threads: int, done: Callable[[int], object] = lambda rounds: None) -> Scaling:
    """Time every setting in turn, `rounds` times."""
    pipeline = Pipeline(bundle)
    settings = pipeline.settings(steps=8, cfg_scale=7.0)  # both halves, whatever the model's own guidance
    conditioning = pipeline.condition(PROMPT, settings, pipeline.check_seconds(None))
    wanted = settings_of(pipeline.sizes["max_latents"], threads)
    if pipeline.max_batch is not None:
        wanted = [each for each in wanted if each[0] <= pipeline.max_batch]
    steps = {each: _step(pipeline, conditioning, *each) for each in wanted}
    names = {str(each): each for each in wanted}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index, order in enumerate(turns(list(names), rounds)):
        for name in order:
            seconds[name].append(turn(steps[names[name]]))
        done(index + 1)
    points = tuple(Point(*each, 1000 * statistics.median(seconds[str(each)])) for each in wanted)
    return Scaling(str(bundle.folder), bundle.backend, rounds, points, fit(points, threads))


def _step(
    pipeline: Pipeline, conditioning: Conditioning, clips: int, latents: int, threads: int
) -> Callable[[], object]:
    together = Conditioning.together([conditioning] * clips)
    engine = open_step_engine(pipeline, together, threads, latents=latents)
    shape = (together.batch, *engine.latent_shape)
    x = np.random.Generator(np.random.PCG64(0)).standard_normal(shape, np.float32)
    return lambda: engine.run(together, 4, x)


def fit(points: Sequence[Point], threads: int) -> Model:
    """Of the points with so many threads: relative errors are squared, and no term is below zero."""
    of = [point for point in points if point.threads == threads]
    rows = np.array([[1, point.tokens, point.tokens * (point.latents + 1)] for point in of], np.float64)
    times = np.array([point.ms for point in of])
    weighted = rows / times[:, None]
    scale = weighted.max(axis=0)
    free = [0, 1, 2]
    found: NDArray[np.float64] = np.zeros(3)
    while free:  # a term that comes out negative is left out, the most negative first
        values = np.linalg.lstsq(weighted[:, free] / scale[free], np.ones(len(of)), rcond=None)[0]
        if values.min() >= 0:
            found[free] = values / scale[free]
            break
        free.pop(int(values.argmin()))
    return Model(*map(float, found))


# -------------------- the report


def markdown(found: Scaling, machine: str) -> str:
    model = found.model
    lines = [
        f"{machine}; {Path(found.bundle).name} on {found.backend}, {found.rounds} interleaved rounds, medians",
        "",
        f"t = {model.fixed:.3g} + {model.by_token:.3g} T + {model.by_pair:.3g} T L ms",
        "",
        "| clips | latents | tokens T | threads | step, ms | a clip, ms | the model | off by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    most = max(point.threads for point in found.points)
    for point in found.points:
        foretold = model(point) if point.threads == most else None
        end = "|  |  |" if foretold is None else f"| {foretold:.2f} | {point.ms / foretold - 1:+.0%} |"
        lines.append(
            f"| {point.clips} | {point.latents} | {point.tokens} | {point.threads} "
            f"| {point.ms:.2f} | {point.ms / point.clips:.2f} {end}"
        )
    return "\n".join(lines)


def plot(path: Path, found: Scaling) -> None:
    """Three panels: over latents, over clips, over threads; the model as a line in the first two."""
    most = max(point.threads for point in found.points)
    full = max(point.latents for point in found.points)
    figure = new_figure(2.8)
    left, middle, right = figure.subplots(1, 3)
    lengths = sorted((p for p in found.points if p.clips == 1 and p.threads == most), key=lambda p: p.latents)
    left.plot([p.latents for p in lengths], [p.ms for p in lengths], "o")
    grid = np.linspace(0, full, 50)
    left.plot(grid, [found.model(Point(1, int(n), most, 0)) for n in grid], color="#8c8c8c")
    left.set_xlabel("latents of one clip")
    left.set_ylabel("a step, ms")
    quarter = max(2, full // 4)
    batches = sorted((p for p in found.points if p.latents == quarter and p.threads == most), key=lambda p: p.clips)
    middle.plot([p.clips for p in batches], [p.ms / p.clips for p in batches], "o")
    middle.plot(
        [p.clips for p in batches], [found.model(p) / p.clips for p in batches], color="#8c8c8c", label="the model"
    )
    middle.set_xlabel(f"clips at once, {quarter} latents each")
    middle.set_ylabel("a clip's share of a step, ms")
    threads = sorted((p for p in found.points if p.latents == full and p.clips == 1), key=lambda p: p.threads)
    right.plot([p.threads for p in threads], [threads[0].ms / p.ms for p in threads], "o")
    right.plot([1, most], [1, most], color="#8c8c8c")
    right.set_xlabel("threads")
    right.set_ylabel("times one thread's speed")
    right.set_xticks(range(1, most + 1))
    for axes in (left, middle, right):
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    figure.savefig(path, dpi=144)


@click.command()
@click.argument("bundle")
@click.option("--rounds", type=click.IntRange(1, 1000), default=9, show_default=True, help="All take turns so often.")
@click.option("--threads", type=click.IntRange(1, 1024), help="The most threads (default: all cores).")
@click.option("--output", metavar="FILE.md", required=True, help="The table; .json and .png go beside it.")
@dit_command
def command(bundle: str, rounds: int, threads: int | None, output: str) -> dict:
    """Time a bundle's step over lengths, clips at once and threads, and fit a model."""
    path = path_option(output)
    assert path is not None
    if path.suffix != ".md" or not path.parent.is_dir():
        raise UserError(f"cannot write {path}; give --output a file like scaling.md in a folder that exists")
    check_matplotlib("the plots need")
    found_bundle = find_bundle(bundle).verify()
    with progress("timing, rounds", rounds) as done:
        found = measure(found_bundle, rounds, threads or cores(), done)
    from .bench import machine  # PyTorch comes with it: only now, when nothing is measured any more

    text = markdown(found, machine())
    path.write_text(text + "\n", "utf-8")
    path.with_suffix(".json").write_text(json.dumps(asdict(found), indent=1) + "\n", "utf-8")
    plot(path.with_suffix(".png"), found)
    show(text)
    say(f"written to {path}, {path.with_suffix('.json')} and {path.with_suffix('.png')}")
    return asdict(found)


if __name__ == "__main__":
    command(prog_name="python -m dit_trt.tooling.scaling")
