"""The identity of a trained model for adapters: a hash of the ternary codes and scales that it computes with."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


class CodesHash:
    """Hash of the matrices of a model, added in the order of its parameters.

    Runs, exports and model files of the same weights have the same hash, whatever else they round or leave out.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add_ternary(self, name: str, codes: NDArray[np.int8], scales: NDArray[np.float32]) -> None:
        """Add a ternary parameter.

        Args:
            name: Its name.
            codes: [E,O,I] of −1, 0, 1.
            scales: [E,S].
        """
        self._begin(name, codes.shape)
        self._digest.update(np.ascontiguousarray(codes, "i1").data)
        self._digest.update(np.ascontiguousarray(scales, "<f4").data)

    def add_plain(self, name: str, values: NDArray[np.float32]) -> None:
        """Add a parameter that is not ternary, rounded to bf16, as exports hold it.

        Args:
            name: Its name.
            values: [E,O,I].
        """
        self._begin(name, values.shape)
        bits = np.ascontiguousarray(values, "<f4").view("<u4")
        # Half to even, as casts to bf16 round.
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        self._digest.update(rounded.astype("<u2").data)

    def hexdigest(self) -> str:
        """Return the sha256 of everything that was added."""
        return self._digest.hexdigest()

    def _begin(self, name: str, shape: tuple[int, ...]) -> None:
        self._digest.update(f"{name} {'×'.join(map(str, shape))}\n".encode())
