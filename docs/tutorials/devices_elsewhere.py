# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Planning for an H200 or a TPU on a laptop
#
# Shapes are enough to plan, and XLA's compilers run without the device. First from shapes alone, then by the
# compiler's word, where one is installed.

# %%
import jax
import jax.numpy as jnp

import mwplan as mw
from mwplan.layers import Dense, LayerNorm, Residual, Sequential, Smooth

WIDTH, BLOCKS = 256, 6


def block(key):
    up, down = jax.random.split(key)
    return Residual(
        Sequential(
            (
                LayerNorm.init(None, WIDTH),
                Dense.init(up, WIDTH, 4 * WIDTH),
                Smooth("gelu"),
                Dense.init(down, 4 * WIDTH, WIDTH),
            )
        )
    )


def network():
    return mw.Chain([block(key) for key in jax.random.split(jax.random.key(0), BLOCKS)])


net = jax.eval_shape(network)  # shapes: no memory is taken here for weights
x = jax.ShapeDtypeStruct((65536, WIDTH), jnp.float32)

# %% [markdown]
# ## From shapes
#
# `mw.estimate` counts bytes and takes times from a roofline of the device's published figures: lower bounds,
# whose ratios are better than they are. If the device's compiler is installed, it prices the operations.

# %%
profile = mw.estimate(net, x, device="h200")
frontier = mw.frontier(profile)
most, fastest = frontier.points[-1]
for share in (1.0, 0.5, 0.25):
    schedule = frontier.at(max(int(share * most), frontier.least_bytes))
    print(f"{schedule.total_bytes / 2**30:.2f} GiB: {schedule.time_ns / fastest:.2f} of the time")

# %% [markdown]
# A device of your own is described by its data sheet:

# %%
card = mw.Device(
    name="small card",
    half_flop_per_s=121e12,
    tf32_flop_per_s=60e12,
    float32_flop_per_s=30.3e12,
    float64_flop_per_s=0.47e12,
    bytes_per_s=300e9,
    launch_ns=2500,
    memory_bytes=24 * 10**9,
)
print(mw.plan(mw.estimate(net, x, device=card), budget="2GiB"))

# %% [markdown]
# ## By the compiler's word
#
# `mw.targets.compile` compiles a program for a GPU or a TPU that is not here: its temporaries, kernels, and a
# modelled time. `mw.fit(..., device="h200")` plans, compiles and plans again until the step keeps the budget.
# Both need the compiler: `pip install 'mwplan[targets]'` (GPUs) or `'mwplan[tpu]'`, and `JAX_PLATFORMS=cpu`.


# %%
def loss(y):
    return jnp.mean(y**2)


for target in ("h200", "v5e"):
    if not mw.targets.installed(target):
        print(f"skipped: no compiler for {target} is installed here")
        continue
    compiled = mw.targets.compile(jax.value_and_grad(lambda net, x: loss(net(x))), net, x, target=target)
    print(compiled)

# %%
if mw.targets.installed("h200"):
    fit = mw.fit(loss, net, x, budget="1GiB", device="h200")
    print(fit)
else:
    print("skipped: the fit for an H200 needs its compiler")
