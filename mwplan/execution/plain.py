"""A schedule as JAX itself differentiates it: plain backpropagation, `jax.checkpoint` on single layers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax

from mwplan.common.errors import ArgumentError
from mwplan.network.chain import Chain, Stack
from mwplan.plans.schedule import RunKind, Schedule

PyTree = Any


def check(schedule: Schedule) -> None:
    """Raises `ArgumentError` unless every run stores its layer, or recomputes one."""
    for run in schedule.runs:
        alone = run.kind is RunKind.RECOMPUTE and run.stop == run.start + 1
        if run.kind is not RunKind.STORE and not alone:
            raise ArgumentError(
                f"`arrangement` is plain JAX, and `schedule` has a {run.kind.name} run over layers "
                f"{run.start + 1} to {run.stop}: give one that stores layers or recomputes them one by one"
            )


def apply(schedule: Schedule, chain: Chain, x: PyTree) -> PyTree:
    """`chain(x)`, with `jax.checkpoint` on the layers that `schedule` recomputes. What JAX keeps of the
    others it decides itself: STORE options are not looked at."""
    again = [run.kind is RunKind.RECOMPUTE for run in schedule.runs]
    at = 0
    for part in chain.parts:
        if not isinstance(part, Stack):
            x = _through([part], again[at : at + 1], x)
            at += 1
            continue
        size = len(part.block)
        flags = [tuple(again[at + n * size : at + (n + 1) * size]) for n in range(part.depth)]
        if len(set(flags)) == 1:

            def step(x: PyTree, block: Any, flags: Sequence[bool] = flags[0]) -> tuple[PyTree, None]:
                return _through(block, flags, x), None

            x, _ = jax.lax.scan(step, x, part.block, length=part.depth)
        else:
            x = _through(part.unstacked(), again[at : at + len(part)], x)
        at += len(part)
    return x


def _through(layers: Sequence[Any], again: Sequence[bool], x: PyTree) -> PyTree:
    def call(one: Any, x: PyTree) -> PyTree:
        return one(x)

    checkpointed = jax.checkpoint(call)
    pairs = zip(layers, again, strict=True)
    return functools.reduce(lambda x, pair: (checkpointed if pair[1] else call)(pair[0], x), pairs, x)
