"""The identity of a trained model for adapters: a hash of the ternary codes and scales that it computes with."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


class CodesHash:
    """Hash of the matrices of a model's mixers and experts, which may be added in any order.

    Runs, exports and model files of the same weights have the same hash, whatever else they round or leave out. It is
    the sha256 of one line "NAME SHA256" for each parameter, sorted, where the second hash is that of the parameter.
    """

    def __init__(self) -> None:
        self._lines: dict[str, str] = {}

    def add_ternary(self, name: str, codes: NDArray[np.int8], scales: NDArray[np.float32]) -> None:
        """Add a ternary parameter.

        Args:
            name: Its name.
            codes: [E,O,I] of −1, 0, 1.
            scales: [E,S].
        """
        self._add(name, codes.shape, np.ascontiguousarray(codes, "i1"), np.ascontiguousarray(scales, "<f4"))

    def add_plain(self, name: str, values: NDArray[np.float32]) -> None:
        """Add a parameter that is not ternary, rounded to bf16, as exports hold it.

        Args:
            name: Its name.
            values: [E,O,I].
        """
        bits = np.ascontiguousarray(values, "<f4").view("<u4")
        # Half to even, as casts to bf16 round.
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        self._add(name, values.shape, rounded.astype("<u2"))

    def hexdigest(self) -> str:
        """Return the sha256 of everything that was added."""
        lines = (f"{name} {found}\n" for name, found in sorted(self._lines.items()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def _add(self, name: str, shape: tuple[int, ...], *values: NDArray[np.generic]) -> None:
        digest = hashlib.sha256("×".join(map(str, shape)).encode() + b"\n")
        for each in values:
            digest.update(each.data)
        self._lines[name] = digest.hexdigest()
