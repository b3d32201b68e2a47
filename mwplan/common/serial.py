"""Frozen dataclasses of plain values to JSON and back, checked on the way in; files written atomically."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import os
import tempfile
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from mwplan.common.errors import FileFormatError, MwplanError

T = TypeVar("T")


def dump(obj: Any, *, kind: str, schema: int) -> str:
    """`obj` as a JSON object `{"kind", "schema", "data"}`. Infinities are written as strings: JSON has
    none."""
    return json.dumps({"kind": kind, "schema": schema, "data": _plain(obj)}, indent=1)


def load(text: str, cls: type[T], *, kind: str, schema: int) -> T:
    """Reads what `dump` wrote, checking kind, schema, field names and types.

    Raises `FileFormatError` naming the place where the text differs from `cls`.
    """
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise FileFormatError(f"not JSON ({error}): expected a saved {kind}") from error
    if not isinstance(raw, dict) or raw.get("kind") != kind:
        got = raw.get("kind") if isinstance(raw, dict) else type(raw).__name__
        raise FileFormatError(f"expected a saved {kind}, got {got!r}")
    if raw.get("schema") != schema:
        raise FileFormatError(
            f"this {kind} has schema {raw.get('schema')!r} and this version reads {schema}: make it again"
        )
    try:
        return typing.cast(T, _build(raw.get("data"), cls, kind))
    except FileFormatError:
        raise
    except (MwplanError, TypeError, ValueError) as error:
        raise FileFormatError(f"this {kind} is not valid: {error}") from error


def write_atomically(path: Path, data: str | bytes) -> None:
    """Writes `data` to `path` so that a reader, or a kill, never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = data.encode() if isinstance(data, str) else data
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(raw)
            f.flush()
            os.fsync(f.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _plain(obj: Any) -> Any:
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {f.name: _plain(getattr(obj, f.name)) for f in dataclasses.fields(obj)}
    if isinstance(obj, enum.Enum):
        return obj.name
    if isinstance(obj, (tuple, list)):
        return [_plain(v) for v in obj]
    if isinstance(obj, float) and math.isinf(obj):
        return "inf" if obj > 0 else "-inf"
    if obj is None or isinstance(obj, (bool, int, float, str)):
        return obj
    raise TypeError(f"{type(obj).__name__} cannot be saved")


def _build(raw: Any, want: Any, where: str) -> Any:
    origin, args = typing.get_origin(want), typing.get_args(want)
    if origin in (typing.Union, types.UnionType):
        if raw is None and type(None) in args:
            return None
        return _build(raw, next(a for a in args if a is not type(None)), where)
    if origin is tuple:
        if not isinstance(raw, list):
            raise FileFormatError(f"{where}: expected a list, got {raw!r}")
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_build(v, args[0], f"{where}[{i}]") for i, v in enumerate(raw))
        if len(raw) != len(args):
            raise FileFormatError(f"{where}: expected {len(args)} entries, got {len(raw)}")
        return tuple(_build(v, a, f"{where}[{i}]") for i, (v, a) in enumerate(zip(raw, args)))
    if dataclasses.is_dataclass(want):
        fields = {f.name: f for f in dataclasses.fields(want)}
        if not isinstance(raw, dict) or not raw.keys() <= fields.keys():
            extra = sorted(raw.keys() - fields.keys()) if isinstance(raw, dict) else raw
            raise FileFormatError(f"{where}: unknown fields {extra!r}")
        hints = typing.get_type_hints(want)
        return want(**{k: _build(v, hints[k], f"{where}.{k}") for k, v in raw.items()})  # type: ignore[operator]
    if isinstance(want, type) and issubclass(want, enum.Enum):
        try:
            return want[raw]
        except KeyError as error:
            raise FileFormatError(f"{where}: {raw!r} is not one of {[m.name for m in want]}") from error
    if want is float and raw in ("inf", "-inf"):
        return float(raw)
    if want is float and isinstance(raw, int) and not isinstance(raw, bool):
        return float(raw)
    if isinstance(want, type) and (type(raw) is not want):
        raise FileFormatError(f"{where}: expected {want.__name__}, got {raw!r}")
    return raw
