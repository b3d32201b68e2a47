"""The layers of a chain one after another, and which of them are looked at."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax

from mwplan.network.chain import Chain, Stack, layer_name, one_block
from mwplan.profiling import alike
from mwplan.profiling.carrying import Carrying

PyTree = Any
CHECKED_REPETITIONS = 64  # of a deeper stack, only the repetitions whose growth is measured are checked
# layers of one signature whose errors are measured; the largest count for all (inverses' growth:
# `growth.steady`)
GROWTH_SAMPLES = 8


def block_of(part: Any) -> tuple[Any, ...]:
    """The layers that a part of a chain repeats."""
    return part.block if isinstance(part, Stack) else (part,)


def depth_of(part: Any) -> int:
    """How often it repeats them."""
    return part.depth if isinstance(part, Stack) else 1


def layer_names(chain: Chain) -> list[str]:
    """What each layer is called in tables."""
    return [layer_name(one) for part in chain.parts for one in block_of(part) * depth_of(part)]


def layer_keys(chain: Chain, structs: list[PyTree], shared: Carrying) -> list[tuple[Any, ...]]:
    """What layers that share one measurement share: structure and parameter shapes, or their program
    (`alike`), input, whether stacked, and what their boundaries share."""
    ones = [
        one
        for part in chain.parts
        for one in (one_block(part) if isinstance(part, Stack) else (part,)) * depth_of(part)
    ]
    texts = [str(struct) for struct in structs]
    stacked = [isinstance(chain.parts[place.part], Stack) for place in chain.places()]
    places = [shared.place(i) for i in range(len(ones))]
    return list(zip(alike.structures(ones, structs), texts, stacked, places))


def visit(
    chain: Chain, x: PyTree, sampled: set[int], forward: Callable[[int, PyTree, PyTree], PyTree] | None
) -> Iterator[tuple[int, Any, PyTree]]:
    """`(index, layer, input)` of every layer; of a deep stack only the repetitions where a layer is sampled.

    `forward(index, layer, x)` is the layer's output; None: inputs are not wanted, and not computed.
    """
    i = 0
    for part in chain.parts:
        block, depth = block_of(part), depth_of(part)
        at = 0  # the repetition that x is the input of
        chosen = {(k - i) // len(block) for k in sampled if i <= k < i + len(block) * depth}
        for n in range(depth) if depth <= CHECKED_REPETITIONS else sorted(chosen):
            if forward is not None and at < n:
                x = _through(part, x, at, n)
            for j in range(len(block)):
                one = part.layer(n, j) if isinstance(part, Stack) else part
                here = i + n * len(block) + j
                yield here, one, x
                x = x if forward is None else forward(here, one, x)
            at = n + 1
        if forward is not None and at < depth:
            x = _through(part, x, at, depth)
        i += len(block) * depth


@jax.jit
def _through(part: Stack, x: PyTree, start: int, stop: int) -> PyTree:
    """`x` after the repetitions `start .. stop - 1`."""

    def step(n: Any, x: PyTree) -> PyTree:
        return functools.reduce(lambda x, j: part.layer(n, j)(x), range(len(part.block)), x)

    return jax.lax.fori_loop(start, stop, step, x)


def spread(keys: Sequence[Hashable], count: int) -> set[int]:
    """Up to `count` positions of each key, evenly spread, the first and the last among them."""
    positions: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        positions.setdefault(key, []).append(i)
    chosen: set[int] = set()
    for where in positions.values():
        n = min(count, len(where))
        chosen.update(where[round(k * (len(where) - 1) / max(1, n - 1))] for k in range(n))
    return chosen


def first_layers(chain: Chain, keys: Sequence[Hashable]) -> list[tuple[int, Any]]:
    """The first layer of each key, with its position."""
    wanted: dict[Hashable, int] = {}
    for i, key in enumerate(keys):
        wanted.setdefault(key, i)
    found, i = [], 0
    for part in chain.parts:
        block, depth = block_of(part), depth_of(part)
        for at in wanted.values():
            if i <= at < i + len(block) * depth:
                n, j = divmod(at - i, len(block))
                if not isinstance(part, Stack):
                    found.append((at, part))
                elif any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(part)):
                    found.append((at, one_block(part)[j]))
                else:
                    found.append((at, part.layer(n, j)))
        i += len(block) * depth
    return found
