"""What is predicted of the layers that people write, against what a GPU's compiler says; and, without one,
what makes the programs for it so."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Literal

import mwplan as mw
from experiments import layer_kinds
from mwplan import targets
from mwplan.common import platforms
from mwplan.execution import barriers
from mwplan.network.layer import layer
from mwplan.plans.ledger import replay
from mwplan.plans.schedule import Schedule
from tests.compilers import GPU
from tests.helpers import segments, store_all


def made_of_constants(jaxpr: Any, given: frozenset[Any] = frozenset()) -> list[str]:
    """The writers among a program's operations whose operand depends on nothing that the program is given."""
    late, found = {*given, *jaxpr.invars}, []
    for eqn in jaxpr.eqns:
        read = [not isinstance(var, Literal) and var in late for var in eqn.invars]
        if eqn.primitive.name in ("scatter", "scatter-add", "dynamic_update_slice") and not read[0]:
            found.append(eqn.primitive.name)
        if eqn.primitive.name == "select_and_scatter_add" or (
            eqn.primitive.name == "select_and_scatter" and not read[2]
        ):
            found.append(eqn.primitive.name)
        if any(read):
            late |= {*eqn.outvars}
    return found


def largest(x: Any) -> Any:
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3), (1, 1), "SAME")


OPERATIONS = {
    "zeros.at.set": lambda one, x: jnp.zeros_like(x).at[:, 0].set(x[:, 1]),
    "the gradient of the largest of windows": lambda one, x: jax.grad(lambda x: jnp.sum(jnp.sin(largest(x))))(
        x
    ),
    "gather's gradient": lambda one, x: jax.grad(lambda x: jnp.sum(jnp.sin(x[:, jnp.array([3, 1, 1])])))(x),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_written_into_waits_for_its_turn(name: str) -> None:
    """Zeros that depend on nothing would be there from the start of the program, for all layers."""
    x = jnp.ones((16, 32))
    with platforms.lowering_for("gpu"):
        perform = barriers.planned()
        for sweep in ("forward", "backward"):
            call = functools.partial(perform, sweep, 1, 0, OPERATIONS[name], ())
            closed = jax.make_jaxpr(call)(x)
            assert any("scatter" in eqn.primitive.name for eqn in closed.jaxpr.eqns)
            assert not made_of_constants(closed.jaxpr)
            assert jnp.array_equal(call(x), OPERATIONS[name]((), x))
        plain = jax.make_jaxpr(functools.partial(perform, "forward", 1, 0, lambda one, x: x + 1, ()))(x)
    assert "optimization_barrier" not in str(plain)  # nothing else has more barriers


@GPU
@pytest.mark.parametrize(
    "kind", ["zeros.at.set", "sort", "map", "gelu", "gather", "glu", "convolution, bias"]
)
def test_compiled_temporaries_are_those_predicted(kind: str) -> None:
    point = {"kind": kind, "target": "h200"}
    for name, row in layer_kinds.measure(point)["rows"].items():
        assert 0.95 < row["compiled"] / row["predicted"] < 1.05, (name, row)


@layer
class Residual:
    weight: Any

    def __call__(self, x: Any) -> Any:
        return x + jnp.tanh(x @ self.weight)


@GPU
@pytest.mark.parametrize("batch", [3, 24])
@pytest.mark.parametrize("way", [store_all, functools.partial(segments, size=1)])
def test_rows_of_large_weights_are_predicted(way: Any, batch: int) -> None:
    """Of a stack whose weights are up to a hundred times as large as its activations."""
    width, depth = 256, 8
    x = jax.ShapeDtypeStruct((batch, width), jnp.float32)
    ones = [Residual(jnp.ones((width, width))) for _ in range(depth)]
    net = jax.eval_shape(lambda: mw.stack(mw.Chain(ones), jnp.ones(x.shape)))
    profile = mw.estimate(net, x, device="h200")
    predicted = replay(profile, way(net)).peak_bytes + profile.beside_bytes
    step = mw.value_and_grad(lambda y: jnp.mean(y**2), Schedule(runs=way(net)))
    compiled = targets.compile(step, net, x, target="h200").temporary_bytes
    assert 0.9 < compiled / predicted < 1.1
