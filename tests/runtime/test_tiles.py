"""Tiles give every latent once, far enough from inner edges, and are put together in place."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_trt.runtime.tiles import decode_tiles, encode_tiles, tiles


@st.composite
def cuts(draw: st.DrawFn) -> tuple[int, int, int]:
    """length, tile, overlap"""
    overlap = draw(st.integers(0, 12))
    tile = draw(st.integers(2 * overlap + 1, 2 * overlap + 40))
    return draw(st.integers(tile, 400)), tile, overlap


@given(cuts())
def test_every_latent_once_and_never_near_an_inner_edge(cut: tuple[int, int, int]) -> None:
    length, tile, overlap = cut
    found = list(tiles(length, tile, overlap))
    kept = [latent for part in found for latent in range(part.first, part.last)]
    assert kept == list(range(length))
    for start, first, last in found:
        end = start + tile
        assert start >= 0 and end <= length
        assert first - start >= overlap or start == first == 0
        assert end - last >= overlap or end == last == length
    assert len(found) == max(1, -(-(length - 2 * overlap) // (tile - 2 * overlap)))


@given(cuts(), st.integers(1, 5), st.booleans())
def test_put_together_in_place(cut: tuple[int, int, int], ratio: int, short: bool) -> None:
    """A decoder that spoils `overlap` latents at either end of what it is given, and may be a sample short."""
    length, tile, overlap = cut
    missing = int(short and overlap > 0)  # what is missing at inner edges must be within the overlap
    latents = np.arange(1, 2 * length + 1, dtype=np.float32).reshape(2, length)
    audio = np.repeat(latents, ratio, axis=1)
    end = latents[:, :1], latents[:, -1:]

    def decode(part: np.ndarray) -> np.ndarray:
        assert part.shape == (2, tile)
        made = np.repeat(part, ratio, axis=1)
        margin = overlap * ratio
        if margin and not (part[:, :1] == end[0]).all():
            made[:, :margin] = -1
        if margin and not (part[:, -1:] == end[1]).all():
            made[:, -margin:] = -1
        return made[:, : tile * ratio - missing]

    found = decode_tiles(decode, latents, tile, overlap, ratio)
    np.testing.assert_array_equal(found, audio[:, : length * ratio - missing])

    def encode(part: np.ndarray) -> tuple[np.ndarray, ...]:
        assert part.shape == (2, tile * ratio)
        made = part[:, ::ratio].copy()
        if overlap and not (part[:, :1] == end[0]).all():
            made[:, :overlap] = -1
        if overlap and not (part[:, -1:] == end[1]).all():
            made[:, -overlap:] = -1
        return made, -made

    mean, stdev = encode_tiles(encode, audio, tile, overlap, ratio)
    np.testing.assert_array_equal(mean, latents)
    np.testing.assert_array_equal(stdev, -latents)


def test_what_cannot_be_tiled() -> None:
    with pytest.raises(ValueError, match="9 latents are less than a tile of 10"):
        next(tiles(9, 10, 2))
    with pytest.raises(ValueError, match="keeps nothing within overlaps of 5"):
        next(tiles(11, 10, 5))
    assert list(tiles(10, 10, 5)) == [(0, 0, 10)]
    with pytest.raises(ValueError, match="21 samples are no multiple of 2"):
        encode_tiles(lambda part: (part,), np.zeros((1, 21), np.float32), 5, 1, 2)
