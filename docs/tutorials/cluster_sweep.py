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
from mwplan.layers import Dense, Smooth

# %% [markdown]
# ## One point
#
# A function of plain values that returns plain values, so that it can go to any machine. It estimates for a
# device, and needs none.


# %%
def point(width, depth=8, batch=32768, device="h100"):
    keys = jax.random.split(jax.random.key(0), depth)
    net = mw.Chain([f for key in keys for f in (Dense.init(key, width, width), Smooth("gelu"))])
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
    found = client.gather(client.map(point, (64, 128, 256), pure=False))
for one in found:
    print(f"width {one['width']}: {len(one['points'])} schedules")

# %% [markdown]
# ## The figure

# %%
from matplotlib.figure import Figure

figure = Figure(figsize=(6, 3.6), layout="constrained")
ax = figure.subplots()
for one in found:
    most, fastest = one["points"][-1]
    sizes = [size / most for size, _ in one["points"]]
    ax.step(sizes, [time / fastest for _, time in one["points"]], where="post", label=f"width {one['width']}")
ax.set(xlabel="memory over the fastest schedule's", ylabel="time over the fastest", ylim=(0.95, 3))
ax.legend(frameon=False)
figure
