"""Plain functions of an unrolled chain: backpropagation, and `jax.checkpoint` by hand."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import jax

import mwplan as mw
from experiments.alternatives.problem import (
    Candidate,
    Problem,
    flat,
    through,
)

checkpointed = jax.checkpoint(through)


def backprop(problem: Problem, budget: int | None) -> Candidate:
    """Plain backpropagation."""
    return Candidate(lambda chain, x: chain(x), problem.chain, None, "backprop")


def checkpoint_each(problem: Problem, budget: int | None) -> Candidate:
    """`jax.checkpoint` around every layer."""

    def network(chain: mw.Chain, x: Any) -> Any:
        return functools.reduce(lambda value, one: checkpointed([one], value), flat(chain), x)

    return Candidate(network, problem.chain, None, "checkpoint_each")


def chen(problem: Problem, budget: int | None) -> Candidate:
    """About sqrt(L) segments of equal length over the innermost layers; all but the last recomputed."""

    def network(chain: mw.Chain, x: Any) -> Any:
        layers = flat(chain)
        count = max(1, round(math.sqrt(len(layers))))
        cuts = [round(k * len(layers) / count) for k in range(count + 1)]
        for start, stop in itertools.pairwise(cuts[:-1]):
            x = checkpointed(layers[start:stop], x)
        return through(layers[cuts[-2] :], x)

    return Candidate(network, problem.chain, None, "chen")
