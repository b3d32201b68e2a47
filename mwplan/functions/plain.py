"""Layers recognised in plain functions, for `mw.vijp` and `mw.explain`."""

from __future__ import annotations

import itertools
from typing import Any

import jax

from mwplan.functions.checking import problem
from mwplan.functions.programs import evaluate
from mwplan.functions.recognition import Found, Listing, recognise
from mwplan.functions.stretches import Weight
from mwplan.functions.tracing import Constant, Flat, Operand, Step, needed
from mwplan.layers.sequential import Sequential
from mwplan.network.chain import as_layer
from mwplan.network.operator import RECOGNISERS

PyTree = Any


def recognised(one: Any, x: PyTree) -> tuple[Any, str]:
    """The layer of `mwplan.layers` that a callable pytree is at input `x` (arrays or shapes), its weights the
    callable's, or what is computed of them; None, and why, where it is none. Where all is arrays it is held
    against the function by numbers.

    **Cost:** a trace; the check compiles two vjps and a vijp.
    """
    one = as_layer(one, 0)
    leaves, treedef = jax.tree.flatten(one)
    xs, x_treedef = jax.tree.flatten(x)
    if len(xs) > 2 or (len(xs) == 2 and not isinstance(x, tuple)):
        return None, "it takes more than two arrays"

    def flat_call(arrays: list[Any], xs: list[Any]) -> Any:
        return jax.tree.leaves(jax.tree.unflatten(treedef, arrays)(jax.tree.unflatten(x_treedef, xs)))

    closed = jax.make_jaxpr(flat_call)(leaves, xs)
    if closed.jaxpr.effects:
        return None, "it has side effects"
    flat = Flat(frozenset())
    given: list[Operand] = [flat.value(aval) for aval in closed.in_avals]
    if any(isinstance(value, jax.core.Tracer) for value in closed.consts):
        return None, "it closes over a value that is being traced"
    outputs = flat.walk(closed.jaxpr, closed.consts, given, "")
    if any(isinstance(v, Constant) for v in outputs):
        return None, "it returns a constant"
    inputs = [v for v in given[len(leaves) :] if isinstance(v, int)]
    found, why = _found(flat, needed(flat.steps, outputs), inputs, outputs)
    if not found:
        return None, why
    env = dict(enumerate(leaves)) | dict(flat.captured.values())
    layer = _layer(found, env, flat)
    concrete = not any(
        isinstance(leaf, (jax.core.Tracer, jax.ShapeDtypeStruct))
        for leaf in jax.tree.leaves((leaves, xs, layer))
    )
    wrong = problem(one, layer, x) if concrete else None
    return (layer, "") if wrong is None else (None, wrong)


def _found(
    flat: Flat, steps: list[Step], inputs: list[int], outputs: list[Operand]
) -> tuple[list[Found], str]:
    """The layers that follow one another from the inputs to the outputs; none, and why."""
    activations = set(inputs)
    for step in steps:
        if not activations.isdisjoint(step.read):
            activations.update(step.outputs)
    main = [step for step in steps if not activations.isdisjoint(step.outputs)]
    recipes = {v: step for step in steps if activations.isdisjoint(step.outputs) for v in step.outputs}
    dies = {v: i for i, step in enumerate(main) for v in step.read}
    dies.update({v: len(main) for v in outputs if isinstance(v, int)})
    listing = Listing(
        steps=main,
        recipes=recipes,
        reads=[[v for v in step.read if v not in recipes] for step in main],
        avals=flat.avals,
        activations=frozenset(activations),
        dies=dies,
    )
    found = recognise(listing, 0, len(main))
    at = 0
    for one in found:
        if one.start != at:
            break
        at = one.stop
    if at < len(main):
        return [], f"`{main[at].primitive.name}` is part of no layer that is known"
    if not found or found[0].inputs != tuple(inputs) or found[-1].results != tuple(outputs):
        return [], "its arrays are not taken or returned in the order of a layer's"
    if any(a.results != b.inputs for a, b in itertools.pairwise(found)):
        return [], "its layers do not follow one after another"
    return found, ""


def _layer(found: list[Found], env: dict[int, Any], flat: Flat) -> Any:
    """The layers as one, of the arrays in `env`."""
    wanted = {w.value for one in found for w in one.weights}
    steps = []
    for step in reversed(flat.steps):
        if not wanted.isdisjoint(step.outputs):
            steps.append(step)
            wanted.update(step.read)
    evaluate(steps[::-1], env, ())
    made = [
        jax.tree.map(lambda leaf: leaf.array(env) if isinstance(leaf, Weight) else leaf, one.layer)
        for one in found
    ]
    return made[0] if len(made) == 1 else Sequential(tuple(made))


RECOGNISERS.append(recognised)
