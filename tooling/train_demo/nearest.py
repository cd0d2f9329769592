"""Whether generated clips are nearer to the very clips that the demo was trained on than to others as good.

    dit-trt build --method none
    python -m dit_trt.tooling.train_demo.clips --output wavs --seeds 4
    python -m dit_trt.tooling.train_demo.nearest --assets assets --recordings recordings.npz --wavs wavs

Likeness is the acceptance test's, to the nearest clip of the class (of one sound). It is taken twice: to the pool of
the training, drawn again from its seed, and to a pool as large of another seed, which nobody was trained on. A clip
made from these recordings is near to both; one learned by heart is nearer to the first. Beside generated clips stand
real ones behind the decoder, as long as those: clips of the first pool itself (the most there can be), other draws of
the same recordings (nothing), and held-out recordings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..intervals import mean_interval
from .acceptance import arguments, draws_of, show, wavs_of_classes
from .corpus import CLASSES, Recording, load_held_out, recordings_by_class, unpack
from .decoded import pretransform, read, through_decoder
from .features import log_mel, stack
from .likeness import likeness, shape_of, spectra
from .pool import PCA_CLIPS, WHOLE_SECONDS, Clips, augment
from .processes import in_processes

COUNT, OTHER_SEED = 4, 1_000_000  # real clips of a class; seed of the pool that nobody was trained on
KINDS = ("generated", "clips of the training's pool itself", "other draws of its recordings", "held-out recordings")
TOLERANCE = 0.01  # of the pool's mean log-mel; that of another seed is off by three times as much


class Drawn(NamedTuple):
    """shape: float16, of `shape_of`. whole: does it sound to its end?"""

    label: str
    shape: NDArray[np.float16]
    whole: bool = True


def _drawn(label: str, audio: NDArray[np.float32], seconds: float = WHOLE_SECONDS) -> Drawn:
    return Drawn(label, shape_of(audio).astype(np.float16), seconds >= WHOLE_SECONDS)


def mean_mel(pool: Clips, index: int) -> NDArray[np.float32]:
    """The mean of a pool's clip as the PCA sees it, [4 * MELS]."""
    return stack(log_mel(pool.draw(index)[0])).mean(axis=0)


def of_pool(pool: Clips, index: int) -> Drawn | None:
    """A pool's clip of that index, or None for one of two sounds."""
    clip, first, second, seconds = pool.draw(index)
    return _drawn(CLASSES[first], clip, seconds) if second < 0 else None


def of_pool_decoded(pool: Clips, index: int) -> Drawn:
    """The same behind the decoder, of its first sound."""
    clip, first, _, seconds = pool.draw(index)
    return _drawn(CLASSES[first], through_decoder(clip), seconds)


def of_recordings(own: Mapping[str, list[Recording]], task: tuple[str, int]) -> Drawn:
    """A class and a number -> a real clip of it that sounds to its end, behind the decoder."""
    label, index = task
    rng = np.random.default_rng((50_000, index, CLASSES.index(label)))
    seconds = 0.0
    while seconds < WHOLE_SECONDS:
        clip, seconds = augment(label, own[label], rng)
    return _drawn(label, through_decoder(clip))


def of_wav(path: Path) -> Drawn:
    """`<class>-<seed>.wav` as it is."""
    return _drawn(path.stem.rpartition("-")[0], read(path))


def check_pool(mean: NDArray[np.floating], shipped: NDArray[np.floating]) -> None:
    """Of the first PCA_CLIPS clips, to which the shipped decoder was fitted. Raises SystemExit for another's."""
    if (off := float(np.abs(mean - shipped).max())) > TOLERANCE:
        raise SystemExit(f"this is not the pool that the demo was trained on: its mean log-mel is off by {off:.3f}")


def table(trained: Sequence[Drawn], other: Sequence[Drawn], found: Mapping[str, Sequence[Drawn]]) -> str:
    """Both in Markdown; means over classes of each class's mean. trained, other: the pools; found: by KINDS."""
    near: dict[str, dict[str, tuple[float, float]]] = {kind: {} for kind in KINDS}
    for label in CLASSES:
        pools = [spectra([drawn.shape for drawn in pool if drawn.label == label]) for pool in (trained, other)]
        for kind in KINDS:
            own = [drawn.shape for drawn in found[kind] if drawn.label == label]
            if own:
                first, second = (float(np.mean([likeness(shape, pool) for shape in own])) for pool in pools)
                near[kind][label] = first, second
    lines = [
        "| likeness to the nearest clip of | the training's pool | another pool | difference (95 %) |",
        "|---|---|---|---|",
    ]
    for kind in KINDS:
        first, second = np.mean(list(near[kind].values()), axis=0)
        more = mean_interval([a - b for a, b in near[kind].values()])
        of = f"{kind} ({len(found[kind])} of {len(near[kind])} classes)"
        lines.append(f"| {of} | {first:.3f} | {second:.3f} | {more.value:+.3f} ({more.low:+.3f} to {more.high:+.3f}) |")
    lines += ["", f"| class: both likenesses | {' | '.join(KINDS)} |", "|---" * (1 + len(KINDS)) + "|"]
    for label in CLASSES:
        cells = ["{:.2f}, {:.2f}".format(*near[kind][label]) if label in near[kind] else "" for kind in KINDS]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = arguments(__doc__, "<class>-<seed>.wav")
    parser.add_argument("--recordings", type=Path, required=True, help="what corpus --pack wrote")
    parser.add_argument("--clips", type=int, default=30_000, help="of each pool; the training's had 30000")
    args = parser.parse_args()
    wavs = wavs_of_classes(args.wavs)
    if missing := set(CLASSES) - {path.stem.rpartition("-")[0] for path in wavs}:
        raise SystemExit(f"{args.wavs} lacks {', '.join(sorted(missing))}; make them with clips --output {args.wavs}")
    recordings, held_out = unpack(args.recordings), load_held_out(args.assets)
    trained_on, never = (partial(Clips, recordings, seed) for seed in (0, OTHER_SEED))
    trained_on()  # which raises where a class is missing: a process that does is waited for in vain
    check_pool(np.mean(list(in_processes(mean_mel, range(PCA_CLIPS), trained_on)), axis=0), pretransform()["mean"])
    pools = [list(in_processes(of_pool, range(args.clips), make)) for make in (trained_on, never)]
    for pool in pools:
        if lacking := set(CLASSES) - {drawn.label for drawn in pool if drawn is not None and drawn.whole}:
            raise SystemExit(f"{args.clips} clips have none of {', '.join(sorted(lacking))}; give more --clips")
    whole = [(drawn.label, index) for index, drawn in enumerate(pools[0]) if drawn is not None and drawn.whole]
    learned = [index for label in CLASSES for index in [i for own, i in whole if own == label][:COUNT]]
    of_each = [(label, index) for label in CLASSES for index in range(COUNT)]
    found = (
        [of_wav(path) for path in wavs],
        list(in_processes(of_pool_decoded, learned, trained_on)),
        list(in_processes(of_recordings, of_each, partial(recordings_by_class, recordings))),
        list(in_processes(of_recordings, draws_of(held_out), partial(recordings_by_class, held_out))),
    )
    trained, other = ([drawn for drawn in pool if drawn is not None] for pool in pools)
    show(table(trained, other, dict(zip(KINDS, found, strict=True))), args.output)


if __name__ == "__main__":
    main()
