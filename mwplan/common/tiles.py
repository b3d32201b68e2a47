"""Bytes of arrays in a TPU's memory, which rounds two of their axes up to tiles of 8 by 128.

XLA:TPU lays the axes of an array in the order that suits the operations around it: that of the first axis
last for a convolution of a large batch with few channels, for one. The order is not known before a program is
compiled. Here it is that with the least padding, of equal ones a usual one (`ORDERS`).
**Source:** the tiles are those in the text of programs compiled for a v5e, such as `{0,3,2,1:T(8,128)}`;
numbers of 16 and 8 bits share the tiles of 32-bit ones, two and four to a place.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

LANES, SUBLANES, VECTOR = 128, 8, 1024
#: The axes along the rows and along the lanes of tiles, as they usually are.
ORDERS = ((-2, -1), (0, -1), (-1, 0))


def padded_bytes(shape: Sequence[int], bits: int) -> int:
    """Bytes of an array with numbers of so many bits, with the padding of its tiles.

    >>> from mwplan.common.tiles import padded_bytes
    >>> padded_bytes((4, 16, 128), 32), padded_bytes((4, 16, 64), 32), padded_bytes((256, 16, 64), 32)
    (32768, 32768, 1048576)
    """
    return -(-_padded(shape, order(shape)) * bits // 8)


def order(shape: Sequence[int]) -> tuple[int, int]:
    """The axes along the rows and the lanes of tiles: of least padding."""
    pairs = itertools.permutations(range(len(shape)), 2)
    return min((*ORDERS, *pairs), key=lambda one: _padded(shape, one))


def padded_along(shape: Sequence[int], order: tuple[int, int], bits: int) -> int:
    """`padded_bytes` where the axes along tiles are given."""
    return -(-_padded(shape, order) * bits // 8)


def _padded(shape: Sequence[int], order: tuple[int, int]) -> int:
    """The number of elements with their padding."""
    if len(shape) < 2:
        count = math.prod(shape)
        return _up(count, VECTOR if count > VECTOR // 2 else LANES)
    dims = list(shape)
    rows, lanes = order
    dims[lanes] = _up(dims[lanes], LANES)
    # Few rows have lower tiles.
    dims[rows] = _up(dims[rows], min(SUBLANES, 1 << max(0, dims[rows] - 1).bit_length()))
    return math.prod(dims)


def _up(count: int, step: int) -> int:
    return -(-count // step) * step
