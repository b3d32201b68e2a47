"""Gradients consumed as they come: each layer is updated inside the backward sweep, so that the gradients of
all never live together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from mwplan.common import trees
from mwplan.common.errors import ArgumentError
from mwplan.compilers.compiling import warn_if_undone
from mwplan.execution import loops
from mwplan.execution.execute import (
    Report,
    check_loss,
    check_match,
    checked_scalar,
    checked_schedule,
    cotangent,
    warn_if_grown,
)
from mwplan.execution.gradients import Finder, Gradients
from mwplan.execution.interpreter import Interpreter
from mwplan.execution.view import View
from mwplan.network import residuals, sharding
from mwplan.network.carried import Carried
from mwplan.network.chain import Chain, Stack, boundaries, check_chain
from mwplan.plans.schedule import Schedule, reporting_runs

PyTree = Any


@runtime_checkable
class Optimizer(Protocol):
    """What is asked of an optimizer: the two functions of an `optax.GradientTransformation`."""

    @property
    def init(self) -> Callable[[PyTree], PyTree]:
        """Parameters to a state."""

    @property
    def update(self) -> Callable[..., tuple[PyTree, PyTree]]:
        """`(gradients, state, parameters)` to `(what to add to the parameters, new state)`."""


def init_states(optimizer: Optimizer, chain: Chain) -> tuple[PyTree, ...]:
    """The optimizer's states for `value_and_update`, one for each layer.

    **Arguments:** `optimizer`, such as `optax.adam(1e-3)`; `chain`.
    **Returns:** a tuple with an entry for each of `chain.parts`: a layer's is `optimizer.init(layer)`, where
    None stands for leaves that are not parameters; a stack's is a tuple with one entry for each layer of its
    block, whose leaves have the stack's leading axis.
    **Raises:** `ChainError`; `ArgumentError` for what is no optimizer.

    >>> import optax
    >>> net = mw.Chain([mw.layers.Dense.init(jax.random.key(0), 8, 8), jnp.tanh])
    >>> len(mw.init_states(optax.adam(1e-3), net))
    2
    """
    check_chain(chain)
    _check_optimizer(optimizer)
    states: list[PyTree] = []
    first = 0
    for part in chain.parts:
        if isinstance(part, Stack):
            # One state a repetition, step counts and all; `axis_size` for what has no parameters.
            init = jax.vmap(optimizer.init, axis_size=part.depth)
            made = [init(_parameters_only(one)) for one in part.block]
            places = [first + k + len(made) * jnp.arange(part.depth) for k in range(len(made))]
            states.append(tuple(_apart(state, at) for state, at in zip(made, places)))
        else:
            states.append(_apart(optimizer.init(_parameters_only(part)), jnp.asarray(first)))
        first += len(part) if isinstance(part, Stack) else 1
    # Arrays of their own, so that all may be donated: a state may hold one array twice, or a parameter
    # itself.
    copies: tuple[PyTree, ...] = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tuple(states))
    return copies


def state_bytes(optimizer: Optimizer, tree: PyTree) -> int:
    """Bytes of `optimizer.init(parameters of tree)` on one device; `tree` may be shapes. Of parameters on a
    mesh the state is taken to lie as they do. Nothing is computed. Raises `ArgumentError` for what is no
    optimizer."""
    _check_optimizer(optimizer)
    shards = [trees.struct_of(leaf, sharding.shard_shape(leaf)) for leaf in trees.parameters(tree)]
    return trees.nbytes(jax.eval_shape(optimizer.init, trees.only_parameters(tree, shards)))


def _apart(state: PyTree, places: jax.Array) -> PyTree:
    """A layer's state, or those of a stack's repetitions, with random keys of its own: all begin with the
    same."""

    def one(leaf: Any) -> Any:
        fold: Any = jax.random.fold_in
        for _ in range(places.ndim):
            fold = jax.vmap(fold)
        return fold(leaf, places) if trees.is_key(leaf) and leaf.ndim == places.ndim else leaf

    return jax.tree.map(one, state)


def value_and_update(
    loss: Callable[..., Any], schedule: Schedule, optimizer: Optimizer, *, has_aux: bool = False
) -> Callable[..., tuple[tuple[Any, Report], Chain, tuple[PyTree, ...]]]:
    """A function that takes a whole training step: each layer is updated as soon as its gradient exists,
    which is then gone.

    The gradients of all layers never live together, stacked or not. (Of layers that are not stacked XLA may
    do as much by itself, where the optimizer follows `value_and_grad` in the same program; here it is tied,
    and so can be planned for.) With the chain and the states donated, a step needs parameters, states and
    input, temporaries, and the largest layer's gradient; `Profile.consuming_gradients` tells the planner so.

    **Arguments:** `loss(y, *args)`, `schedule`, `has_aux`, as `value_and_grad`; `optimizer`, an
    `optax.GradientTransformation` that treats layers by themselves: elementwise ones (`sgd`, `adam`, `adamw`,
    schedules and masks), or ones with a norm for each parameter. Each repetition of a stack counts as a
    layer. It must not need all gradients at once, as `clip_by_global_norm` does.
    **Returns:** `f(chain, states, x, *args) -> ((value, report), chain, states)`: new parameters, as
    `optax.apply_updates` makes them, and new states. Not differentiable.
    **Raises:** `ArgumentError` for an optimizer that mixes layers, for states of another structure, for a
    loss that is not scalar, and where called within a `jax.shard_map` that tracks what varies; as `apply`. On
    a mesh let `jax.jit` place the computation (`jax.NamedSharding`), or use `check_vma=False` and average in
    the optimizer: `optax.chain(optax.stateless(lambda g, p: jax.lax.pmean(g, "data")), optax.adam(1e-3))`.
    **Cost:** as the schedule, and the optimizer's update.

    >>> import optax
    >>> net, x = mw.Chain([mw.layers.Dense.init(jax.random.key(0), 8, 8), jnp.tanh]), jnp.ones((4, 8))
    >>> optimizer = optax.sgd(0.01)
    >>> schedule = mw.plan(mw.estimate(net, x, device="h100"), budget="1MiB")
    >>> update = mw.value_and_update(lambda y: jnp.sum(y**2), schedule, optimizer)
    >>> step = mw.jit(update, donate_argnums=(0, 1))
    >>> (value, report), net, states = step(net, mw.init_states(optimizer, net), x)
    >>> bool(jnp.sum(net(x) ** 2) < value)
    True
    """
    check_loss(loss)
    _check_optimizer(optimizer)
    runs = reporting_runs(checked_schedule(schedule).runs)

    def step(chain: Chain, states: Any, x: PyTree, *args: Any) -> tuple[tuple[Any, Report], Chain, Any]:
        check_match(schedule, chain)
        warn_if_undone(x, chain)
        warn_if_grown(schedule, x)
        _check_states(optimizer, chain, states)
        _check_separate(optimizer, chain)
        if axes := trees.varying_axes((chain, states, x)):
            raise ArgumentError(
                f"`value_and_update` was called within a `jax.shard_map` over {sorted(axes)} that tracks "
                "which values vary: the update "
                "is tied to activations that do, so that new weights would count as varying. Use `jax.jit` "
                "with `jax.NamedSharding`, "
                "or `check_vma=False` and an optimizer that averages the gradients"
            )
        if sharding.explicit_mesh((chain, states, x)) is not None:
            raise ArgumentError(
                "`value_and_update` was called with arrays on a mesh of explicit axes: make it with "
                "`jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto, ...))`"
            )
        updates = Updates(chain, states, optimizer)
        view = View(chain, chain.places())
        structs = boundaries(chain, x)
        carried = Carried.along(chain, structs, wrt_input=False)
        interpreter = Interpreter(view, structs, updates, check=True, carried=carried)
        interpreter.claim(0, x)
        interpreter.claim(0)
        kept = interpreter.forward(schedule.runs, 0)
        y = interpreter.x[len(chain)]
        interpreter.release(len(chain))

        def total(params: list[Any]) -> tuple[Any, Any]:
            value = loss(trees.with_parameters(y, params), *args)
            return checked_scalar(value, has_aux), value

        (_, value), grads = jax.value_and_grad(total, has_aux=True)(trees.parameters(y))
        box = [carried.dropped(cotangent(y, grads), len(chain))]
        interpreter.backward(schedule.runs, kept, box, 0)
        residuals.forget()
        found = interpreter.reported([(run.start, run.stop) for run in runs])
        return (value, Report.of(schedule, found)), *updates.result()

    return step


class Updates(Gradients):
    """Takes the place of gradients: new parameters and states by part of the chain, in the old ones' place.

    A layer is never read again once its gradient has come: runs are walked from right to left, the M sweep of
    one does not return, and a recomputation ends left of what was handled. So a stack's layers are read from
    where new ones are written, and need no copy.

    `parts`: of a layer `(parameters, state)` once it is updated, else None; of a stack one such pair for each
    layer of its block.
    """

    performs = True

    def __init__(
        self, chain: Chain, states: Sequence[PyTree], optimizer: Optimizer, parts: list[Any] | None = None
    ) -> None:
        super().__init__(chain, parts)
        self.states = states
        self.optimizer = optimizer

    def within(self, part: int, buffers: Any) -> Updates:
        """Those of one repetition, of which `buffers` holds the stack as it is now."""
        parts = list(self.parts)
        if buffers is not None:
            parts[part] = buffers
        return Updates(self.chain, self.states, self.optimizer, parts)

    def stacked(self, part: int) -> list[Any]:
        """Parameters and states of a stack, as they are now."""
        if self.parts[part] is None:
            block = self.chain.parts[part].block
            self.parts[part] = [
                (trees.parameters(one), state) for one, state in zip(block, self.states[part])
            ]
        found: list[Any] = self.parts[part]
        return found

    def source(self, view: View, position: int) -> tuple[PyTree, Any]:
        """What the layer is read from, as it is now."""
        source, row = view.source(position)
        if row is None:
            return source, row
        place = view.place(position)
        params, _ = self.stacked(place.part)[place.phase]
        return trees.with_parameters(source, params), row

    def found(self, finder: Finder, position: int, depth: int, grads: list[Any], later: PyTree) -> PyTree:
        """Updates the layer; `later`, which everything that follows needs, is returned such that it waits for
        that."""
        view = finder.view
        place = view.place(position)
        if not grads:
            return later  # nothing to update; a step count that nobody reads stays
        row = view.at + place.repetition
        in_stack = isinstance(self.chain.parts[place.part], Stack)
        state = self.states[place.part]
        if in_stack:
            state = loops.row(self.stacked(place.part)[place.phase][1], row)
        operation = functools.partial(update, optimizer=self.optimizer)
        new = finder.perform("update", position, depth, operation, finder.layer(position), grads, state)
        if in_stack:
            block = list(self.stacked(place.part))
            block[place.phase] = loops.put(block[place.phase], new, row)
            new = block
        later, self.parts[place.part] = finder.gate((later, new))
        return later

    def result(self) -> tuple[Chain, tuple[PyTree, ...]]:
        """The new chain and the new states."""
        parts, states = [], []
        for i, (part, new) in enumerate(zip(self.chain.parts, self.parts)):
            if isinstance(part, Stack):
                pairs = self.stacked(i)
                block = tuple(
                    trees.with_parameters(one, params) for one, (params, _) in zip(part.block, pairs)
                )
                parts.append(Stack(block, part.depth))
                states.append(tuple(state for _, state in pairs))
            else:
                params, state = (trees.parameters(part), self.states[i]) if new is None else new
                parts.append(trees.with_parameters(part, params))
                states.append(state)
        return Chain.tree_unflatten(None, parts), tuple(states)


def update(
    layer: PyTree, grads: list[Any], state: PyTree, *, optimizer: Optimizer
) -> tuple[list[Any], PyTree]:
    """`(new parameters, new state)` of one layer."""
    tree = trees.only_parameters(layer, grads)
    params = _parameters_only(layer)
    steps, new = optimizer.update(tree, state, params)
    moved = [
        jnp.asarray(p + u).astype(p.dtype) for p, u in zip(jax.tree.leaves(params), jax.tree.leaves(steps))
    ]
    # As optax promotes them; but what is written in place keeps its type.
    new = jax.tree.map(lambda a, b: a if trees.is_key(b) else jnp.asarray(a).astype(b.dtype), new, state)
    return moved, new


def _parameters_only(tree: PyTree) -> PyTree:
    return trees.only_parameters(tree, trees.parameters(tree))


def _check_optimizer(optimizer: Any) -> None:
    if not callable(getattr(optimizer, "init", None)) or not callable(getattr(optimizer, "update", None)):
        raise ArgumentError(
            f"`optimizer` is {optimizer!r}: give an `optax.GradientTransformation`, or anything with its "
            "`init` and `update`"
        )


def _check_states(optimizer: Optimizer, chain: Chain, states: Any) -> None:
    want = jax.eval_shape(lambda chain: init_states(optimizer, chain), chain)
    shapes = [jax.tree.map(lambda a: jnp.shape(a), tree) for tree in (want, states)]
    if shapes[0] != shapes[1]:
        raise ArgumentError(
            "`states` are not those of this optimizer and this chain (stacked or not makes a difference): "
            "make them with "
            "`mw.init_states(optimizer, chain)`"
        )


def _check_separate(optimizer: Optimizer, chain: Chain) -> None:
    """Raises `ArgumentError` where one layer's update depends on another, as after a clipping by the global
    norm: by its gradients, its parameters, or by what the state remembers of them."""
    params: list[PyTree] = []
    for part in chain.parts:
        one = trees.struct(_parameters_only(part.block if isinstance(part, Stack) else part))
        if isinstance(part, Stack):
            # Two repetitions stand for all.
            one = jax.tree.map(lambda leaf: trees.struct_of(leaf, leaf.shape[1:]), one)
            params += [phase for _ in range(min(2, part.depth)) for phase in one]
        else:
            params.append(one)
    owners = [frozenset({i}) for i, one in enumerate(params) for _ in jax.tree.leaves(one)]
    if len(set(owners)) < 2:
        return
    state = jax.eval_shape(optimizer.init, params)
    remembered = _taints(jax.make_jaxpr(optimizer.init)(params).jaxpr, owners)
    jaxpr = jax.make_jaxpr(optimizer.update)(params, state, params).jaxpr
    while True:
        taints = _taints(jaxpr, [*owners, *remembered, *owners])
        after = [a | b for a, b in zip(remembered, taints[len(owners) :])]
        if after == remembered:
            break
        remembered = after
    if any(taint - owner for owner, taint in zip(owners, taints)):
        raise ArgumentError(
            "`optimizer` mixes layers (it needs the gradients of all at once, as `optax.clip_by_global_norm` "
            "does), and here each "
            "is gone before the next comes: use one that treats layers by themselves "
            "(`optax.clip_by_block_rms`, "
            "`optax.adaptive_grad_clip`, `optax.clip`), or `mw.value_and_grad` and the optimizer after it"
        )


def _taints(jaxpr: Jaxpr, inputs: Sequence[frozenset[int]]) -> list[frozenset[int]]:
    """Which inputs each output depends on, at most; loops are taken whole."""
    known: dict[Any, frozenset[int]] = dict(zip(jaxpr.invars, inputs))

    def of(var: Any) -> frozenset[int]:
        return frozenset() if isinstance(var, Literal) else known.get(var, frozenset())

    for eqn in jaxpr.eqns:
        got = [of(var) for var in eqn.invars]
        inside: list[Jaxpr] = [
            one.jaxpr if isinstance(one, ClosedJaxpr) else one
            for param in eqn.params.values()
            for one in (param if isinstance(param, (list, tuple)) else [param])
            if isinstance(one, (ClosedJaxpr, Jaxpr))
        ]
        if eqn.primitive.name == "cond":
            each = [_taints(one, got[1:]) for one in inside]
            out = [got[0].union(*branches) for branches in zip(*each)]
        elif len(inside) == 1 and eqn.primitive.name in ("jit", "pjit", "custom_jvp_call", "custom_vjp_call"):
            out = _taints(inside[0], got)
        else:
            out = [frozenset().union(*got)] * len(eqn.outvars)
        known.update(zip(eqn.outvars, out))
    return [of(var) for var in jaxpr.outvars]
