"""Values of a model file's matrices: ternary codes in tiles or in base 3, int8 rows with a scale each. Numpy alone.

Shapes:
    R: rows of a matrix.
    C: columns of a matrix.
    S: scales of a matrix.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kabrn_dist.runtime.file_format import TILE

INT8_MAX = 127


def pack_tiles(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Pack ternary codes [R,C] into tiles of 16 × 16, two bits each.

    Example:
        >>> codes = np.array([[1, 0, -1]], np.int8)
        >>> len(pack_tiles(codes)), unpack_tiles(pack_tiles(codes), 1, 3).tolist()
        (64, [[1, 0, -1]])
    """
    rows, columns = codes.shape
    padded = np.pad((codes + 1).astype(np.uint8), ((0, -rows % TILE), (0, -columns % TILE)), constant_values=1)
    # Tile's row, row, tile's column, field, byte.
    parts = padded.reshape(-(-rows // TILE), TILE, -(-columns // TILE), 4, 4)
    packed = parts[:, :, :, 0] | parts[:, :, :, 1] << 2 | parts[:, :, :, 2] << 4 | parts[:, :, :, 3] << 6
    return np.ascontiguousarray(packed.transpose(0, 2, 1, 3)).reshape(-1)


def unpack_tiles(packed: NDArray[np.uint8], rows: int, columns: int) -> NDArray[np.int8]:
    """Return the codes [R,C] of tiles.

    Raises:
        ValueError: if a code or the padding is none that `pack_tiles` writes.
    """
    tiles = packed.reshape(-(-rows // TILE), -(-columns // TILE), TILE, 4).transpose(0, 2, 1, 3)
    parts = np.stack([tiles >> shift & 3 for shift in (0, 2, 4, 6)], 3)
    stored = parts.reshape(-(-rows // TILE) * TILE, -1)
    if stored.size and (stored.max() > 2 or (stored[rows:] != 1).any() or (stored[:, columns:] != 1).any()):
        raise ValueError("a code that is none of -1, 0, 1, or padding that is not 0")
    return stored[:rows, :columns].astype(np.int8) - 1


def encode_base3(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Pack ternary codes [R,C], row by row, five to a byte; what is missing in the last byte counts as 0."""
    flat = (codes.reshape(-1) + 1).astype(np.uint8)
    digits = np.pad(flat, (0, -len(flat) % 5)).reshape(-1, 5)
    packed = digits[:, 4].copy()
    for digit in (3, 2, 1, 0):
        packed = packed * 3 + digits[:, digit]
    return packed


def decode_base3(packed: NDArray[np.uint8], rows: int, columns: int) -> NDArray[np.int8]:
    """Return the codes [R,C] that `encode_base3` packed.

    Raises:
        ValueError: for a byte that it does not write.
    """
    if packed.size and packed.max() >= 3**5:
        raise ValueError("a byte above 242, which is no five codes")
    digits = np.stack([packed // 3**digit % 3 for digit in range(5)], 1).reshape(-1)
    if digits[rows * columns :].any():
        raise ValueError("codes behind the last one")
    return digits[: rows * columns].reshape(rows, columns).astype(np.int8) - 1


def quantize_rows(values: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round the rows of [R,C] to int8.

    Returns:
        The codes [R,C], and the scales [R]: max |x| / 127 of each row. A value is code × scale.
    """
    scales = (np.abs(values).max(1, initial=0) / np.float32(INT8_MAX)).astype(np.float32)
    safe = np.where(scales > 0, scales, np.float32(1))[:, None]
    codes = np.rint(values / safe).clip(-INT8_MAX, INT8_MAX)
    return np.where(scales[:, None] > 0, codes, 0).astype(np.int8), scales


def repeat_scales(scales: NDArray[np.float32], rows: int, group: int) -> NDArray[np.float32]:
    """Return each row's scale [R] of a matrix with scales [S], of which one serves `group` rows (0: all)."""
    return np.repeat(scales, group if group and len(scales) > 1 else rows)[:rows]
