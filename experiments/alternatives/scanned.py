"""Scans over repeated blocks: plain, checkpointed, in segments, and Equinox's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax

import mwplan as mw
from experiments.alternatives.problem import (
    Candidate,
    NotApplicableError,
    Problem,
    through,
)
from mwplan.common import trees
from mwplan.common.errors import InfeasibleError

Scan = Callable[[Callable[[Any, Any], Any], Any, Any, int], Any]


def _scanned(name: str, problem: Problem, scan: Scan, key: Any = None) -> Candidate:
    """`scan(block, x, stacked blocks, count)` over each stretch of repeated blocks, other layers in
    between."""
    if not any(isinstance(part, mw.Stack) for part in problem.flat.parts):
        raise NotApplicableError("no block of this chain repeats")

    def network(chain: mw.Chain, x: Any) -> Any:
        for part in chain.parts:
            if isinstance(part, mw.Stack):
                x = scan(lambda x, block: through(block, x), x, part.block, part.depth)
            else:
                x = part(x)
        return x

    return Candidate(network, problem.flat, None, (name, key), loops=True)


def _scan(block: Callable[[Any, Any], Any], x: Any, stacked: Any) -> Any:
    return jax.lax.scan(lambda x, one: (block(x, one), None), x, stacked)[0]


def backprop_scan(problem: Problem, budget: int | None) -> Candidate:
    """Plain backpropagation through a scan."""
    return _scanned("backprop_scan", problem, lambda block, x, stacked, count: _scan(block, x, stacked))


def checkpoint_scan(problem: Problem, budget: int | None) -> Candidate:
    """A scan whose body is `jax.checkpoint`ed."""

    def scan(block: Callable[[Any, Any], Any], x: Any, stacked: Any, count: int) -> Any:
        return _scan(jax.checkpoint(block), x, stacked)

    return _scanned("checkpoint_scan", problem, scan)


def chen_scan(problem: Problem, budget: int | None) -> Candidate:
    """A scan over checkpointed segments, each a scan over about sqrt(count) blocks; what is left over is
    stored."""

    def scan(block: Callable[[Any, Any], Any], x: Any, stacked: Any, count: int) -> Any:
        size = max(1, round(math.sqrt(count)))
        whole = (count - 1) // size  # the last segment is stored
        segments = jax.tree.map(
            lambda leaf: leaf[: whole * size].reshape(whole, size, *leaf.shape[1:]), stacked
        )
        x = _scan(jax.checkpoint(lambda x, segment: _scan(block, x, segment)), x, segments)
        return _scan(block, x, jax.tree.map(lambda leaf: leaf[whole * size :], stacked))

    return _scanned("chen_scan", problem, scan)


def equinox(problem: Problem, budget: int | None) -> Candidate:
    """Equinox's checkpointed scan; as many checkpoints as the budget has room for, its own choice without a
    budget."""
    try:
        import equinox.internal as eqxi
    except ImportError as error:
        raise NotApplicableError('needs Equinox: pip install "mwplan[equinox]"') from error
    carried, longest, x = 0, 0, trees.struct(problem.x)
    for part in problem.flat.parts:
        if isinstance(part, mw.Stack):
            carried, longest = carried + trees.nbytes(x), max(longest, part.depth)
        x = jax.eval_shape(part, x)
    checkpoints = None
    if budget is not None:
        room = budget - problem.fixed_bytes
        checkpoints = room // max(1, carried)
        if checkpoints < 1:
            raise InfeasibleError("not one checkpoint fits", budget_bytes=budget)

    def scan(block: Callable[[Any, Any], Any], x: Any, stacked: Any, count: int) -> Any:
        def body(x: Any, one: Any) -> tuple[Any, None]:
            return block(x, one), None

        use = None if checkpoints is None else min(checkpoints, count)
        return eqxi.scan(body, x, stacked, kind="checkpointed", checkpoints=use)[0]

    return _scanned("equinox", problem, scan, None if checkpoints is None else min(checkpoints, longest))
