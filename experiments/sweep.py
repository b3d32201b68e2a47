"""Sweeps that can be killed: finished points are kept, one JSON line each, and a second call goes on where
the first stopped.

A point is a dictionary of plain values, known by the hash of its canonical JSON. Points are computed by any
`concurrent.futures` executor:

- `processes` (the default): a new process for each point, one at a time, so that timings do not disturb one
  another; `--workers` for more;
- `threads`: in this process; `serial`: in one thread of it;
- `dask://HOST:PORT`: Dask's distributed client (the `dask` extra);
- `MODULE:NAME`: any other, such as `mpi4py.futures:MPIPoolExecutor`; called without arguments.
"""

from __future__ import annotations

import argparse
import concurrent.futures as cf
import contextlib
import dataclasses
import fcntl
import hashlib
import importlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments import record
from mwplan.common.errors import ArgumentError, MwplanError

Point = dict[str, Any]
Work = Callable[[Point], dict[str, Any]]
T = TypeVar("T")


class SweepError(MwplanError):
    """Some points failed; the others are kept."""


def key(point: Point) -> str:
    """The hash by which a point is known."""
    text = json.dumps(point, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Records:
    """A file of JSON lines that one process at a time appends to. A last line without its end is cut off."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, dict[str, Any]]:
        """All records by key, the latest for each. A last line that was cut short is left out; any other bad
        line is an error."""
        found: dict[str, dict[str, Any]] = {}
        if not self.path.exists():
            return found
        lines = self.path.read_bytes().split(b"\n")[:-1]
        for number, line in enumerate(lines, start=1):
            try:
                one = json.loads(line)
            except ValueError as error:
                raise SweepError(f"{self.path}, line {number}, is not JSON: {error}") from error
            found[one["key"]] = one
        return found

    @contextlib.contextmanager
    def appending(self) -> Iterator[Callable[[dict[str, Any]], None]]:
        """A function that appends a record and returns once it is on the disk. Raises `SweepError` where
        another process has the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise SweepError(f"{self.path} is being written by another sweep") from error
            file.seek(0)
            whole = file.read().rfind(b"\n") + 1
            file.truncate(whole)
            yield lambda one: _append(file, one)


def _append(file: IO[bytes], one: dict[str, Any]) -> None:
    file.write(json.dumps(one, sort_keys=True).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def run(
    points: Sequence[Point],
    work: Work,
    path: Path,
    *,
    executor: str = "processes",
    workers: int = 1,
    title: str = "sweep",
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Computes the points that `path` has no record of, and returns the records of all, in the order of
    `points`.

    **Arguments:** `work(point)`, a module's function, returns plain values; `executor` and `workers` as the
    module says.
    **Returns:** one record a point: `key`, `point`, `provenance` (of the process that computed it),
    `wall_seconds` and what `work` returned.
    **Raises:** `SweepError` once all are done, if any failed; `ArgumentError` for an unknown executor. Killed
    at any time, it loses the points in work only.
    """
    records = Records(path)
    known = records.read()
    pending = {key(point): point for point in points if key(point) not in known}
    failed: list[str] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console or Console(stderr=True)) as bar:
        task = bar.add_task(title, total=len(points), completed=len(points) - len(pending))
        if pending:
            with records.appending() as append, make_executor(executor, workers) as pool:
                futures = {pool.submit(_compute, work, point): k for k, point in pending.items()}
                try:
                    for future in cf.as_completed(futures):
                        k = futures[future]
                        try:
                            known[k] = {"key": k, "point": pending[k], **future.result()}
                            append(known[k])
                        except Exception as error:
                            failed.append(f"{pending[k]}: {type(error).__name__}: {error}")
                            bar.console.print(f"failed: {failed[-1]}", markup=False, highlight=False)
                        bar.advance(task)
                except BaseException:
                    for future in futures:
                        future.cancel()
                    raise
    if failed:
        raise SweepError(f"{len(failed)} of {len(points)} points failed; the first: {failed[0]}")
    return [known[key(point)] for point in points]


def _compute(work: Work, point: Point) -> dict[str, Any]:
    start = time.perf_counter()
    found = work(point)
    return {"provenance": record.provenance(), "wall_seconds": time.perf_counter() - start, **found}


@contextlib.contextmanager
def make_executor(name: str, workers: int = 1) -> Iterator[cf.Executor]:
    """The executor of that name, shut down at the end. Raises `ArgumentError`."""
    if workers < 1:
        raise ArgumentError(f"`workers={workers}` must be at least 1")
    if name.startswith("dask://"):
        with _dask(name.removeprefix("dask://")) as pool:
            yield pool
        return
    made: cf.Executor
    if name == "processes":
        # Each point in a process of its own: what one compiled and allocated does not stay for the next.
        spawn = multiprocessing.get_context("spawn")
        made = cf.ProcessPoolExecutor(workers, mp_context=spawn, max_tasks_per_child=1)
    elif name in ("threads", "serial"):
        made = cf.ThreadPoolExecutor(workers if name == "threads" else 1)
    else:
        module, _, attribute = name.partition(":")
        try:
            made = getattr(importlib.import_module(module), attribute)()
        except (ImportError, AttributeError, ValueError) as error:
            raise ArgumentError(
                f"`executor={name!r}` is none of processes, threads, serial, dask://HOST:PORT, MODULE:NAME: "
                f"{error}"
            ) from error
    with made:
        yield made


@contextlib.contextmanager
def _dask(address: str) -> Iterator[cf.Executor]:
    try:
        from distributed import Client
    except ImportError as error:
        raise ArgumentError('`executor="dask://..."` needs Dask: pip install "mwplan[dask]"') from error
    with Client(address) as client:
        # Timings are measured where points run: no result may be taken from another call's.
        yield client.get_executor(pure=False)


def parse(cls: type[T], doc: str | None, argv: Sequence[str] | None = None) -> T:
    """A `Config` from the command line: one option a field, flags for booleans, lists for tuples,
    defaults from the class."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        default = field.default
        name = f"--{field.name.replace('_', '-')}"
        if isinstance(default, bool):
            parser.add_argument(name, action="store_true", default=default)
        elif isinstance(default, tuple):
            parser.add_argument(name, nargs="+", type=type(default[0]), default=default)
        else:
            parser.add_argument(name, type=type(default), default=default)
    args = vars(parser.parse_args(argv))
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in args.items()})


def plain(config: Any) -> dict[str, Any]:
    """A `Config` as plain values, without where and how it ran."""
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in ("out", "executor", "workers")}
