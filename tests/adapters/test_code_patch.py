"""Patches of codes: what they change, their way back, and the bytes they take."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from kabrn_dist.adapters.adapter import CodePatch
from kabrn_dist.adapters.code_patch import (
    GAP_ESCAPE,
    PackedPlaces,
    apply_patch,
    invert_patch,
    make_patch,
    pack_places,
    remove_patch,
    select_matrix,
    unpack_places,
)

SHAPE = (3, 41, 67)


def draw_codes(seed: int) -> NDArray[np.int8]:
    return np.random.default_rng(seed).integers(-1, 2, SHAPE).astype(np.int8)


def draw_patch(share: float) -> tuple[NDArray[np.int8], NDArray[np.int8], CodePatch]:
    base, other = draw_codes(0), draw_codes(1)
    codes = np.where(np.random.default_rng(2).random(SHAPE) < share, other, base)
    scales = np.random.default_rng(3).random((2, 3, 6)).astype(np.float32)
    return base, codes, make_patch(base, scales[0], codes, scales[1])


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 1.0])
def test_a_patch_makes_the_codes_and_takes_them_back(share: float) -> None:
    base, codes, patch = draw_patch(share)
    assert np.array_equal(apply_patch(base, patch), codes) and np.array_equal(remove_patch(codes, patch), base)
    assert np.array_equal(apply_patch(codes, invert_patch(patch)), base)
    assert np.array_equal(patch.places, np.flatnonzero(base != codes))
    parts = [apply_patch(base[number : number + 1], select_matrix(patch, number)) for number in range(len(base))]
    assert np.array_equal(np.concatenate(parts), codes)
    # What is applied does not change what it was applied to.
    assert np.array_equal(base, draw_codes(0))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 1.0])
def test_places_survive_their_packing(share: float) -> None:
    patch = draw_patch(share)[2]
    packed = pack_places(patch)
    places, steps = unpack_places(packed, patch.shape)
    assert np.array_equal(places, patch.places) and np.array_equal(steps, patch.steps)
    assert len(packed.gaps) <= len(places) + np.prod(SHAPE) // GAP_ESCAPE


def test_gaps_around_the_escape() -> None:
    places = np.cumsum(np.array([1, 254, 255, 256, 257, 511, 1021, 1]))
    shape = (1, 1, int(places[-1]) + 1)
    scales = np.ones((1, 1), np.float32)
    patch = CodePatch(shape, places, np.full(8, 2, np.uint8), scales, scales)
    packed = pack_places(patch)
    # By the definition: an escape for every 255 codes between two places, then the rest.
    expected: list[int] = []
    for gap in np.diff(places, prepend=-1) - 1:
        expected += [GAP_ESCAPE] * (gap // GAP_ESCAPE) + [gap % GAP_ESCAPE]
    assert packed.gaps.tolist() == expected
    assert unpack_places(packed, shape)[0].tolist() == places.tolist()


@pytest.mark.parametrize(
    ("gaps", "steps", "message"),
    [
        ([5, 4], 1, "a place 10 of 10 codes"),
        ([255, 0], 1, "a place 255 of 10 codes"),
        ([255] * 4, 0, "no place"),
        ([1, 1], 2, "2 bytes of steps for 2 places"),
        ([1, 1], 0, "0 bytes of steps for 2 places"),
        ([], 1, "1 bytes of steps for 0 places"),
    ],
)
def test_places_that_cannot_be_are_refused(gaps: list[int], steps: int, message: str) -> None:
    packed = PackedPlaces(np.array(gaps, np.uint8), np.zeros(steps, np.uint8))
    with pytest.raises(ValueError, match=message):
        unpack_places(packed, (1, 2, 5))


def test_bits_behind_the_last_step_are_refused() -> None:
    with pytest.raises(ValueError, match="bits behind"):
        unpack_places(PackedPlaces(np.array([0], np.uint8), np.array([2], np.uint8)), (1, 2, 5))
