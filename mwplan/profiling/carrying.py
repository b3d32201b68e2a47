"""What boundaries share: arrays that layers hand on as they are, counted once for the whole chain or at each
boundary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from mwplan.common import trees
from mwplan.network.carried import Carried, Root, dropped, wanted
from mwplan.network.chain import Chain
from mwplan.network.rules import StoreRule

PyTree = Any


@dataclass(frozen=True)
class Boundary:
    """One position: which leaves of the activation are `fixed`, no bytes of this boundary, and which of these
    have an `idle` cotangent (`mwplan.network.carried`)."""

    fixed: frozenset[int] = frozenset()
    idle: frozenset[int] = frozenset()

    def new(self, x: PyTree) -> list[Any]:
        """The leaves that count here."""
        return [leaf for k, leaf in enumerate(jax.tree.leaves(x)) if k not in self.fixed]

    def shared_bytes(self, x: PyTree, *, idle: bool) -> int:
        """Bytes of the cotangents that do not count here, the idle ones among them or not."""
        leaves = jax.tree.leaves(x)
        counted = [leaves[k] for k in self.fixed if idle or k not in self.idle]
        return trees.nbytes([leaf for leaf in counted if trees.is_inexact(leaf)])

    def dropped(self, ct: PyTree) -> PyTree:
        """A cotangent without what is idle."""
        return dropped(ct, self.idle)


@dataclass(frozen=True)
class Place:
    """The boundaries before and after a layer."""

    before: Boundary = Boundary()
    after: Boundary = Boundary()

    def store(self, rule: StoreRule, x: PyTree, y: PyTree) -> StoreRule:
        """`rule` for cotangents without what is idle."""
        return wanted(rule, self.before.idle, self.after.idle, x, y)

    def text(self) -> str:
        """What tells places apart."""
        both = (self.before, self.after)
        return repr([(sorted(one.fixed), sorted(one.idle)) for one in both])

    def cotangents_apart(self, x: PyTree, y: PyTree, *, idle: bool) -> int:
        """Bytes of the cotangents of input and output that count for the whole chain, less what counts
        there; `idle`, whether those that do not count there are made all the same."""
        both = self.before.shared_bytes(x, idle=idle), self.after.shared_bytes(y, idle=idle)
        once = max(self.before.shared_bytes(x, idle=False), self.after.shared_bytes(y, idle=False))
        return max(0, sum(both) - once)


@dataclass(frozen=True)
class Carrying:
    """The boundaries of a chain, and the bytes of all that is fixed: arrays that are no part of the chain's
    input, and their cotangents. (Those of the input are added up where the step's output will be.)"""

    carried: Carried
    boundaries: tuple[Boundary, ...]
    fixed_bytes: int

    def place(self, layer: int) -> Place:
        """That of a layer, from 0 on."""
        return Place(self.boundaries[layer], self.boundaries[layer + 1])


def carrying(chain: Chain, structs: Sequence[PyTree], *, wrt_input: bool) -> Carrying:
    """Which leaves to count once.

    What is handed on from the input is there anyway. What a layer makes and later ones hand on counts once,
    as alive all the time, or at each boundary that it passes, which is less where it passes few and a plan
    keeps few boundaries. Chosen is the least length of those that count once under which recomputation in
    equal stretches, the boundaries between them and those within one kept, would take least:
    $b + 2 \\sqrt{\\sum_i a_i \\max_i a_i}$, with $b$ what counts once and $a_i$ what counts at position $i$.
    """
    carried = Carried.along(chain, structs, wrt_input=wrt_input)
    sizes: dict[Root, int] = {}
    last: dict[Root, int] = {}
    for i, roots in enumerate(carried.roots):
        for root, leaf in zip(roots, jax.tree.leaves(structs[i]), strict=True):
            sizes[root], last[root] = trees.nbytes(leaf), i
    length = {root: stop - root[0] for root, stop in last.items() if stop > root[0]}
    made = {root: n for root, n in length.items() if root[0] > 0}
    always = {
        root: sizes[root] * (1 + trees.is_inexact(jax.tree.leaves(structs[root[0]])[root[1]]))
        for root in made
    }  # with its cotangent

    def least(once: int) -> float:
        fixed = {root for root in length if root not in made or made[root] >= once}
        counted = [sum(sizes[root] for root in {*roots} - fixed) for roots in carried.roots[1:]]
        taken = sum(always[root] for root in fixed if root in made)
        return taken + 2 * math.sqrt(sum(counted) * max(counted))

    once = min([*sorted({*made.values()}), len(structs)], key=least) if made else 0
    fixed = {root for root in length if root not in made or made[root] >= once}
    boundaries = tuple(
        Boundary(frozenset(k for k, root in enumerate(roots) if root in fixed), idle)
        for roots, idle in zip(carried.roots, carried.idle)
    )
    taken = sum(bytes_ for root, bytes_ in always.items() if root in fixed)
    return Carrying(carried, boundaries, taken)
