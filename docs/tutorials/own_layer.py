# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # A layer of your own
#
# From a formula to a layer with a vijp and an inverse, checked, and used in a plan. The layer is a chain of
# Householder reflections,
#
# $$y = x\,H_1 H_2 \cdots H_m + b, \qquad H_i = I - 2\,\frac{v_i^\top v_i}{|v_i|^2}.$$
#
# ## The rule
#
# The layer is affine with Jacobian $J$, $J^\top = (H_1 \cdots H_m)^\top$, so that $\bar x = \bar y J^\top$.
# Reflections are orthogonal, $J J^\top = I$. Nothing is erased, and the vijp is $\bar y = \bar x J$: the
# layer itself, without its bias, applied to the cotangent. No residuals, growth 1. Its inverse is $x = (y -
# b) J^\top$.

# %%
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

import mwplan as mw
from mwplan.layers import MaxMin, layer
from mwplan.network.rules import InvertRule, VijpRule, full_precision


@layer
class Reflections:
    """`y = x` reflected along each row of `directions` in turn, plus `bias`."""

    directions: jax.Array
    bias: jax.Array

    def turned(self, x, back=False):
        """Without the bias; `back`: the reflections in the other order, which undoes them."""
        for v in self.directions[::-1] if back else self.directions:
            x = x - 2 * (x @ v)[..., None] * v / (v @ v)
        return x

    def __call__(self, x):
        return self.turned(x) + self.bias

    def vijp_rules(self, x: Any) -> list[VijpRule]:
        return [Turn()]

    def invert_rules(self, x: Any) -> list[InvertRule]:
        return [TurnBack()]


# %% [markdown]
# A rule is a small frozen dataclass with a name, by which schedules know it. `forward` and `reverse` have
# defaults: what `jax.vjp` with respect to the input keeps, which is nothing for a linear layer (below is one
# that is not linear). `rebuild` is the vijp. Products within it ask for full precision, because a GPU would
# round them to ten bits.


# %%
@dataclass(frozen=True)
class Turn(VijpRule):
    """The output's cotangent is the input's times `J`: the layer without its bias."""

    name: str = "turn"

    @full_precision
    def rebuild(self, layer, x, ct_in, fragment):
        return layer.turned(ct_in)


@dataclass(frozen=True)
class TurnBack(InvertRule):
    """The input is the output without the bias, times the transpose of `J`."""

    name: str = "turn_back"

    @full_precision
    def inverse(self, layer, y, kept):
        return layer.turned(y - layer.bias, back=True)


# %% [markdown]
# ## Checks
#
# The vijp has to undo `jax.vjp`, here to float32's rounding; the suite's checks compare in float64.

# %%
first, second, third = jax.random.split(jax.random.key(0), 3)
one = Reflections(jax.random.normal(first, (2, 16)), jnp.ones(16))
x, ct_out = jax.random.normal(second, (256, 16)), jax.random.normal(third, (256, 16))

y, vjp_fn = jax.vjp(one, x)
(ct_in,) = vjp_fn(ct_out)
y, vijp_fn = mw.vijp(one, x, "turn")
rebuilt = vijp_fn(ct_in)
print(f"off by {jnp.linalg.norm(rebuilt - ct_out) / jnp.linalg.norm(ct_out):.0e}")
assert jnp.allclose(rebuilt, ct_out, atol=1e-5)

# %% [markdown]
# Growth is the factor by which a vijp multiplies an error that it is given. For an orthogonal layer it is 1,
# so that depth costs no accuracy.

# %%
from mwplan.profiling import growth

local, factor = growth.measure(one, Turn(), x, first)
print(f"local error {local:.0e}, growth {factor:.2f}")

# %% [markdown]
# What mwplan now offers for the layer, and why it has no more:

# %%
print(mw.explain(one, x))

# %% [markdown]
# ## A layer that is not linear
#
# For such a layer the default `forward` keeps what `jax.vjp` does, more than the input. The input is there
# anyway, so a rule should keep that alone, and `reverse` differentiate from it.


# %%
@layer
class Squash:
    """`y = x / 5 + tanh(x)`, elementwise."""

    def __call__(self, x):
        return x / 5 + jnp.tanh(x)

    def slope(self, x):
        return 1 / 5 + 1 - jnp.tanh(x) ** 2

    def vijp_rules(self, x: Any) -> list[VijpRule]:
        return [ByItsInput()]


@dataclass(frozen=True)
class ByItsInput(VijpRule):
    """The cotangent over the slope, which is at least a fifth."""

    name: str = "by_its_input"

    def forward(self, layer, x):
        return layer(x), x

    def reverse(self, layer, x, ct_out):
        return ct_out * layer.slope(x), ()

    def rebuild(self, layer, x, ct_in, fragment):
        return ct_in / layer.slope(x)


print(mw.explain(Squash(), x))
y, vjp_fn = jax.vjp(Squash(), x)
rebuilt = mw.vijp(Squash(), x)[1](*vjp_fn(ct_out))
assert jnp.allclose(rebuilt, ct_out, atol=1e-5)

# %% [markdown]
# ## In a network
#
# Three of them with MaxMin between, by vijps alone, in the least memory that they allow. (Left to itself the
# planner recomputes a network this small.)

# %%
keys = jax.random.split(jax.random.key(1), 3)
net = mw.Chain(
    [f for k in keys for f in (Reflections(jax.random.normal(k, (2, 16)), jnp.zeros(16)), MaxMin())]
)
batch = jax.random.normal(first, (4096, 16))
profile = mw.estimate(net, batch, device="h100")  # costs from shapes; mw.profile(net, batch) measures here
frontier = mw.frontier(profile, allowed=frozenset({mw.Strategy.VIJP}))
schedule = frontier.at(frontier.least_bytes)
print(schedule)

# %%
step = mw.jit(mw.value_and_grad(lambda y: jnp.mean(jnp.sin(y)), schedule))
(value, report), grads = step(net, batch)
truth = jax.jit(jax.grad(lambda net: jnp.mean(jnp.sin(net(batch)))))(net)
pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(truth))
apart = max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in pairs)
print(f"reported {report.worst:.0e}, gradients off by {apart:.0e}")
assert apart < 1e-4

# %% [markdown]
# ## Contributing it
#
# `CONTRIBUTING.md`, "How to add a layer", says where the class, its derivation and its row of tests go. All
# checks of the suite then run on it.
