"""What a layer's forward keeps, and what a profile counts of it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import mwplan as mw
from mwplan import layers
from mwplan.layers import Dense, LeakyReLU, layer
from mwplan.network import operations, residuals, rules
from mwplan.plans.profiles import InvertOption
from mwplan.plans.schedule import Run, RunKind
from mwplan.profiling import touch
from tests.helpers import relative_error
from tests.measured import measured


@pytest.mark.parametrize("activation", [layers.ReLU(), LeakyReLU(0.5)])
def test_an_output_that_is_kept_anyway_costs_nothing(activation: Any) -> None:
    """A dense layer keeps its input, which tells the signs of the activation before it: no bits, in a
    composite neither."""
    dense = Dense.init(jax.random.key(0), 64, 64)
    chain = mw.Chain([dense, activation, dense, activation, dense])
    x = jax.random.normal(jax.random.key(1), (4096, 64))

    def kept(layer: Any) -> dict[str, tuple[int, bool]]:
        found = {}
        for rule in operations.store_rules(layer, x):
            held = jax.eval_shape(functools.partial(operations.forward, rule=rule), layer, x)[1]
            found[rule.name] = residuals.new_bytes(held), held.keeps_output
        return found

    own = kept(activation)
    assert own.pop("vjp") == own["bits"]
    assert own == {"bits": (x.size // 8, False), "output": (0, True)}
    block = kept(layers.Sequential((dense, activation, dense)))
    assert block["parts"][0] == x.nbytes + x.size // 8
    assert block["parts.output"][0] == x.nbytes

    def loss(y: Any) -> Any:
        """Its gradient needs no memory of its own."""
        return jnp.mean(y**2 * jnp.linspace(0.5, 1.5, 64))

    def temporaries(option: str) -> int:
        runs = tuple(
            Run(kind=RunKind.STORE, start=at, stop=at + 1, options=(option if at % 2 else "vjp",))
            for at in range(5)
        )
        step = mw.jit(mw.value_and_grad(loss, mw.Schedule(runs=runs))).lower(chain, x).compile()
        plain = jax.grad(lambda chain: loss(chain(x)))(chain)
        assert relative_error(step(chain, x)[1], plain) < 1e-5
        return mw.temporaries(step)

    assert (
        4 * x.nbytes <= temporaries("output") <= 4.01 * x.nbytes
    )  # both outputs, that of the chain and its cotangent
    assert temporaries("bits") >= temporaries("output") + x.size // 8


def test_of_what_keeps_the_same_the_lesser_is_left_out() -> None:
    """A norm's own rule and `jax.vjp` both keep its input, and its own needs less workspace."""
    (norm,) = mw.profile(mw.Chain([layers.RMSNorm.init(None, 16)]), jnp.ones((512, 16)), repeats=1).layers
    assert [option.name for option in norm.store] == ["input"]


def test_a_composite_is_inverted_at_its_parts_cost() -> None:
    """Of a rule that keeps nothing, too, a composite's backward is of all its parts."""
    one = layers.Coupling(layers.Smooth("gelu"), Dense.init(jax.random.key(0), 4, 4))
    x = jax.random.normal(jax.random.key(1), (2048, 8))

    def option(layer: Any) -> InvertOption:
        (found,) = mw.profile(mw.Chain([layer]), x, repeats=1).layers[0].invert
        return found

    alone, inside = option(one), option(layers.Sequential((one,)))
    assert alone.backward_workspace_bytes > x.nbytes // 2  # a branch's output at the very least
    assert abs(inside.backward_workspace_bytes - alone.backward_workspace_bytes) <= 256
    assert inside.residual_bytes == alone.residual_bytes == 0


def test_input_residuals_alone_are_counted() -> None:
    _, _, profile = measured()
    maxmin = profile.layers[3]
    undo = next(o for o in maxmin.moonwalk if o.name == "undo")
    assert undo.residual_bytes == profile.activation_bytes[4] // 4 // 16  # a bit a pair
    linear = profile.layers[2].moonwalk[0]
    assert (linear.residual_bytes, linear.keeps_input, linear.keeps_output) == (0, False, False)
    _, held = operations.forward(jnp.exp, jnp.ones(3), rule=rules.VjpStore())
    assert held.keeps_output  # as `jax.vjp` of exp does
    assert residuals.new_bytes(held) == 0


@layer
class Own:
    """A layer that flattens its input, and whose gain has one axis."""

    scale: Any
    weight: Any

    def __call__(self, x: Any) -> Any:
        return jnp.sin(x.reshape(-1, 8) @ self.weight).reshape(4, 6, 3)[:, None] * self.scale


def clipped(x: Any) -> Any:
    return jnp.where(x > 0, jnp.minimum(x, 1.0), 0)


@pytest.mark.parametrize("activation", [jax.nn.relu, jax.nn.relu6, lambda x: jnp.where(x > 0, x, 0), clipped])
def test_numbers_that_fill_an_array_are_not_kept(activation: Any) -> None:
    """`jax.vjp` of these keeps masks, and zeros as large as the activation."""
    x = jnp.linspace(-2.0, 2.0, 64).reshape(8, 8)
    rule = rules.VjpStore()
    y, held = operations.forward(activation, x, rule=rule)
    zeros = [one for one in held.spec.sources if one[0] == "all"]
    assert zeros
    assert {one[1] for one in zeros} == {0.0}
    if activation is not clipped:  # a mask of 64 bits
        assert residuals.new_bytes(held) == 8
    _, ct = operations.store_backward(activation, held, x, y, 2 * jnp.ones_like(y), rule=rule)
    assert jnp.array_equal(ct, 2 * jax.grad(lambda x: jnp.sum(activation(x)))(x))


def test_numbers_told_from_arrays() -> None:
    """Only what is one number whatever the arguments: not an argument that happens to be filled with one, nor
    a product of it. Other arrays of constants are programs."""
    zeros = jnp.zeros((4, 4))

    def make(scale: float, x: Any) -> Any:
        filled = jnp.full((3,), 2, jnp.int32).astype(jnp.float32)
        return [
            x,
            filled,
            x * scale,
            jnp.full((2,), scale),
            jax.jit(lambda a: a)(jnp.ones((2, 2))),
            jnp.arange(3),
        ]

    same, *others, counted = residuals.origins(make, 0.5, zeros)
    assert same.leaf is zeros
    assert others == [2.0, None, 0.5, 1.0]
    assert isinstance(counted, residuals.Made)
    assert jnp.array_equal(counted(), jnp.arange(3))
    assert residuals.origins(make, 1, zeros)[3] == 1
    assert residuals.origins(make, bytearray(b"0"), zeros) == ()  # neither an array nor hashable


def test_an_input_in_another_shape_is_not_kept_anew() -> None:
    """As dense layers of more than two axes have it, and the gain of a normalisation."""
    x = jax.random.normal(jax.random.key(0), (4, 6, 8))

    made = (
        Dense.init(jax.random.key(2), 8, 8),
        layers.Sequential((layers.Flatten(2), Dense.init(jax.random.key(3), 48, 5))),
        Own(jnp.arange(3.0), jax.random.normal(jax.random.key(1), (8, 3))),
    )
    for one in made:
        rule = rules.VjpStore()
        y, pull = jax.vjp(lambda layer, x: layer(x), one, x)
        got, held = operations.forward(one, x, rule=rule)
        assert jnp.array_equal(got, y)
        assert held.keeps_input
        assert not any(leaf.size in (x.size, 3) for leaf in held.own)
        grads, ct = operations.store_backward(one, held, x, None, jnp.ones_like(y), rule=rule)
        want, want_ct = pull(jnp.ones_like(y))
        assert jnp.allclose(ct, want_ct, rtol=1e-5)
        assert all(map(jnp.allclose, grads, jax.tree.leaves(want)))
    # Neither a transposed input nor one of other numbers is the input in another shape.
    turned = residuals.origins(
        lambda x: [x.T, jnp.reshape(x, (2, -1)) + 0, jax.lax.reshape(x, (192,), (2, 1, 0))], x
    )
    assert turned == (None, None, None)


def test_profiles_are_measured_once_for_equal_layers() -> None:
    _, _, profile = measured()
    assert profile.layers[2].store == profile.layers[4].store
    assert profile.layers[2].moonwalk == profile.layers[4].moonwalk
    assert mw.Profile.from_json(profile.to_json()) == profile


def test_the_first_touch_of_memory_is_measured() -> None:
    found = touch.measured()
    assert 0 <= found.kept_bytes <= 2**25
    assert 0 <= found.first_touch_mib_ns < 5e6  # 5 ms a MiB: a page in 20 microseconds


@layer
class Masked:
    """Scores of which each row sees those before it alone, and a softmax of them."""

    def __call__(self, x: Any) -> Any:
        """Applies the layer."""
        scores = jnp.einsum("bik,bjk->bij", x, x)
        before = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        return jax.nn.softmax(jnp.where(before, scores, -jnp.inf)) @ x


def test_a_mask_that_no_argument_changes_is_made_again() -> None:
    """Not packed and kept, once for every example: a kernel more each way, and no fusion with the softmax."""
    x = jax.random.normal(jax.random.key(0), (3, 8, 4))
    rule = rules.VjpStore()
    _, held = operations.forward(Masked(), x, rule=rule)
    kinds = [source[0] for source in held.spec.sources]
    assert "made" in kinds
    assert "bits" not in kinds
    assert not any(leaf.dtype == jnp.uint8 for leaf in held.own)
    again = operations.forward(Masked(), x, rule=rule)[1]
    assert held.spec.sources == again.spec.sources  # programs compare by what they compute


@pytest.mark.parametrize("depth", [2, 6])
def test_gradients_through_masks_that_are_made_again(depth: int) -> None:
    """Written out and in loops."""
    net = mw.stack(mw.Chain([Masked()] * depth), x := jax.random.normal(jax.random.key(0), (2, 8, 4)))
    runs = tuple(Run(kind=RunKind.STORE, start=i, stop=i + 1, options=("vjp",)) for i in range(depth))
    want = jax.grad(lambda x: jnp.sum(net(x) ** 2))(x)
    got = mw.jit(jax.grad(lambda x: jnp.sum(mw.apply(mw.Schedule(runs=runs), net, x) ** 2)))(x)
    assert relative_error(got, want) < 1e-5


def test_what_an_argument_changes_is_kept() -> None:
    """A mask of the input's signs, and one of a closed-over array: nothing here says what that holds."""
    table = jnp.arange(8.0) > 3

    def signs(x: Any) -> Any:
        return jnp.where(x > 0, x, 0.5 * x)

    def closed(x: Any) -> Any:
        return jnp.where(table, x * x, x)

    x = jnp.linspace(-1.0, 1.0, 8)
    for function in (signs, closed):
        found = residuals.origins(lambda f, x: jax.vjp(f, x)[1], function, x)
        assert not any(isinstance(one, residuals.Made) for one in found)
