# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Where recomputation ends, and vijps go on
#
# Recomputation trades time for memory until it has to nest, and then it ends: it always keeps some
# activations. Layers that can be inverted, and layers whose Jacobians can, go on. Two networks show it:
#
# - a **reversible** one, of couplings: the input of each block follows from its output;
# - a **1-Lipschitz** one, of orthogonal layers and MaxMin: the output of a MaxMin does not tell its input,
#   but its Jacobian is a permutation, which one bit a pair describes.

# %%
import jax
import jax.numpy as jnp

import mwplan as mw
from mwplan.layers import Coupling, Dense, MaxMin, OrthogonalDense, Sequential, Smooth

WIDTH, BLOCKS, BATCH = 64, 8, 8192
keys = iter(jax.random.split(jax.random.key(0), 99))


def branch():
    """A branch of a coupling: smooth, so that its inverse is accurate."""
    return Sequential((Dense.init(next(keys), WIDTH // 2, WIDTH // 2), Smooth("gelu")))


def orthogonal(key):
    """An orthogonal layer: a product of eight reflections."""
    return OrthogonalDense.init(key, WIDTH, WIDTH, method="householder", reflections=8)


nets = {
    "reversible": mw.Chain([Coupling(branch(), branch()) for _ in range(BLOCKS)]),
    "Lipschitz": mw.Chain([f for _ in range(BLOCKS) for f in (orthogonal(next(keys)), MaxMin())]),
}
x = jax.random.normal(next(keys), (BATCH, WIDTH))

# %% [markdown]
# ## Every budget at once
#
# Costs are estimated here for an H100, so that the figures are the same on every machine; `mw.profile(net,
# x)` measures this one. Errors are measured, on these weights. `allowed` keeps some strategies out.

# %%
recompute = frozenset({mw.Strategy.STORE, mw.Strategy.RECOMPUTE})
ways = {
    "recomputation": recompute,
    "and inversion": recompute | {mw.Strategy.INVERT},
    "and vijps": recompute | {mw.Strategy.VIJP, mw.Strategy.FRAGMENT},
}
frontiers = {}
for name, net in nets.items():
    profile = mw.estimate(net, x, device="h100")
    for way, allowed in ways.items():
        frontiers[name, way] = mw.frontier(profile, allowed=allowed)

# %% [markdown]
# The fastest schedule of each way, at a budget that is small for all of them:

# %%
for name in nets:
    fastest = min(time for way in ways for _, time in frontiers[name, way].points)
    budget = int(1.1 * max(frontiers[name, way].least_bytes for way in ways))
    print(f"{name}, in {budget / 2**20:.1f} MiB:")
    for way in ways:
        schedule = frontiers[name, way].at(budget)
        print(f"  {way}: {schedule.time_ns / fastest:.2f} of the least time")

# %% [markdown]
# At eight blocks recomputation still gets nearly as low, nested several levels deep. With depth it does not:
# at 512 Lipschitz blocks the smallest recomputation within 1.7 of backpropagation's time takes 15.9 MiB,
# where inversion and vijps go on to 8.8 at 1.47 (`results/README.md`, time against memory). The whole
# frontiers:

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for ax, name in zip(axes, nets):
    fastest = min(time for way in ways for _, time in frontiers[name, way].points)
    for way in ways:
        points = frontiers[name, way].points
        sizes, times = [size / 2**20 for size, _ in points], [time / fastest for _, time in points]
        ax.step(sizes, times, where="post", label=way)
    ax.set(title=name, xlabel="memory of the step (MiB)", ylabel="time over the fastest", ylim=(0.9, 6))
_ = axes[0].legend(frameon=False)
# %% [markdown]
# ## Running it
#
# A plan of vijps alone for the Lipschitz network, run on this machine. `report.worst` is the largest relative
# discrepancy between what was rebuilt and the truth, and the gradient is compared with `jax.grad`'s.

# %%
net = nets["Lipschitz"]
frontier = mw.frontier(mw.estimate(net, x, device="h100"), allowed=frozenset({mw.Strategy.VIJP}))
schedule = frontier.at(frontier.least_bytes)
print(schedule)


# %%
def loss(y):
    return jnp.mean(jnp.sin(y))


step = mw.jit(mw.value_and_grad(loss, schedule))
(value, report), grads = step(net, x)
truth = jax.jit(jax.grad(lambda net: loss(net(x))))(net)
pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(truth))
apart = max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in pairs)
plain = mw.jit(jax.value_and_grad(lambda net: loss(net(x)))).lower(net).compile()
planned = step.lower(net, x).compile()
print(f"reported {report.worst:.0e}, gradient off by {apart:.0e}")
print(f"temporaries: {mw.temporaries(planned):_} bytes, backpropagation {mw.temporaries(plain):_}")
assert apart < 1e-4
