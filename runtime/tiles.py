"""Long sound through an engine of a fixed, short length: overlapping tiles, put together exactly. numpy only.

A convolutional decoder sees a limited number of latents, its radius, on either side of a sample, and treats what is
beyond the ends of its input as zeros, layer by layer. So a tile's output is that of the whole input except near those
of its edges that lie inside; these are thrown away, as far as `overlap` >= the radius reaches. The first and the last
tile share the input's true ends, where nothing is thrown away. What is kept equals the untiled result, up to float
rounding. Memory is that of one tile, whatever the length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]


class Tile(NamedTuple):
    """A tile reads latents start..start + tile - 1 and gives the result for first..last - 1; all count from 0."""

    start: int
    first: int
    last: int


def tiles(length: int, tile: int, overlap: int) -> Iterator[Tile]:
    """Tiles that give every latent of 0..length - 1 once, each `overlap` or more from its tile's inner edges.

    Raises ValueError when the input is shorter than a tile, or a tile no longer than its two overlaps.
    """
    if length < tile:
        raise ValueError(f"{length} latents are less than a tile of {tile}")
    if length > tile and tile <= 2 * overlap:
        raise ValueError(f"a tile of {tile} latents keeps nothing within overlaps of {overlap}")
    first = 0
    while first < length:
        start = min(max(first - overlap, 0), length - tile)
        last = length if start == length - tile else start + tile - overlap
        yield Tile(start, first, last)
        first = last


def decode_tiles(decode: Callable[[Float], Float], latents: Float, tile: int, overlap: int, ratio: int) -> Float:
    """latents [channels, L] -> audio [audio channels, samples], `ratio` samples a latent.

    decode: [channels, tile] -> [audio channels, ratio * tile - d], where d samples (0, but for odd strides) are missing
    at the end; they are then missing from the whole result's end.
    """
    parts = []
    for start, first, last in tiles(latents.shape[1], tile, overlap):
        audio = decode(latents[:, start : start + tile])
        end = None if last == latents.shape[1] else (last - start) * ratio
        parts.append(audio[:, (first - start) * ratio : end])
    return np.concatenate(parts, axis=1)


def encode_tiles(
    encode: Callable[[Float], tuple[Float, ...]], audio: Float, tile: int, overlap: int, ratio: int
) -> tuple[Float, ...]:
    """audio [audio channels, ratio * L] -> what `encode` makes of ratio * tile samples, each [channels, L].

    Raises ValueError when the audio is no whole number of latents.
    """
    length, rest = divmod(audio.shape[1], ratio)
    if rest:
        raise ValueError(f"{audio.shape[1]} samples are no multiple of {ratio}")
    parts = []
    for start, first, last in tiles(length, tile, overlap):
        outputs = encode(audio[:, start * ratio : (start + tile) * ratio])
        parts.append([output[:, first - start : last - start] for output in outputs])
    return tuple(np.concatenate(pieces, axis=1) for pieces in zip(*parts))
