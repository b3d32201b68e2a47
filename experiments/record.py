"""Provenance, files and console of every experiment."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from mwplan import __version__
from mwplan.common.serial import write_atomically

RESULTS = Path(__file__).resolve().parent.parent / "results"


def console() -> Console:
    """Where tables go: as wide as the terminal, and wide enough for them where there is none."""
    return Console(width=None if sys.stdout.isatty() else 150)


def provenance() -> dict[str, Any]:
    """Versions, device and commit; `dirty` where tracked files differ from the commit."""
    root = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=root, capture_output=True, text=True, check=False
        ).stdout.strip()

    device = jax.devices()[0]
    return {
        "versions": {
            "mwplan": __version__,
            "jax": jax.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "device": f"{device.platform}:{device.device_kind}",
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(
            git("status", "--porcelain", "--untracked-files=no", "--", "../mwplan", "../experiments")
        ),
    }


def save(path: Path, data: dict[str, Any]) -> None:
    """Writes `data` with its provenance as JSON."""
    write_atomically(path, json.dumps({"provenance": provenance(), **data}, indent=1, allow_nan=True) + "\n")
