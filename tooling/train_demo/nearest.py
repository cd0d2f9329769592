"""How near generated clips come to the very clips that the demo was trained on, beside real ones that it was not.

    python -m dit_trt.tooling.train_demo.clips --output wavs --seeds 8
    python -m dit_trt.tooling.train_demo.nearest --assets assets --wavs wavs --output nearest.md

The training's pool is drawn again, from its seed. Likeness is the acceptance test's, to the nearest clip of the class
in the pool (of one sound). Beside generated clips stand three kinds of real ones behind the decoder: clips of the pool
itself, which is what one learned by heart would reach, other draws of the same recordings, and held-out recordings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .acceptance import (
    JUDGED,
    UNSEEN,
    arguments,
    draws_of,
    in_processes,
    median,
    nearest,
    real_clip,
    shape_of,
    show,
    spectra,
    wavs_of_classes,
    worker,
)
from .corpus import CLASSES, load, load_held_out
from .decoded import read
from .pool import Clips

Shape = NDArray[np.float16]
Drawn = tuple[str, Shape]  # a class and the shape of a clip of it
KINDS = ("generated", "clips of the pool itself", "other draws of the same recordings", "held-out recordings")
COPY = 0.1  # a clip is as near as a copy if this share of the pool's own clips is no nearer


@cache
def _clips(seed: int) -> Clips:
    return Clips(worker().recordings, seed)


def _drawn(label: str, audio: NDArray[np.float32]) -> Drawn:
    return label, shape_of(audio, worker().filters).astype(np.float16)


def of_pool(task: tuple[int, int]) -> Drawn | None:
    """Seed and index -> the pool's clip of that index, or None for one of two sounds."""
    clip, first, second, _ = _clips(task[0]).draw(task[1])
    return _drawn(CLASSES[first], clip) if second < 0 else None


def of_pool_decoded(task: tuple[int, int]) -> Drawn:
    """The same behind the decoder, by its first sound."""
    clip, first, _, _ = _clips(task[0]).draw(task[1])
    return _drawn(CLASSES[first], worker().decoded(clip))


def of_recordings(task: tuple[str, int]) -> Drawn:
    """A class and a number -> a real clip of it."""
    return _drawn(task[0], real_clip(*task))


def of_wav(path: Path) -> Drawn:
    """`<class>-<seed>.wav` as it is."""
    return _drawn(path.stem.rpartition("-")[0], read(path))


def table(pool: Sequence[Drawn], found: Mapping[str, Sequence[Drawn]]) -> str:
    """Both in Markdown. found: by KINDS."""
    near: dict[str, dict[str, list[float]]] = {kind: {} for kind in KINDS}
    counts = {}
    for label in CLASSES:
        own = [shape for name, shape in pool if name == label]
        counts[label] = len(own)
        known = spectra(own)
        for kind in KINDS:
            near[kind][label] = [nearest(shape, known) for name, shape in found[kind] if name == label]
    foreign = [label for label in CLASSES if near[KINDS[3]][label]]
    copy = float(np.quantile([value for label in CLASSES for value in near[KINDS[1]][label]], COPY))
    of = f"the {len(foreign)} classes with a held-out recording"
    lines = [f"| {of} | likeness, median (p10 to p90) | as near as a copy |", "|---|---|---|"]
    for kind in KINDS:
        values = [value for label in foreign for value in near[kind][label]]
        lines.append(f"| {kind} ({len(values)}) | {median(values)} | {np.mean(np.array(values) >= copy):.0%} |")
    lines += ["", f"| class | its clips in the pool | {' | '.join(KINDS)} |", "|---" * (2 + len(KINDS)) + "|"]
    for label in CLASSES:
        cells = [f"{np.median(values):.2f}" if (values := near[kind][label]) else "" for kind in KINDS]
        lines.append(f"| {label} | {counts[label]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = arguments(__doc__, "<class>-<seed>.wav")
    parser.add_argument("--clips", type=int, default=30_000, help="of the pool")
    parser.add_argument("--seed", type=int, default=0, help="of the pool")
    args = parser.parse_args()
    wavs = wavs_of_classes(args.wavs)
    if missing := set(CLASSES) - {path.stem.rpartition("-")[0] for path in wavs}:
        raise SystemExit(f"{args.wavs} lacks {', '.join(sorted(missing))}; make them with clips --output {args.wavs}")
    recordings, held_out = load(args.assets), load_held_out(args.assets)
    drawn = in_processes(of_pool, [(args.seed, index) for index in range(args.clips)], recordings)
    pool = [each for each in drawn if each is not None]
    if lacking := set(CLASSES) - {label for label, _ in pool}:
        raise SystemExit(f"{args.clips} clips of the pool have none of {', '.join(sorted(lacking))}; give more --clips")
    single = [(each[0], (args.seed, index)) for index, each in enumerate(drawn) if each is not None]
    some = [task for label in CLASSES for task in [task for name, task in single if name == label][:UNSEEN]]
    others = [(label, JUDGED + index) for label in CLASSES for index in range(UNSEEN)]  # the acceptance test's unseen
    found = (
        in_processes(of_wav, wavs, []),
        in_processes(of_pool_decoded, some, recordings),
        in_processes(of_recordings, others, recordings),
        in_processes(of_recordings, draws_of(held_out), held_out),
    )
    show(table(pool, dict(zip(KINDS, found, strict=True))), args.output)


if __name__ == "__main__":
    main()
