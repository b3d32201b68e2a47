"""Sizes and times as people write and read them."""

from __future__ import annotations

import math
import operator
import re
from typing import Any

from mwplan.common.errors import ArgumentError

_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_MAX = 2**63 - 1
_BARE = 2**20  # a text without a unit below it is more likely a size in other units than one in bytes


def parse_bytes(value: Any, argument: str = "budget") -> int:
    """Bytes from an integer or a text such as "2GiB", "1.5 MB", "300_000_000".

    Binary units end in iB, decimal ones in B. Fractions of a byte are dropped. Raises `ArgumentError` for
    anything that is not a size from 1 byte to 2^63 - 1, and for a text below a mebibyte without a unit: "30"
    is seldom meant to be 30 bytes ("30B" is).
    """
    hint = 'give bytes as an integer, or a text such as "2GiB" or "500 MB"'
    if isinstance(value, bool):
        raise ArgumentError(f"`{argument}={value!r}` is not a size: {hint}")
    if not isinstance(value, str):
        try:
            size = operator.index(value)
        except TypeError:
            raise ArgumentError(f"`{argument}={value!r}` is not a size: {hint}") from None
    else:
        match = re.fullmatch(r"\s*([+-]?[0-9][0-9_]*(?:\.[0-9]*)?|[+-]?\.[0-9]+)\s*([A-Za-z]*)\s*", value)
        if match is None or match[2].upper() not in _UNITS:
            raise ArgumentError(f"`{argument}={value!r}` is not a size: {hint}")
        if not match[2] and 0 < float(match[1].replace("_", "")) < _BARE:
            raise ArgumentError(
                f"`{argument}={value!r}` has no unit, and would be bytes: say which, as in "
                f'"{match[1]}GiB", "{match[1]}MiB" or, if bytes are meant, "{match[1]}B"'
            )
        number, unit = match[1].replace("_", ""), _UNITS[match[2].upper()]
        if abs(float(number)) > _MAX:
            raise ArgumentError(f"`{argument}={value[:40]!r}` is beyond 2^63 - 1 bytes: {hint}")
        size = (
            int(number) * unit if re.fullmatch(r"[+-]?[0-9]+", number) else math.floor(float(number) * unit)
        )
    if size <= 0:
        raise ArgumentError(f"`{argument}={value!r}` must be more than 0 bytes: {hint}")
    if size > _MAX:
        raise ArgumentError(f"`{argument}={value!r}` is beyond 2^63 - 1 bytes: {hint}")
    return size


def show_bytes(size: int) -> str:
    """A size for people: "1.50 GiB"."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    return f"{value:.2f} TiB"


def show_ns(time_ns: int) -> str:
    """A time for people: "12.3 ms"."""
    for limit, scale, unit in ((1e3, 1, "ns"), (1e6, 1e3, "us"), (1e9, 1e6, "ms")):
        if abs(time_ns) < limit:
            return f"{time_ns / scale:.3g} {unit}"
    return f"{time_ns / 1e9:.3g} s"
