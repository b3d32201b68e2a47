"""The chain of a function's pieces: which leaves each holds, which of them are looped, and gradients back
again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from mwplan.common import trees
from mwplan.execution.repeats import LEAST_REPETITIONS
from mwplan.functions.known import Known
from mwplan.functions.pieces import PLAIN, STOPPED, Label, Piece, given_out, taken
from mwplan.functions.programs import Program
from mwplan.functions.recognition import Found
from mwplan.layers.sequential import Sequential
from mwplan.network.chain import Chain, Stack, repeats

#: The most pieces that are looked for as a block which repeats.
LONGEST_BLOCK = 8


@dataclass(frozen=True, slots=True)
class Group:
    """Consecutive pieces: `count` times the same `period` pieces from `start` on. `depth`, the repetitions of
    the function's own loop that they stand in, or 1."""

    start: int
    period: int
    count: int = 1
    depth: int = 1


@dataclass(frozen=True, kw_only=True)
class PieceSpec:
    """One piece, in the numbers of the function's values.

    `start`, `stop`, its operations in the flow; `reads`, `params`, `others`, the values of its program's
    inputs; `results`, those of its program's results; `crosses`, the values of the next activation, in order;
    `made_bytes`, of all that its operations make; `layers`, those that it is, one after another, their
    weights in the numbers of its program, or `why` it is none."""

    start: int
    stop: int
    program: Program
    reads: tuple[int, ...]
    params: tuple[int, ...]
    others: tuple[int, ...]
    results: tuple[int, ...]
    crosses: tuple[int, ...]
    made_bytes: int
    label: str
    region: int
    depth: int
    layers: tuple[Found, ...] = ()
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All pieces; `inputs`, the values of the chain's input; `how` each value that crosses a cut or that a
    piece holds is held; `carrying`, those with a gradient; `groups`, the parts of the chain."""

    pieces: tuple[PieceSpec, ...]
    inputs: tuple[int, ...]
    how: dict[int, str]
    carrying: frozenset[int]
    groups: tuple[Group, ...]

    @property
    def shares(self) -> bool:
        """Whether parameters are in the chain's input."""
        return not self.carrying.isdisjoint(self.inputs)

    def before(self, i: int) -> tuple[int, ...]:
        """The values of the activation that a piece takes."""
        return self.pieces[i - 1].crosses if i else self.inputs

    def labels(self) -> list[str]:
        """What each layer of the chain is called."""
        return [
            self.pieces[i].label
            for group in self.groups
            for _ in range(group.depth)
            for i in range(group.start, group.start + group.period * group.count)
        ]

    def looped(self, avals: Sequence[Any]) -> Plan:
        """With pieces that repeat one after another in loops, whose parameters are stacked: a copy of them,
        and of their gradients."""
        groups: list[Group] = []
        keys: list[Any] = []
        for group in self.groups:
            alone = group.depth == group.count == group.period == 1
            types = tuple(str(avals[v]) for v in self.before(group.start))
            keys.append((self._structure(group.start), types) if alone else object())
        for start, period, count in repeats(keys, LONGEST_BLOCK):
            at = self.groups[start].start
            if count >= LEAST_REPETITIONS:
                groups.append(Group(at, period, count))
            else:
                groups += self.groups[start : start + period * count]
        return Plan(
            pieces=self.pieces, inputs=self.inputs, how=self.how, carrying=self.carrying, groups=tuple(groups)
        )

    def copied_bytes(self, avals: Sequence[Any]) -> int:
        """Bytes of the parameters that loops hold copies of."""
        values = [
            v
            for group in self.groups
            if group.count > 1
            for piece in self.pieces[group.start : group.start + group.period * group.count]
            for v in piece.params
        ]
        return sum(trees.nbytes(avals[v]) for v in values)

    def without(self, wrong: dict[int, str]) -> Plan:
        """With these pieces as they are written, and the reasons."""
        pieces = tuple(
            replace(piece, layers=(), why=wrong[i]) if i in wrong else piece
            for i, piece in enumerate(self.pieces)
        )
        first = {v: STOPPED for v in self.inputs if 0 in wrong and self._is_data(v)}
        return replace(self, pieces=pieces, how={**self.how, **first})

    def _is_data(self, v: int) -> bool:
        """Whether a value of the input is data that the first piece alone takes, as a layer's input."""
        layers = self.pieces[0].layers
        return bool(layers) and v in layers[0].inputs and v not in self.carrying

    def _slots(self, field: str) -> list[tuple[int, ...]]:
        """The values of each leaf of the chain's layers, in order: one, or one for each repetition of a
        loop."""
        out = []
        for group in self.groups:
            for j in range(group.period):
                turns = [self.pieces[group.start + r * group.period + j] for r in range(group.count)]
                out += list(zip(*(getattr(piece, field) for piece in turns), strict=True))
        return out

    def leaves(self, env: dict[int, Any]) -> tuple[list[Any], list[Any]]:
        """The arrays that carry a gradient: each layer's parameters, then those of the input; and the others,
        in the same order."""

        def joined(values: tuple[int, ...]) -> Any:
            found = [given_out(env[v], self.how.get(v, "plain")) for v in values]
            return jnp.stack(found) if len(found) > 1 else found[0]

        carry = [joined(slot) for slot in self._slots("params")]
        carry += [env[v] for v in self.inputs if v in self.carrying]
        rest = [joined(slot) for slot in self._slots("others")]
        rest += [given_out(env[v], self.how[v]) for v in self.inputs if v not in self.carrying]
        return carry, rest

    def chain(self, carry: list[Any], rest: list[Any]) -> tuple[Chain, tuple[Any, ...]]:
        """The chain and its input, of what `leaves` returned."""
        one, other = iter(carry), iter(rest)
        parts: list[Any] = []
        for group in self.groups:
            block = []
            for i in range(group.start, group.start + group.period):
                params = tuple(next(one) for _ in self.pieces[i].params)
                others = tuple(next(other) for _ in self.pieces[i].others)
                program, reads, held, returns, known = self._structure(i)
                label, why = Label(self.pieces[i].label), Label(self.pieces[i].why)
                block.append(Piece(params, others, program, reads, held, returns, label, known, why))
            depth = group.count * group.depth
            parts += (
                block
                if depth == 1 and not self.pieces[group.start].region >= 0
                else [Stack(tuple(block), depth)]
            )
        # Not checked: what pieces share is one parameter, whose gradients are added up.
        chain = Chain.tree_unflatten(None, parts)
        return chain, tuple(next(one if v in self.carrying else other) for v in self.inputs)

    def _structure(self, i: int) -> tuple[Any, ...]:
        """What a piece is beside its arrays: `Piece`'s `program`, `reads`, `held`, `returns`, `known`."""
        piece = self.pieces[i]
        place = {v: k for k, v in enumerate(self.before(i))}
        made = {v: j for j, v in enumerate(piece.results)}
        return (
            piece.program,
            tuple((place[v], self.how[v]) for v in piece.reads),
            tuple(self.how[v] for v in piece.others),
            tuple((self.how[v], made[v]) if v in made else ("x", place[v]) for v in piece.crosses),
            self._known(i, place),
        )

    def _known(self, i: int, place: dict[int, int]) -> Known | None:
        """The layer that a piece is."""
        piece = self.pieces[i]
        if not piece.layers or any(self.how[v] != PLAIN for v in piece.layers[0].inputs):
            return None
        layers = [one.layer for one in piece.layers]
        leaves, treedef = jax.tree.flatten(layers[0] if len(layers) == 1 else Sequential(tuple(layers)))
        results = piece.layers[-1].results
        return Known(
            treedef,
            tuple(leaves),
            tuple(place[v] for v in piece.layers[0].inputs),
            tuple(piece.crosses.index(v) for v in results),
            tuple(-1 if v in results else place[v] for v in piece.crosses),
        )

    def gradients(self, chain_grads: Chain, x_grads: Sequence[Any]) -> list[Any]:
        """Of the first that `leaves` returned, in order."""
        layers = [
            one for part in chain_grads.parts for one in (part.block if isinstance(part, Stack) else [part])
        ]
        found = [grad for layer in layers for grad in layer.params]
        return found + [g for v, g in zip(self.inputs, x_grads) if v in self.carrying]

    def results(self, y: Sequence[Any], avals: Sequence[Any]) -> dict[int, Any]:
        """The function's results by number, from the chain's output."""
        return {v: taken(leaf, self.how[v], avals[v]) for v, leaf in zip(self.pieces[-1].crosses, y)}
