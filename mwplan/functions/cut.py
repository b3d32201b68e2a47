"""`mw.cut`: a function as a chain of pieces, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from mwplan.common import trees
from mwplan.common.errors import ArgumentError
from mwplan.common.sizes import show_bytes
from mwplan.functions import cutting
from mwplan.functions.assembly import assemble
from mwplan.functions.checking import problems
from mwplan.functions.finding import find, runs
from mwplan.functions.flow import Flow, analyse
from mwplan.functions.piece_chain import PieceSpec, Plan
from mwplan.functions.programs import evaluate
from mwplan.functions.scans import expand, in_rows, stacked_by
from mwplan.functions.tracing import Constant, Traced, trace
from mwplan.network.chain import Chain

PyTree = Any
#: Pieces, if not said otherwise.
MOST = 128


@dataclass(frozen=True, kw_only=True, repr=False)
class Cut:
    """A function cut into pieces: `mw.cut`. Printed, it shows them.

    **Attributes:** `flow`, its operations; `plan`, what each piece takes and gives.

    >>> loss = lambda params, x: jnp.mean(jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]) ** 2)
    >>> params, x = {"a": jnp.eye(64), "b": jnp.eye(64)}, jnp.ones((256, 64))
    >>> chain, inputs, back = mw.cut(loss, params, x).build(params, x)
    >>> bool(jnp.allclose(chain(inputs)[0], loss(params, x)))
    True
    """

    flow: Flow
    plan: Plan

    def __len__(self) -> int:
        """The layers of the chain: of loops, each piece as often as it is executed."""
        return sum(piece.depth for piece in self.plan.pieces)

    def looped(self) -> Cut:
        """With pieces that repeat one after another as `mw.Stack`s, compiled once. Their parameters are then
        stacked within the step: a copy of them and of their gradients, `plan.copied_bytes`."""
        return replace(self, plan=self.plan.looped(self.flow.traced.avals))

    def checked(self, params: PyTree, *args: Any) -> Cut:
        """What is recognised, held against the function's own operations at these arguments (arrays): pieces
        whose layer gives another output or vjp, or whose vijp does not invert their vjp, are pieces as they
        are written. `reasons()` says why.

        **Cost:** a forward pass; of each kind of piece that is recognised a compilation of two vjps and a
        vijp."""
        if not any(piece.layers for piece in self.plan.pieces):
            return self
        chain, x, _ = self.build(params, *args)
        wrong = problems(self.plan, chain, x)
        return replace(self, plan=self.plan.without(wrong)) if wrong else self

    def cut_like(self, other: Cut) -> Cut:
        """Cut and recognised as `other` is, which is of the same function at arguments of other shapes.
        Raises `ArgumentError` where that does other operations."""
        if other is self or other.plan is self.plan:
            return self
        if [step.primitive for step in self.flow.steps] != [step.primitive for step in other.flow.steps]:
            raise ArgumentError(
                f"the function does {len(self.flow.steps)} operations for the whole arguments and "
                f"{len(other.flow.steps)} for one device's share of them, which must be the same to be "
                "planned: fit the loss of one device's share, and call `fitted.value_and_grad` within "
                "`jax.shard_map`"
            )
        if other.flow is self.flow:
            return other
        starts = [piece.start for piece in other.plan.pieces[1:]]
        plan = assemble(self.flow, starts, find(self.flow))
        wrong = {i: piece.why for i, piece in enumerate(other.plan.pieces) if not piece.layers}
        return replace(self, plan=plan.without(wrong))

    def reasons(self) -> list[str]:
        """Of each piece what it is recognised as, or what stood in the way."""
        return [
            f"{_layers(piece)}" if piece.layers else f"not recognised: {piece.why}"
            for piece in self.plan.pieces
        ]

    def build(
        self, params: PyTree, *args: Any
    ) -> tuple[Chain, tuple[Any, ...], Callable[[Chain, tuple[Any, ...]], PyTree]]:
        """The chain of pieces for these arguments (arrays, or shapes, of which it gives shapes), its input,
        and what takes gradients of both back to one of `params`.

        `chain(x)[0]` is the loss. A parameter that several pieces read is in each of them, or in the input.
        """
        signature = self.flow.traced.signature
        arrays = [trees.array_or_shape(leaf) for leaf in signature.arrays(params, args)]
        return self.build_flat(arrays, [], self.flow.traced.captured)

    def build_flat(
        self, params: Sequence[Any], data: Sequence[Any], captured: Sequence[Any]
    ) -> tuple[Chain, tuple[Any, ...], Callable[[Chain, tuple[Any, ...]], PyTree]]:
        """As `build`, of the dynamic leaves of `params` and of the other arguments, and the captured
        arrays."""
        if trees.only_shapes((params, data)):
            return self._shapes(list(params), list(data), list(captured))
        arrays = [*params, *data]
        order, sources = sorted(self.flow.differentiated), self.flow.traced.sources

        def leaves(diff: list[Any]) -> tuple[list[Any], list[Any]]:
            env = dict(enumerate([*arrays, *captured]))
            env.update(zip(order, diff))
            evaluate(self.flow.prologue, env, ())
            rows = stacked_by(self.flow.traced.regions).items()
            env.update({row: env[v] if v < sources else in_rows(env[v]) for row, v in rows})
            return self.plan.leaves(env)

        found, pull, rest = jax.vjp(leaves, [arrays[v] for v in order], has_aux=True)
        chain, x = self.plan.chain(found, rest)

        def back(chain_grads: Chain, x_grads: tuple[Any, ...]) -> PyTree:
            (grads,) = pull(self.plan.gradients(chain_grads, x_grads))
            return self._like_params(dict(zip(order, grads)), arrays)

        return chain, x, back

    def _shapes(
        self, *flat: list[Any]
    ) -> tuple[Chain, tuple[Any, ...], Callable[[Chain, tuple[Any, ...]], PyTree]]:
        """`build_flat` of shapes, which computes nothing."""

        def back(chain_grads: Chain, x_grads: tuple[Any, ...]) -> PyTree:
            def of(flat: Any, grads: Any) -> PyTree:
                return self.build_flat(*flat)[2](*grads)

            return jax.eval_shape(of, flat, (chain_grads, x_grads))

        chain, x = jax.eval_shape(lambda *flat: self.build_flat(*flat)[:2], *flat)
        return chain, x, back

    def _like_params(self, grads: dict[int, Any], arrays: Sequence[Any]) -> PyTree:
        """A tree like the parameters: zeros for arrays that the loss does not depend on, None for what has no
        gradient."""
        signature = self.flow.traced.signature
        leaves: list[Any] = [None] * signature.params
        for v, i in enumerate(signature.dynamic):
            if i < signature.params and trees.is_inexact(signature.avals[v]):
                leaves[i] = grads[v] if v in grads else jnp.zeros_like(arrays[v])
        return jax.tree.unflatten(signature.params_treedef, leaves)

    def value(self, y: tuple[Any, ...], arrays: Sequence[Any], captured: Sequence[Any]) -> tuple[Any, PyTree]:
        """`(loss, aux)` as the function returns them, from the chain's output and the arguments."""
        traced = self.flow.traced
        env = dict(enumerate([*arrays, *captured]))
        evaluate(self.flow.prologue, env, ())
        env.update(self.plan.results(y, traced.avals))
        out = [one.value if isinstance(one, Constant) else env[one] for one in traced.outputs]
        loss, aux = jax.tree.unflatten(traced.out_tree, out)
        return loss, aux

    def __repr__(self) -> str:
        return f"Cut({len(self)} pieces, {len(self.flow.steps)} operations)"

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """The pieces, one a line: what each is called, how many operations it has, the bytes that it makes,
        of its parameters, and that cross the cut after it; pieces that are the same program have the same
        letter. Below, why pieces are not known layers."""
        letters: dict[Any, str] = {}
        rows = [
            ("piece", "times", "program", "operations", "makes", "parameters", "crosses", "layer", "name")
        ]
        for i, piece in enumerate(self.plan.pieces):
            letter = letters.setdefault(piece.program, _letter(len(letters)))
            rows.append(
                (
                    str(i + 1),
                    str(piece.depth),
                    letter,
                    str(piece.stop - piece.start),
                    show_bytes(piece.made_bytes),
                    show_bytes(sum(trees.nbytes(self.flow.traced.avals[v]) for v in piece.params)),
                    show_bytes(sum(trees.nbytes(self.flow.traced.avals[v]) for v in piece.crosses)),
                    _layers(piece),
                    piece.label,
                )
            )
        widths = [max(len(row[j]) for row in rows) for j in range(len(rows[0]) - 1)]
        lines = ["  ".join([*(c.rjust(w) for c, w in zip(row, widths)), row[-1]]) for row in rows]
        pieces, operations = len(self.plan.pieces), len(self.flow.steps)
        loops = "" if pieces == len(self) else f" ({pieces} here, as loops repeat some)"
        head = f"{len(self)} pieces{loops} of {len(letters)} kinds, {operations} operations"
        whys: dict[str, dict[str, None]] = {}
        for piece in self.plan.pieces:
            if piece.why:
                whys.setdefault(piece.why, {})[letters[piece.program]] = None
        notes = [f"{', '.join(some)}: not recognised: {why}" for why, some in whys.items()]
        return "\n".join([head, *lines, *notes])


def cut(
    loss: Callable[..., Any],
    params: PyTree,
    *args: Any,
    has_aux: bool = False,
    keep_checkpoints: bool = False,
    most: int = MOST,
) -> Cut:
    """Cuts `loss(params, *args)` into a chain of pieces, where little is alive.

    **Arguments:** as `mw.fit_function`; arrays or `jax.ShapeDtypeStruct`s; `keep_checkpoints`, whether what
    stands in a `jax.checkpoint` stays one operation, with its policy; `most`, pieces.
    **Returns:** a `Cut`: `print` shows the pieces.
    **Raises:** `ArgumentError` for a loss that is not a real scalar or does not depend on `params`, for side
    effects, where Python branches on values, and where there is no place to cut.

    >>> loss = lambda params, x: jnp.mean(jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]) ** 2)
    >>> params, x = {"a": jnp.eye(64), "b": jnp.eye(64)}, jnp.ones((256, 64))
    >>> pieces = mw.cut(loss, params, x)
    >>> len(pieces) >= 1
    True
    """
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise ArgumentError(f"`most={most!r}` must be a number of pieces, at least 1")
    traced = trace(loss, params, args, has_aux=has_aux, keep_checkpoints=keep_checkpoints)
    return cut_traced(expand(traced, keep_checkpoints=keep_checkpoints), most)


def cut_traced(traced: Traced, most: int) -> Cut:
    """As `cut`, of a function that is traced already."""
    flow = analyse(traced)
    found = find(flow)
    return Cut(flow=flow, plan=assemble(flow, cutting.cuts(flow, most, runs(flow, found)), found))


def _layers(piece: PieceSpec) -> str:
    """The layers that a piece is known to be."""
    return " ".join(type(one.layer).__name__ for one in piece.layers) or "-"


def _letter(i: int) -> str:
    text = ""
    i += 1
    while i:
        i, digit = divmod(i - 1, 26)
        text = chr(ord("A") + digit) + text
    return text
