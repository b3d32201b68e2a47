"""Estimates against measurements, and counts against formulas."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import mwplan as mw
from mwplan.common import trees
from mwplan.layers import (
    Conv2D,
    Coupling,
    Dense,
    Flatten,
    LayerNorm,
    LeakyReLU,
    MaxMin,
    OrthogonalDense,
    Sequential,
    Smooth,
    layer,
)
from mwplan.network import rules
from mwplan.profiling import costs, estimating, layer_costs, programs
from mwplan.profiling.roofline import DEVICES
from tests.helpers import relative_error

LAPTOP = DEVICES["laptop"]


@layer
class Mixer:
    """A residual block with attention: no rule, several products, a softmax."""

    norm: LayerNorm
    weight: Any

    def __call__(self, x: Any) -> Any:
        q, k, v = jnp.split(self.norm(x) @ self.weight, 3, axis=-1)
        return x + jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2), axis=-1) @ v


def networks() -> dict[str, tuple[mw.Chain, Any]]:
    keys = iter(jax.random.split(jax.random.key(0), 20))
    cnn = mw.Chain(
        [
            Conv2D.init(next(keys), 2, 8, 2, stride=2, padding="VALID"),
            jnp.tanh,
            LeakyReLU(0.5),
            Flatten(3),
        ]
    )
    orthogonal = [OrthogonalDense.init(next(keys), 32, 32) for _ in range(3)]
    mlp = mw.Chain(
        [mw.stack(mw.Chain(orthogonal), jnp.ones((1, 32))).parts[0], MaxMin(), Dense.init(next(keys), 32, 8)]
    )
    half = Sequential((Dense.init(next(keys), 8, 8), Smooth("gelu")))
    mixer = Mixer(LayerNorm.init(None, 16), 0.1 * jax.random.normal(next(keys), (16, 48)))
    blocks = Sequential((LayerNorm.init(None, 16), Coupling(half, half)))
    transformer = mw.Chain([mixer, blocks, LayerNorm.init(None, 16)])
    half_precision = mw.Chain([Dense((jnp.eye(8, 16) + 0.01).astype(jnp.bfloat16)), LeakyReLU(0.5)])
    return {
        "half precision": (half_precision, jnp.ones((32, 8), jnp.bfloat16)),
        "cnn": (cnn, jax.random.normal(next(keys), (32, 8, 8, 2))),
        "mlp": (mlp, jax.random.normal(next(keys), (64, 32))),
        "transformer": (transformer, jax.random.normal(next(keys), (16, 8, 16))),
    }


@functools.cache
def both(name: str) -> tuple[mw.Profile, mw.Profile]:
    """Estimated from shapes alone, and measured."""
    chain, x = networks()[name]
    shapes = jax.eval_shape(lambda c, x: (c, x), chain, x)
    with pytest.MonkeyPatch.context() as patch:
        if name != "mlp":  # errors take long to compile, and those of one network are enough
            patch.setattr(layer_costs.Costs, "add_errors", lambda *args: None)
        return mw.estimate(*shapes, device="h100"), mw.profile(chain, x, repeats=1)


def kept(profile: mw.Profile) -> Any:
    """The profile without its times, workspaces, errors and what the device keeps of its memory, which an
    estimate may have otherwise."""
    drop = {
        "device",
        "kept_bytes",
        "source",
        "workspaces",
        "local_error",
        "growth",
        "sensitivity",
        "gradient_sensitivity",
        "kink",
    }

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(plain, value))
        if not dataclasses.is_dataclass(value):
            return value
        names = [f.name for f in dataclasses.fields(value) if f.name not in drop]
        names = [n for n in names if not n.endswith(("_ns", "workspace_bytes", "saving_bytes"))]
        return {name: plain(getattr(value, name)) for name in names}

    return plain(profile)


#: Which sets of values pay depends on the device; what a layer keeps by rules of its own does not.
_SETS = ("products", "nothing", "vjp")


def alike(estimated: mw.Profile, measured: mw.Profile) -> bool:
    """Whether two profiles count the same, of the options that both have: they may differ in sets of values
    alone."""
    one, other = (kept(profile) for profile in (estimated, measured))
    for a, b in zip(one["layers"], other["layers"], strict=True):
        names = [{option["name"] for option in each["store"]} for each in (a, b)]
        assert all(name in _SETS or name.startswith("keep:") for name in names[0] ^ names[1])
        for each in (a, b):
            each["store"] = [o for o in each["store"] if o["name"] in names[0] & names[1]]
            if names[0] != names[1]:
                del each["table_bytes"]  # the largest of all options'
    return bool(one == other)


@pytest.mark.parametrize("name", ["cnn", "mlp", "transformer", "half precision"])
def test_what_is_kept_is_counted_as_measured(name: str) -> None:
    estimated, measured = both(name)
    assert alike(estimated, measured)
    assert "estimated" in estimated.source
    assert estimated.device == "h100"
    assert mw.Profile.from_json(estimated.to_json()) == estimated


def test_errors_with_weights_are_those_measured_at_more_examples() -> None:
    chain, x = networks()["mlp"]
    _, measured = both("mlp")
    for given in (x, jax.ShapeDtypeStruct(x.shape, x.dtype)):
        estimated = mw.estimate(chain, given, device="laptop")
        assert alike(estimated, measured)
        for a, b in zip(estimated.layers, measured.layers, strict=True):
            for one, other in zip((*a.moonwalk, *a.invert), (*b.moonwalk, *b.invert), strict=True):
                assert one.growth == pytest.approx(other.growth, rel=0.25)
                assert one.local_error == pytest.approx(other.local_error, rel=0.5, abs=1e-8)
            for one, other in zip(a.invert, b.invert, strict=True):
                assert one.gradient_sensitivity == pytest.approx(other.gradient_sensitivity, rel=0.5)
                assert one.sensitivity == pytest.approx(
                    other.sensitivity, rel=0.5, abs=3
                )  # few examples, rare kinks


def test_errors_without_weights_are_known_or_infinite() -> None:
    mlp, _ = both("mlp")
    orthogonal, maxmin, dense = mlp.layers[0], mlp.layers[3], mlp.layers[4]
    assert orthogonal.moonwalk[0].growth == pytest.approx(1, abs=1e-3)
    assert maxmin.moonwalk[0].growth == pytest.approx(1, abs=1e-3)
    growth = {o.name: o.growth for o in dense.moonwalk}
    assert (growth["exact"], growth["whole"]) == (math.inf, 0)
    frontier = mw.frontier(mlp)
    assert frontier.at(frontier.least_bytes or 0).error < 1e-4


#: How far a workspace may be from the measured, in units of the layer's input and output together. What is
#: furthest off: the copies that XLA:CPU makes of a convolution's operands for the weight's gradient; a
#: factorisation's; what of attention's softmax XLA:CPU does not fuse.
WITHIN = {"cnn": 1.1, "mlp": 0.8, "transformer": 1.75}


@pytest.mark.parametrize("name", ["cnn", "mlp", "transformer"])
def test_workspaces_are_near_the_measured(name: str) -> None:
    estimated, measured = both(name)
    for i, (a, b) in enumerate(zip(estimated.layers, measured.layers, strict=True)):
        around = sum(measured.activation_bytes[i : i + 2])
        for kind in ("store", "moonwalk", "invert"):
            others = {o.name: o for o in getattr(b, kind)}
            for one in getattr(a, kind):
                if one.name not in others and (one.name in _SETS or one.name.startswith("keep:")):
                    continue
                for field in dataclasses.fields(one):
                    if field.name.endswith("workspace_bytes"):
                        off = abs(getattr(one, field.name) - getattr(others[one.name], field.name))
                        assert off <= WITHIN[name] * around, (b.name, one.name, field.name)


# -- counts


def kernels(operation: Any, *shapes: tuple[int, ...]) -> list[costs.Kernel]:
    program, _ = programs.trace(operation, *(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
    return costs.kernels(program)


def flop(steps: Iterable[costs.Kernel]) -> float:
    return sum(sum(k.flop.values()) + k.trips * flop(k.inner) for k in steps)


@jax.custom_vjp
def custom(x: Any, w: Any) -> Any:
    """A product with a derivative of its own."""
    return x @ w


custom.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, ct: (ct @ kept[1].T, kept[0].T @ ct))


def conv(x: Any, w: Any, stride: int = 1, groups: int = 1) -> Any:
    names = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), "SAME", dimension_numbers=names, feature_group_count=groups
    )


def transposed(operation: Any, x: Any, w: Any, ct: Any) -> Any:
    return jax.vjp(operation, x, w)[1](ct)


@pytest.mark.parametrize(
    ("operation", "shapes", "want"),
    [
        (lambda x, w: x @ w, [(5, 7), (7, 3)], 2 * 5 * 7 * 3),
        (lambda x, w: jnp.einsum("bij,bjk->bik", x, w), [(4, 5, 7), (4, 7, 3)], 2 * 4 * 5 * 7 * 3),
        (lambda x, w: transposed(jnp.matmul, x, w, jnp.ones((5, 3))), [(5, 7), (7, 3)], 4 * 5 * 7 * 3),
        (conv, [(2, 8, 8, 4), (3, 3, 4, 6)], 2 * (2 * 8 * 8 * 6) * 9 * 4),
        (functools.partial(conv, stride=2), [(2, 8, 8, 4), (3, 3, 4, 6)], 2 * (2 * 4 * 4 * 6) * 9 * 4),
        (functools.partial(conv, groups=2), [(2, 8, 8, 4), (3, 3, 2, 6)], 2 * (2 * 8 * 8 * 6) * 9 * 2),
        # The input's and the weight's gradient each cost what the forward does, whatever the stride and the
        # groups.
        (
            lambda x, w: transposed(functools.partial(conv, stride=2), x, w, jnp.ones((2, 4, 4, 6))),
            [(2, 8, 8, 4), (2, 2, 4, 6)],
            2 * 2 * (2 * 4 * 4 * 6) * 4 * 4,
        ),
        (
            lambda x, w: transposed(functools.partial(conv, groups=2), x, w, jnp.ones((2, 8, 8, 6))),
            [(2, 8, 8, 4), (3, 3, 2, 6)],
            2 * 2 * (2 * 8 * 8 * 6) * 9 * 2,
        ),
        (
            lambda x, w: jax.lax.scan(lambda c, _: (c @ w, None), x, length=9)[0],
            [(5, 7), (7, 7)],
            9 * 2 * 5 * 7 * 7,
        ),
        (lambda x: jnp.fft.fft(x.astype(jnp.complex64)), [(3, 16)], 3 * 5 * 16 * 4 + 3 * 16),
        (jax.checkpoint(lambda x, w: jax.jit(jnp.matmul)(x, w)), [(5, 7), (7, 3)], 2 * 5 * 7 * 3),
        (custom, [(5, 7), (7, 3)], 2 * 5 * 7 * 3),
        (
            lambda x: jax.lax.while_loop(lambda c: c[0, 0] < 9, lambda c: c @ c, x),
            [(4, 4)],
            costs.WHILE_TRIPS * 2 * 4**3,
        ),
        # and the comparison, made an index
        (lambda x: jax.lax.cond(x[0, 0] > 0, lambda c: c @ c, lambda c: c, x), [(4, 4)], 2 * 4**3 + 2),
        # and the upper triangle zeroed
        (lambda x: jnp.linalg.cholesky(x, symmetrize_input=False), [(6, 9, 9)], 6 * 9**3 / 3 + 6 * 9**2),
        (jnp.tanh, [(6, 4)], costs.TRANSCENDENTAL * 24),
        (lambda x: jnp.sum(x * 2), [(6, 4)], 24 + 24),
    ],
)
def test_flop(operation: Any, shapes: list[tuple[int, ...]], want: float) -> None:
    assert flop(kernels(operation, *shapes)) == pytest.approx(want)


def test_programs_are_fused() -> None:
    (one,) = kernels(lambda x: jnp.exp(x) * 2 + x, (64,))
    assert (one.moved_bytes, one.launches) == (2 * 64 * 4, 1)
    product, bias = kernels(lambda x, w, b: jnp.tanh(x @ w + b), (4, 8), (8, 16), (16,))
    assert product.moved_bytes == 4 * (4 * 8 + 8 * 16 + 4 * 16)
    assert bias.moved_bytes == 4 * (4 * 16 + 16 + 4 * 16)
    # x - mean is computed again, not stored: no kernel writes an array of that size but the last.
    norm = kernels(LayerNorm.init(None, 32), (64, 32))
    # (And a number: the constants are made to depend on the scale.)
    assert [k.writes[0].size for k in norm if k.writes[0].size > 1] == [64, 64, 64 * 32]
    # Equal expressions are computed once, dead ones never.
    assert len(kernels(lambda x, w: (x @ w) + (x @ w) + 0 * jnp.sum(x), (4, 4), (4, 4))) == 3


def test_workspace_of_a_chain_of_products() -> None:
    size = 4 * 64 * 64
    shape = jax.ShapeDtypeStruct((64, 64), jnp.float32)

    def needs(operation: Any, dead: bool = False) -> int:
        program, _ = programs.trace(operation, shape)
        steps = costs.kernels(program)
        return costs.needs(program, steps, program.inputs if dead else (), ())

    assert needs(lambda x: x @ x) == 0
    assert needs(lambda x: x @ x + 1) == 0  # the product lies where the output will be
    assert needs(lambda x: (x @ x) @ x) == size
    assert needs(lambda x: ((x @ x) @ x) @ x) == 2 * size
    assert needs(lambda x: (x @ x) @ (x @ x), dead=True) == 2 * size


def test_what_is_recomputed_is_not_kept() -> None:
    """A gelu between two products: its input, output and cotangent, as of the compiled operation too; by
    JAX's own more."""
    keys = jax.random.split(jax.random.key(0), 2)
    ends = Dense.init(keys[0], 16, 64), Dense.init(keys[1], 64, 16)
    x = jnp.ones((512, 16))

    def arrays(activation: Any) -> tuple[float, float]:
        def pull(ends: Any, x: Any, ct: Any) -> Any:
            return jax.vjp(lambda ends, x: ends[1](activation(ends[0](x))), ends, x)[1](ct)

        program, _ = programs.trace(pull, ends, x, x)
        estimated = costs.workspace(program, costs.kernels(program))
        size = 4 * 512 * 64
        return estimated / size, mw.temporaries(mw.jit(pull).lower(ends, x, x).compile()) / size

    assert arrays(Smooth("gelu")) == pytest.approx((3, 3), abs=0.2)
    assert min(arrays(functools.partial(jax.nn.gelu, approximate=False))) > 3.8


# -- times


def test_times_follow_the_device() -> None:
    chain = mw.Chain(
        [Dense.init(jax.random.key(0), 256, 256), MaxMin(), Dense.init(jax.random.key(1), 256, 256)]
    )
    chain, x = jax.eval_shape(lambda c: (c, jnp.ones((4096, 256))), chain)
    by = {name: mw.estimate(chain, x, device=name) for name in DEVICES}
    for fast, slow in (("h100", "a100"), ("a100", "laptop")):
        for a, b in zip(by[fast].layers, by[slow].layers, strict=True):
            assert a.forward_ns < b.forward_ns
    dense, maxmin = by["laptop"].layers[:2]
    flop = 2 * 4096 * 256 * 256
    assert dense.forward_ns == pytest.approx(1e9 * flop / LAPTOP.tf32_flop_per_s, rel=0.5)
    assert maxmin.forward_ns == pytest.approx(1e9 * 2 * 4 * 4096 * 256 / LAPTOP.bytes_per_s, rel=0.05)
    store = dense.store[0]
    assert 1.5 * store.forward_ns < store.backward_ns < 2.5 * store.forward_ns
    exact = {o.name: o for o in dense.moonwalk}
    assert exact["exact+refine"].rebuild_ns > exact["exact"].rebuild_ns > exact["whole"].rebuild_ns > 0
    # Twice the batch takes up to twice as long; a kernel's launch takes its time whatever it does.
    wide = mw.estimate(chain, jax.ShapeDtypeStruct((8192, 256), x.dtype), device=LAPTOP)
    assert dense.forward_ns < wide.layers[0].forward_ns < 2 * dense.forward_ns
    late = mw.estimate(chain, x, device=dataclasses.replace(LAPTOP, launch_ns=1e6))
    assert late.layers[1].forward_ns == pytest.approx(maxmin.forward_ns + 1e6 - LAPTOP.launch_ns, abs=2)


def test_narrow_numbers_take_the_fast_units() -> None:
    fast = dataclasses.replace(LAPTOP, half_flop_per_s=1e15, bytes_per_s=1e15, launch_ns=0)
    for dtype, rate in ((jnp.bfloat16, 1e15), (jnp.float32, fast.tf32_flop_per_s)):
        chain = mw.Chain([Dense(jax.ShapeDtypeStruct((512, 512), dtype))])
        x = jax.ShapeDtypeStruct((512, 512), dtype)
        found = mw.estimate(chain, x, device=fast, examples=1).layers[0].forward_ns
        assert found == pytest.approx(1e9 * 2 * 512**3 / rate, rel=0.01, abs=1)


# -- what it is for


def test_a_plan_from_shapes_runs_and_is_right() -> None:
    keys = jax.random.split(jax.random.key(0), 6)

    def make() -> mw.Chain:
        blocks = [f for i in range(6) for f in (OrthogonalDense.init(keys[i], 16, 16), MaxMin())]
        return mw.Chain(blocks)

    x = jax.random.normal(jax.random.key(1), (256, 16))
    profile = mw.estimate(jax.eval_shape(make), jax.ShapeDtypeStruct(x.shape, x.dtype), device="a100")
    frontier = mw.frontier(profile, allowed=set(mw.Strategy) - {mw.Strategy.RECOMPUTE})
    schedule = frontier.at(frontier.least_bytes or 0)
    assert {mw.Strategy.VIJP, mw.Strategy.FRAGMENT} & set(schedule.strategies)
    chain = make()

    def loss(y: Any) -> Any:  # linear: a square's gradient all but cancels behind orthogonal layers
        return jnp.vdot(y, jax.random.normal(jax.random.key(2), y.shape))

    (_, report), grads = mw.jit(mw.value_and_grad(loss, schedule))(chain, x)
    want = jax.grad(lambda c: loss(c(x)))(chain)
    assert relative_error(grads, want) < 1e-5
    assert float(report.worst) < 1e-4


def test_nothing_is_run_where_nothing_makes_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise AssertionError("run")

    monkeypatch.setattr(estimating, "visit", refuse)
    told: list[int] = []
    chain = mw.Chain([jnp.tanh, Dense(jnp.ones((3, 3)))])
    with pytest.raises(AssertionError, match="run"):
        mw.estimate(chain, jnp.ones((2, 3)), device="h100")
    chain = mw.Chain([jnp.tanh, jnp.sin])
    profile = mw.estimate(chain, jnp.ones((2, 3)), device="h100", progress=lambda done, *_: told.append(done))
    assert (profile.layers[0].moonwalk[0].growth, told) == (0, [1, 2, 2])


def test_unusual_inputs() -> None:
    table = jnp.ones((10, 4))
    chain = mw.Chain([lambda pair: table[pair["ids"]] + pair["scale"], jnp.sin])
    x = {"ids": jax.ShapeDtypeStruct((6, 5), jnp.int32), "scale": jax.ShapeDtypeStruct((), jnp.float32)}
    profile = mw.estimate(chain, x, device="laptop", examples=2)
    assert profile.activation_bytes == (6 * 5 * 4 + 4, 480, 480)
    assert profile.cotangent_bytes[0] == 4
    # A layer that sees all examples at once: all are taken where few would be another network.
    whole = mw.Chain([lambda x: x - jnp.mean(x), Flatten(3)])
    told: list[tuple[int, int, str]] = []
    mw.estimate(
        whole, jnp.ones((8, 2, 2, 3)), device="laptop", examples=4, progress=lambda *a: told.append(a)
    )
    assert [done for done, _, _ in told] == [1, 2, 1, 2, 2]  # counted, and then measured


class NeedsValues:
    """A layer whose rules look at its weights."""

    def __init__(self, weight: Any) -> None:
        self.weight = weight

    def __call__(self, x: Any) -> Any:
        return x * self.weight

    def store_rules(self, x: Any) -> list[rules.StoreRule]:
        return [rules.VjpStore("lean")] if float(self.weight[0]) > 0 else []


jax.tree_util.register_pytree_node(NeedsValues, lambda n: ((n.weight,), None), lambda _, c: NeedsValues(*c))


class TestErrors:
    chain = mw.Chain([Dense(jnp.ones((3, 3)))])
    x = jax.ShapeDtypeStruct((4, 3), jnp.float32)

    @pytest.mark.parametrize("device", ["tpu", "", 3, None])
    def test_an_unknown_device(self, device: Any) -> None:
        with pytest.raises(mw.ArgumentError, match=r"`device=.*h100.*laptop.*mw\.Device"):
            mw.estimate(self.chain, self.x, device=device)

    @pytest.mark.parametrize("examples", [0, -1, 1.5, True])
    def test_examples(self, examples: Any) -> None:
        with pytest.raises(mw.ArgumentError, match="`examples="):
            mw.estimate(self.chain, self.x, device="h100", examples=examples)

    def test_what_is_no_chain_or_does_not_fit(self) -> None:
        with pytest.raises(mw.ChainError, match="make it one"):
            mw.estimate([jnp.tanh], self.x, device="h100")  # type: ignore[arg-type]
        with pytest.raises(mw.ChainError, match="layer 1"):
            mw.estimate(self.chain, jax.ShapeDtypeStruct((4, 5), jnp.float32), device="h100")

    def test_tracers(self) -> None:
        with pytest.raises(mw.ArgumentError, match=r"outside `jax\.jit`"):
            jax.jit(lambda x: mw.estimate(self.chain, x, device="h100"))(jnp.ones((4, 3)))

    def test_a_layer_that_needs_its_weights(self) -> None:
        chain = mw.Chain([jnp.tanh, NeedsValues(jnp.ones((3,)))])
        names = [o.name for o in mw.estimate(chain, self.x, device="h100").layers[1].store]
        assert names == ["lean", "vjp"]
        with pytest.raises(mw.ArgumentError, match=r"layer 2 \(NeedsValues\).*Give it arrays"):
            mw.estimate(jax.eval_shape(lambda: chain), self.x, device="h100")

    @pytest.mark.parametrize(
        "change",
        [
            {"bytes_per_s": 0},
            {"launch_ns": -1},
            {"half_flop_per_s": math.nan},
            {"memory_bytes": 1.5},
            {"tf32_flop_per_s": "1"},
        ],
    )
    def test_figures_of_a_device(self, change: dict[str, Any]) -> None:
        (name,) = change
        with pytest.raises(mw.ArgumentError, match=name):
            dataclasses.replace(LAPTOP, **change)


def test_kept_arrays_are_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network far larger than this machine: nothing of its size is made."""
    width, batch = 2**16, 2**20
    chain = jax.eval_shape(lambda k: mw.Chain([Dense.init(k, width, width), MaxMin()]), jax.random.key(0))
    profile = mw.estimate(chain, jax.ShapeDtypeStruct((batch, width), jnp.bfloat16), device="h100")
    assert profile.activation_bytes[0] == 2 * width * batch
    assert trees.nbytes(chain) < profile.fixed_bytes
