"""A stretch of operations as a program: static, comparable, executed by binding its operations again.

Two programs are equal if they do the same: the same primitives, parameters, numbers and wiring, whatever they
are called. Functions in an operation's parameters (rules of `jax.custom_jvp` and `jax.custom_vjp`) are
compared by what they do, traced, where JAX can trace them, and by identity otherwise."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from mwplan.common import trees
from mwplan.functions.tracing import ALIAS, Constant, Operand, Step

#: What stands for an address in a text: never the same from one process to the next.
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


class Program:
    """Operations with numbered inputs and results.

    `steps`, with values renumbered: inputs first, in order; `results`, what is returned. Compared and hashed
    by what it does."""

    def __init__(
        self, steps: Sequence[Step], inputs: Sequence[int], results: Sequence[Operand], avals: Sequence[Any]
    ):
        new = {value: i for i, value in enumerate(inputs)}
        for step in steps:
            for value in step.outputs:
                new[value] = len(new)

        def rename(one: Operand) -> Operand:
            return new[one] if isinstance(one, int) else one

        self.steps = tuple(
            replace(step, inputs=tuple(map(rename, step.inputs)), outputs=tuple(new[v] for v in step.outputs))
            for step in steps
        )
        self.inputs = len(inputs)
        self.results = tuple(map(rename, results))
        self.in_avals = tuple(avals[value] for value in inputs)
        self._key = self._text(_by_identity)
        self._hash = hash(self._key)

    def _text(self, function: Callable[[Any], str]) -> str:
        """What it does, hashed; `function` says what a function is called."""
        lines = [" ".join(map(_type, self.in_avals))]
        for step in self.steps:
            read = " ".join(map(_operand, step.inputs))
            lines.append(
                f"{step.outputs} = {step.primitive.name} {_parameters(step, function)} {_where(step)} {read}"
            )
        lines.append(" ".join(map(_operand, self.results)))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @functools.cached_property
    def name(self) -> str:
        """A short text that is the same in every process."""
        return self._text(_by_name)[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and self._key == other._key

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"Program({self.name})"

    def __call__(self, *args: Any) -> list[Any]:
        """The results for these inputs."""
        return evaluate(self.steps, dict(enumerate(args)), self.results)


def evaluate(steps: Sequence[Step], env: dict[int, Any], results: Sequence[Operand]) -> list[Any]:
    """`results` after `steps`, from the values in `env`, which is added to."""

    def read(one: Operand) -> Any:
        return env[one] if isinstance(one, int) else one.value

    for step in steps:
        if step.primitive is ALIAS:
            env[step.outputs[0]] = _named(step.inputs[0], step.params["aval"], env)
            continue
        params = step.primitive.get_bind_params(step.params)
        functions, params = params if isinstance(params, tuple) else ((), params)  # older jax, newer jax
        with step.context.manager:
            got = step.primitive.bind(*functions, *map(read, step.inputs), **params)
        env.update(zip(step.outputs, got if step.primitive.multiple_results else [got]))
    return [read(one) for one in results]


def _named(one: Operand, aval: Any, env: dict[int, Any]) -> Any:
    if isinstance(one, int):
        return env[one]
    return jax.numpy.broadcast_to(jax.numpy.asarray(one.value, aval.dtype), aval.shape)


def _type(aval: Any) -> str:
    text = aval.str_short() if hasattr(aval, "str_short") else str(aval)
    return f"{text}{'*' if getattr(aval, 'weak_type', False) else ''}"


def _operand(one: Operand) -> str:
    return str(one) if isinstance(one, int) else _number(one)


def _number(one: Constant) -> str:
    return f"{_type(one.aval)}:{_value(one.value, _by_identity)}"


def _where(step: Step) -> str:
    context = step.context
    return f"{context.compute_type or ''}{context.xla_metadata or ''}"


def _parameters(step: Step, function: Callable[[Any], str]) -> str:
    """An operation's parameters as a text."""
    rules = {"custom_jvp_call": _jvp_rule, "custom_vjp_call": _vjp_rule}.get(step.primitive.name)
    if rules is None:
        return _value(step.params, function)
    whole = {name: value for name, value in step.params.items() if not callable(value) or _is_program(value)}
    return _value(whole, function) + rules(step.params, function)


def _is_program(value: Any) -> bool:
    return isinstance(value, (Jaxpr, ClosedJaxpr))


def _jvp_rule(params: dict[str, Any], function: Callable[[Any], str]) -> str:
    """What the rule of a `jax.custom_jvp` does when all tangents are there."""
    call = params["call_jaxpr"]
    thunk = params["jvp_jaxpr_fun"]
    try:
        jaxpr, consts, zeros = thunk.call_wrapped(*[False] * (len(call.in_avals) - params["num_consts"]))
        return f"{_jaxpr(jaxpr, consts, function)}{tuple(zeros)}"
    except Exception:
        return function(thunk)


def _vjp_rule(params: dict[str, Any], function: Callable[[Any], str]) -> str:
    """What the rules of a `jax.custom_vjp` do: the forward rule, and the backward rule at what that keeps."""
    call = params["call_jaxpr"]
    thunk, backward = params["fwd_jaxpr_thunk"], params["bwd"]
    try:
        jaxpr, consts = thunk.call_wrapped(*[True] * (len(call.in_avals) - params["num_consts"]))
        outs = [var.aval for var in jaxpr.outvars]
        kept = outs[: len(outs) - len(call.out_avals)]
        both = [*kept, *(aval.to_tangent_aval() for aval in call.out_avals)]
        arrays = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in both]
        closed = jax.make_jaxpr(lambda *args: list(backward.call_wrapped(*args)))(*arrays)
        return _jaxpr(jaxpr, consts, function) + _jaxpr(closed.jaxpr, closed.consts, function)
    except Exception:
        return function(thunk) + function(backward)


def _jaxpr(jaxpr: Jaxpr, consts: Sequence[Any], function: Callable[[Any], str]) -> str:
    """A program as a text in which variables are numbered."""
    number: dict[Any, int] = {}

    def name(var: Any) -> str:
        if isinstance(var, Literal):
            return _number(Constant(var.val, var.aval))
        return str(number.setdefault(var, len(number)))

    lines = [" ".join(f"{name(v)}:{_type(v.aval)}" for v in (*jaxpr.constvars, *jaxpr.invars))]
    for eqn in jaxpr.eqns:
        step = Step(
            primitive=eqn.primitive, params=eqn.params, inputs=(), outputs=(), scope="", context=eqn.ctx
        )
        read = " ".join(map(name, eqn.invars))
        made = " ".join(map(name, eqn.outvars))
        lines.append(f"{made} = {eqn.primitive.name} {_parameters(step, function)} {_where(step)} {read}")
    lines.append(" ".join(map(name, jaxpr.outvars)))
    return "{" + "\n".join(lines) + _value(tuple(consts), function) + "}"


def _value(value: Any, function: Callable[[Any], str]) -> str:
    """A parameter, or a part of one, as a text."""
    if isinstance(value, ClosedJaxpr):
        return _jaxpr(value.jaxpr, value.consts, function)
    if isinstance(value, Jaxpr):
        return _jaxpr(value, (), function)
    if isinstance(value, dict):
        return (
            "{" + ",".join(f"{k}:{_value(v, function)}" for k, v in sorted(value.items(), key=_first)) + "}"
        )
    if type(value) in (tuple, list):
        return "(" + ",".join(_value(one, function) for one in value) + ")"
    if trees.is_array(value):
        if trees.is_key(value):
            value = jax.random.key_data(value)
        array = np.asarray(value)
        return f"{array.dtype}{array.shape}:{hashlib.sha256(array.tobytes()).hexdigest()}"
    text = repr(value)
    if _ADDRESS.search(text) or callable(value):
        return function(value)
    return f"{type(value).__name__}:{text}"


def _first(pair: tuple[Any, Any]) -> str:
    return str(pair[0])


def _by_identity(value: Any) -> str:
    return f"{_by_name(value)}@{id(value)}"


def _by_name(value: Any) -> str:
    inner = getattr(value, "f", value)
    name = getattr(inner, "__qualname__", type(inner).__qualname__)
    return f"{getattr(inner, '__module__', '')}.{name}"
