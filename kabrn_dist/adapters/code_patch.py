"""Patches of ternary codes: made from two models, applied, taken back, and stored in few bytes."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kabrn_dist.adapters.adapter import CodePatch

# A byte below it is a gap and a place; this byte skips as many codes and means no place.
GAP_ESCAPE = 255


class PackedPlaces(NamedTuple):
    """Places and steps of a patch, as files hold them.

    Attributes:
        gaps: uint8: of each place, how many codes lie between it and the one before, with `GAP_ESCAPE` in front for
            each 255 of them.
        step_bits: uint8, a bit of each place, from the low bits up: 0 for a step of 1, 1 for a step of 2.
    """

    gaps: NDArray[np.uint8]
    step_bits: NDArray[np.uint8]


def make_patch(
    base_codes: NDArray[np.int8],
    base_scales: NDArray[np.float32],
    codes: NDArray[np.int8],
    scales: NDArray[np.float32],
) -> CodePatch:
    """Return what changes the codes and scales of a parameter into others.

    Args:
        base_codes: [E,O,I] of −1, 0, 1, before.
        base_scales: [E,S] fp32.
        codes: [E,O,I], after.
        scales: [E,S] fp32.

    Example:
        >>> before, after = np.array([[[0, 1, -1]]], np.int8), np.array([[[0, -1, -1]]], np.int8)
        >>> scale = np.ones((1, 1), np.float32)
        >>> patch = make_patch(before, scale, after, scale)
        >>> patch.places.tolist(), patch.steps.tolist(), apply_patch(before, patch).tolist()
        ([1], [1], [[[0, -1, -1]]])
    """
    assert base_codes.shape == codes.shape and base_scales.shape == scales.shape
    steps = (codes.reshape(-1) - base_codes.reshape(-1)) % 3
    places = np.flatnonzero(steps)
    matrices, rows, columns = codes.shape
    return CodePatch((matrices, rows, columns), places, steps[places].astype(np.uint8), scales, base_scales)


def apply_patch(codes: NDArray[np.int8], patch: CodePatch) -> NDArray[np.int8]:
    """Return the codes [E,O,I] of the base with those of the patch in their places."""
    return _step(codes, patch, patch.steps)


def remove_patch(codes: NDArray[np.int8], patch: CodePatch) -> NDArray[np.int8]:
    """Return the codes [E,O,I] of the base from those that have the patch applied."""
    return _step(codes, patch, 3 - patch.steps)


def invert_patch(patch: CodePatch) -> CodePatch:
    """Return the patch that takes a patch back."""
    return CodePatch(patch.shape, patch.places, (3 - patch.steps).astype(np.uint8), patch.base_scales, patch.scales)


def select_matrix(patch: CodePatch, number: int) -> CodePatch:
    """Return the patch of one matrix of a stack, as of a parameter [1,O,I]."""
    _, rows, columns = patch.shape
    size = rows * columns
    first, last = np.searchsorted(patch.places, [number * size, (number + 1) * size])
    return CodePatch(
        (1, rows, columns),
        patch.places[first:last] - number * size,
        patch.steps[first:last],
        patch.scales[number : number + 1],
        patch.base_scales[number : number + 1],
    )


def pack_places(patch: CodePatch) -> PackedPlaces:
    """Return the places and steps of a patch as files hold them."""
    gaps = np.diff(patch.places, prepend=-1) - 1
    escapes = gaps // GAP_ESCAPE
    packed = np.full(len(gaps) + int(escapes.sum()), GAP_ESCAPE, np.uint8)
    packed[np.cumsum(escapes + 1) - 1] = gaps % GAP_ESCAPE
    return PackedPlaces(packed, np.packbits(patch.steps == 2, bitorder="little"))


def unpack_places(packed: PackedPlaces, shape: tuple[int, int, int]) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Return places and steps, as in `CodePatch`.

    Args:
        packed: Of a stranger; takes memory in proportion to its bytes.
        shape: [E,O,I] of the parameter.

    Raises:
        ValueError: for places beyond the parameter, or another number of steps than of places.
    """
    gaps, step_bits = packed
    is_place = gaps < GAP_ESCAPE
    if len(gaps) and not is_place[-1]:
        raise ValueError("gaps that lead to no place")
    # A place follows its gap; an escape is a gap alone.
    after = np.cumsum(gaps.astype(np.int64) + is_place)
    if len(after) and after[-1] > prod(shape):
        raise ValueError(f"a place {after[-1] - 1} of {prod(shape)} codes")
    places = after[is_place] - 1
    bits = np.unpackbits(step_bits, bitorder="little")
    if len(step_bits) != -(-len(places) // 8) or bits[len(places) :].any():
        raise ValueError(f"{len(step_bits)} bytes of steps for {len(places)} places, or bits behind the last")
    return places, bits[: len(places)] + np.uint8(1)


def _step(codes: NDArray[np.int8], patch: CodePatch, steps: NDArray[np.uint8]) -> NDArray[np.int8]:
    assert codes.shape == patch.shape
    changed = np.array(codes, np.int8, order="C")
    flat = changed.reshape(-1)
    # From −1, 0, 1 to 0, 1, 2, where the cycle is a sum.
    flat[patch.places] = (flat[patch.places] + 1 + steps.astype(np.int8)) % 3 - 1
    return changed
