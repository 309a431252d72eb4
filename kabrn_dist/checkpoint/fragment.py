"""Fragments: parts of logical tensors that one rank holds."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from kabrn_dist.utils.errors import UserError


@dataclass(frozen=True)
class Fragment:
    """A contiguous part of one flattened logical tensor.

    A rank may hold several fragments of one name, fragments may be empty, and ranks may hold copies.

    Attributes:
        name: Logical tensor and part, such as "layers.0.experts.up/master" or "layers.0.experts.up/exp_avg".
        shape: Shape of the whole logical tensor; experts are stacked by global id in the first dimension.
        offset: First element held here, counted in the flattened logical tensor.
        values: 1-D view of any dtype and device; writing into it changes the run.
        owned: Whether this rank writes the values to disk; exactly one rank owns each element.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    values: Tensor
    owned: bool


def check_fragment(fragment: Fragment) -> None:
    """Check that the values are 1-D and lie inside the logical tensor.

    A function rather than a `__post_init__`, so that it runs where all ranks agree on failures.

    Raises:
        UserError: if they do not.
    """
    total = prod(fragment.shape)
    if fragment.values.ndim != 1:
        raise UserError(f"{fragment.name}: fragment values have shape {tuple(fragment.values.shape)}; pass a 1-D view")
    stop = fragment.offset + fragment.values.numel()
    if fragment.offset < 0 or stop > total:
        raise UserError(
            f"{fragment.name}: a fragment holds elements {fragment.offset} to {stop}, but shape "
            f"{fragment.shape} has {total}; cut padding off and count the offset in the whole tensor"
        )


def overlapping_ranges(start: int, stop: int, bounds: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return the overlaps of [start, stop) with the adjoining ranges [bounds[i], bounds[i + 1]).

    Args:
        start: First element.
        stop: Element after the last.
        bounds: Rises from 0 to at least `stop`.

    Returns:
        (i, first, last) for each range that shares the elements [first, last) with [start, stop), in order.

    Example:
        >>> overlapping_ranges(2, 7, [0, 4, 8])
        [(0, 2, 4), (1, 4, 7)]
    """
    overlaps: list[tuple[int, int, int]] = []
    index = bisect_right(bounds, start) - 1
    while start < stop:
        last = min(stop, bounds[index + 1])
        if last > start:
            overlaps.append((index, start, last))
        start, index = last, index + 1
    return overlaps
