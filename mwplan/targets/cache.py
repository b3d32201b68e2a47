"""What was compiled before, on disk: results by the text of the program, the compiler's version and the
target.

Files lie in `$XDG_CACHE_HOME/mwplan/targets` (`~/.cache` where that is not set). They may be deleted at any
time; of several processes that write the same one, one wins, and no one reads half a file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from mwplan.common import serial
from mwplan.common.errors import FileFormatError

T = TypeVar("T")


def folder() -> Path:
    """Where results lie."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mwplan" / "targets"


def key(*texts: str) -> str:
    """The name of what is made from these texts."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)}:".encode())
        digest.update(text.encode())
    return digest.hexdigest()


def known(name: str, cls: type[T], *, kind: str, schema: int) -> T | None:
    """What was kept under `name`; None where nothing was, or what cannot be read as a `cls`."""
    try:
        return serial.load(_path(name).read_text(), cls, kind=kind, schema=schema)
    except (OSError, UnicodeDecodeError, FileFormatError):
        return None


def keep(name: str, obj: object, *, kind: str, schema: int) -> None:
    """Keeps a frozen dataclass of plain values; where the folder cannot be written, nothing is kept."""
    try:
        serial.write_atomically(_path(name), serial.dump(obj, kind=kind, schema=schema))
    except OSError:
        return


def found(name: str, cls: type[T], make: Callable[[], T], *, kind: str, schema: int) -> T:
    """What was kept under `name`, or what `make` gives, kept from now on."""
    one = known(name, cls, kind=kind, schema=schema)
    if one is None:
        one = make()
        keep(name, one, kind=kind, schema=schema)
    return one


def _path(name: str) -> Path:
    return folder() / name[:2] / f"{name[2:]}.json"
