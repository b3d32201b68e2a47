# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # A sweep on a Dask cluster, and its figure
#
# Plans for many budgets, depths or devices are independent of each other. Here: the frontier of networks of
# several widths, on a cluster of two workers in this process. On a real cluster only the address of the
# scheduler changes.
#
# The experiments of the repository do the same at full size: `python -m experiments.budget_sweep --executor
# dask://HOST:PORT`. Finished points are kept, and a second call goes on where the first stopped.

# %%
import jax
import jax.numpy as jnp
from dask.distributed import Client, LocalCluster

import mwplan as mw


@mw.layers.layer
class Block:
    weight: jax.Array

    def __call__(self, x):
        return x + jnp.tanh(x @ self.weight)


# %% [markdown]
# ## One point
#
# A function of plain values that returns plain values, so that it can go to any machine. It estimates for a
# device, and needs none.


# %%
def point(width, depth=16, batch=32768, device="h100"):
    net = mw.Chain([Block(jax.ShapeDtypeStruct((width, width), jnp.float32))] * depth)
    frontier = mw.frontier(mw.estimate(net, jax.ShapeDtypeStruct((batch, width), jnp.float32), device=device))
    return {"width": width, "points": frontier.points}


# %% [markdown]
# ## The sweep
#
# `processes=False` keeps the workers in this process; `Client("tcp://HOST:PORT")` connects to a cluster.

# %%
with (
    LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
    Client(cluster) as client,
):
    found = client.gather(client.map(point, (64, 256, 1024), pure=False))
for one in found:
    print(f"width {one['width']}: {len(one['points'])} schedules")

# %% [markdown]
# ## The figure

# %%
import matplotlib.pyplot as plt

figure, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
for one in found:
    most, fastest = one["points"][-1]
    sizes = [size / most for size, _ in one["points"]]
    ax.step(sizes, [time / fastest for _, time in one["points"]], where="post", label=f"width {one['width']}")
ax.set(xlabel="memory over the fastest schedule's", ylabel="time over the fastest", ylim=(0.95, 3))
_ = ax.legend(frameon=False)
