"""Points in processes of their own, until the time is up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import sweep
from experiments.gpu.config import Config

ROOT = Path(__file__).resolve().parent.parent.parent


SHORTEST = 15.0  # seconds: with less left, no point is begun


class Clock:
    """Seconds left."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """May be below 0."""
        return self.end - time.monotonic()


class OutOfTimeError(Exception):
    """The clock has run down; finished points are kept."""


class Runner:
    """Computes points in processes of their own and keeps them."""

    def __init__(self, config: Config, clock: Clock, console: Console) -> None:
        self.config, self.clock, self.console = config, clock, console
        self.records = sweep.Records(config.out / "records.jsonl")
        self.known = self.records.read()
        self.total = device_bytes()

    def __call__(self, point: sweep.Point) -> dict[str, Any]:
        """The point's record. Raises `OutOfTimeError`."""
        key = sweep.key(point)
        if key not in self.known:
            if self.clock.left < SHORTEST:
                raise OutOfTimeError
            self.known[key] = {"key": key, "point": point, **self._compute(point)}
            if not self.known[key].get("crashed"):  # a bug is no measurement: the next call tries again
                with self.records.appending() as append:
                    append(self.known[key])
        return self.known[key]

    def _compute(self, point: sweep.Point) -> dict[str, Any]:
        name = " ".join(
            str(point[k]) for k in ("kind", "model", "method", "depth", "blocks", "matmul") if point.get(k)
        )
        with (
            self.console.status(f"{name}; {self.clock.left:.0f} s left"),
            tempfile.TemporaryDirectory() as folder,
        ):
            path = Path(folder) / "record.json"
            limit = min(self.config.per_point, self.clock.left)
            code = "import sys; from experiments.gpu.points import child; child(*sys.argv[1:])"
            start = time.monotonic()
            process = subprocess.Popen(
                [sys.executable, "-c", code, json.dumps(point), str(path)],
                cwd=ROOT,
                env=self._environment(point),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            try:
                _, said = process.communicate(timeout=limit)
            except subprocess.TimeoutExpired as error:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                if limit < self.config.per_point:
                    raise OutOfTimeError from error
                return {"ran": False, "reason": f"took more than {limit:.0f} s"}
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
            took = time.monotonic() - start
            if path.exists():
                found: dict[str, Any] = json.loads(path.read_text())
                outcome = "" if found["ran"] else f": {found['reason'][:90]}"
            else:
                # A signal's status is negative: killed for memory, perhaps. A positive one is an exception.
                found = {
                    "ran": False,
                    "crashed": process.returncode > 0,
                    "reason": f"exit status {process.returncode}: {said[-600:]}",
                }
                outcome = f": {found['reason']}"
            self.console.print(f"{name}: {took:.0f} s{outcome}", markup=False, highlight=False)
            return found

    def _environment(self, point: sweep.Point) -> dict[str, str]:
        share = min(0.92, point["pool_bytes"] / self.total) if point.get("pool_bytes") else 0.92
        env = {"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{share:.5f}"}
        return (
            os.environ | env | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        )


def device_bytes() -> int:
    """The first GPU's memory; 80 GiB where nobody says."""
    try:
        said = subprocess.run(
            ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, check=True, timeout=20,
        ).stdout  # fmt: skip
        return int(said.split()[0]) << 20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return 80 << 30
