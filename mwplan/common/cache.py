"""What was measured or compiled before, on disk, so that it need not be again.

Files lie in `$XDG_CACHE_HOME/mwplan` (`~/.cache/mwplan` where that is not set), a folder for each kind, and
may be deleted at any time. Of several processes that write the same one, one wins, and no one reads half a
file; where the folder cannot be written, nothing is kept. A name is made from everything that the result
depends on, so that nothing has to be thrown away when a program, a compiler or this package changes.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from mwplan.common import serial
from mwplan.common.errors import FileFormatError

T = TypeVar("T")


def folder(kind: str) -> Path:
    """Where results of this kind lie."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mwplan" / kind


def key(*texts: str) -> str:
    """The name of what is made from these texts."""
    digest = hashlib.sha256()
    for text in texts:
        raw = text.encode()
        digest.update(f"{len(raw)}:".encode() + raw)
    return digest.hexdigest()


@functools.cache
def sources(*packages: str) -> str:
    """A digest of the code of some packages of `mwplan`: results that hang on it have it in their names."""
    root = Path(__file__).parent.parent
    files = sorted(path for package in packages for path in (root / package).rglob("*.py"))
    return key(*(path.read_text() for path in files))


def known(name: str, cls: type[T], *, kind: str, schema: int) -> T | None:
    """What was kept under `name`; None where nothing was, or what cannot be read as a `cls`."""
    try:
        return serial.load(_path(kind, name).read_text(), cls, kind=kind, schema=schema)
    except (OSError, UnicodeDecodeError, FileFormatError):
        return None


def keep(name: str, obj: object, *, kind: str, schema: int) -> None:
    """Keeps a frozen dataclass of plain values."""
    try:
        serial.write_atomically(_path(kind, name), serial.dump(obj, kind=kind, schema=schema))
    except OSError:
        return


def found(name: str, cls: type[T], make: Callable[[], T], *, kind: str, schema: int) -> T:
    """What was kept under `name`, or what `make` gives, kept from now on."""
    one = known(name, cls, kind=kind, schema=schema)
    if one is None:
        one = make()
        keep(name, one, kind=kind, schema=schema)
    return one


def _path(kind: str, name: str) -> Path:
    return folder(kind) / name[:2] / f"{name[2:]}.json"
