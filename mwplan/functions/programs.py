"""A stretch of operations as a program: static, comparable, executed by binding its operations again.

Two programs are equal if they do the same: the same primitives, parameters, numbers and wiring, whatever they
are called. Functions in an operation's parameters (rules of `jax.custom_jvp` and `jax.custom_vjp`) are
compared by what they do, traced, where JAX can trace them, and by identity otherwise."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from mwplan.common import trees
from mwplan.functions.tracing import ALIAS, Constant, Operand, Step

#: What stands for an address in a text: never the same from one process to the next.
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


@dataclass(frozen=True)
class _Names:
    """How a program becomes a text: `of` says what a function is called; `rules`, whether custom derivatives
    are part of it. Those of operations within such a rule are not, since a rule is executed, not
    differentiated; and that of `jax.nn.relu` calls `jax.nn.relu`, which would never end."""

    of: Callable[[Any], str]
    rules: bool = True


class Program:
    """Operations with numbered inputs and results.

    `steps`, with values renumbered: inputs first, in order; `results`, what is returned. Compared and hashed
    by what it does."""

    def __init__(
        self, steps: Sequence[Step], inputs: Sequence[int], results: Sequence[Operand], avals: Sequence[Any]
    ):
        new = numbering(steps, inputs)

        def rename(one: Operand) -> Operand:
            return new[one] if isinstance(one, int) else one

        self.steps = tuple(
            replace(step, inputs=tuple(map(rename, step.inputs)), outputs=tuple(new[v] for v in step.outputs))
            for step in steps
        )
        self.inputs = len(inputs)
        self.results = tuple(map(rename, results))
        self.in_avals = tuple(avals[value] for value in inputs)
        self._key = self._text(_BY_IDENTITY)
        self._hash = hash(self._key)

    def _text(self, names: _Names) -> str:
        """What it does, hashed."""
        lines = [" ".join(map(_type, self.in_avals))]
        for step in self.steps:
            read = " ".join(map(_operand, step.inputs))
            lines.append(
                f"{step.outputs} = {step.primitive.name} {_parameters(step, names)} {_where(step)} {read}"
            )
        lines.append(" ".join(map(_operand, self.results)))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @functools.cached_property
    def name(self) -> str:
        """A short text that is the same in every process."""
        return self._text(_BY_NAME)[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and self._key == other._key

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"Program({self.name})"

    def __call__(self, *args: Any) -> list[Any]:
        """The results for these inputs."""
        return evaluate(self.steps, dict(enumerate(args)), self.results)


def numbering(steps: Sequence[Step], inputs: Sequence[int]) -> dict[int, int]:
    """The numbers that values have in a program of these operations and inputs."""
    new = {value: i for i, value in enumerate(inputs)}
    for step in steps:
        for value in step.outputs:
            new[value] = len(new)
    return new


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
    return f"{_type(one.aval)}:{_value(one.value, _BY_IDENTITY)}"


def _where(step: Step) -> str:
    context = step.context
    return f"{context.compute_type or ''}{context.xla_metadata or ''}"


def _parameters(step: Step, names: _Names) -> str:
    """An operation's parameters as a text."""
    rules = {"custom_jvp_call": _jvp_rule, "custom_vjp_call": _vjp_rule}.get(step.primitive.name)
    if rules is None:
        return _value(step.params, names)
    whole = {name: value for name, value in step.params.items() if not callable(value) or _is_program(value)}
    rule = rules(step.params, replace(names, rules=False)) if names.rules else ""
    return _value(whole, names) + rule


def _is_program(value: Any) -> bool:
    return isinstance(value, (Jaxpr, ClosedJaxpr))


def _jvp_rule(params: dict[str, Any], names: _Names) -> str:
    """What the rule of a `jax.custom_jvp` does when all tangents are there."""
    call = params["call_jaxpr"]
    thunk = params["jvp_jaxpr_fun"]
    try:
        jaxpr, consts, zeros = thunk.call_wrapped(*[False] * (len(call.in_avals) - params["num_consts"]))
        return f"{_jaxpr(jaxpr, consts, names)}{tuple(zeros)}"
    except Exception:
        return names.of(thunk)


def _vjp_rule(params: dict[str, Any], names: _Names) -> str:
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
        return _jaxpr(jaxpr, consts, names) + _jaxpr(closed.jaxpr, closed.consts, names)
    except Exception:
        return names.of(thunk) + names.of(backward)


def _jaxpr(jaxpr: Jaxpr, consts: Sequence[Any], names: _Names) -> str:
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
        lines.append(f"{made} = {eqn.primitive.name} {_parameters(step, names)} {_where(step)} {read}")
    lines.append(" ".join(map(name, jaxpr.outvars)))
    return "{" + "\n".join(lines) + _value(tuple(consts), names) + "}"


def _value(value: Any, names: _Names) -> str:
    """A parameter, or a part of one, as a text."""
    if isinstance(value, ClosedJaxpr):
        return _jaxpr(value.jaxpr, value.consts, names)
    if isinstance(value, Jaxpr):
        return _jaxpr(value, (), names)
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_value(v, names)}" for k, v in sorted(value.items(), key=_first)) + "}"
    if type(value) in (tuple, list):
        return "(" + ",".join(_value(one, names) for one in value) + ")"
    if trees.is_array(value):
        if trees.is_key(value):
            value = jax.random.key_data(value)
        array = np.asarray(value)
        return f"{array.dtype}{array.shape}:{hashlib.sha256(array.tobytes()).hexdigest()}"
    text = repr(value)
    if _ADDRESS.search(text) or callable(value):
        return names.of(value)
    return f"{type(value).__name__}:{text}"


def _first(pair: tuple[Any, Any]) -> str:
    return str(pair[0])


def _by_identity(value: Any) -> str:
    return f"{_by_name(value)}@{id(value)}"


def _by_name(value: Any) -> str:
    inner = getattr(value, "f", value)
    name = getattr(inner, "__qualname__", type(inner).__qualname__)
    return f"{getattr(inner, '__module__', '')}.{name}"


_BY_IDENTITY, _BY_NAME = _Names(_by_identity), _Names(_by_name)
