# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # A transformer under a budget
#
# A small transformer in plain functions, without a word about memory. We ask what its gradient step takes,
# give it half of that, look at the plan, and train it. The sizes are small so that this page runs in seconds;
# nothing else about it is.

# %%
import jax
import jax.numpy as jnp
import optax

import mwplan as mw

VOCABULARY, WIDTH, BLOCKS, LENGTH, BATCH = 64, 32, 3, 64, 16


def block(p, x):
    """Attention, then a perceptron, each added to the stream."""
    q, k, v = jnp.split(x @ p["qkv"], 3, axis=-1)
    scores = jnp.where(jnp.tri(LENGTH, dtype=bool), q @ k.mT / WIDTH**0.5, -jnp.inf)
    x = x + jax.nn.softmax(scores, axis=-1) @ v @ p["out"]
    return x + jax.nn.gelu(x @ p["up"]) @ p["down"]


def loss(params, text):
    """Mean cross-entropy of the next character."""
    x = params["embed"][text]
    for p in params["blocks"]:
        x = block(p, x)
    logits = x[:, :-1] @ params["embed"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()


def weights(key, *shape):
    return 0.1 * jax.random.normal(key, shape)


keys = iter(jax.random.split(jax.random.key(0), 99))
shapes = {
    "qkv": (WIDTH, 3 * WIDTH),
    "out": (WIDTH, WIDTH),
    "up": (WIDTH, 4 * WIDTH),
    "down": (4 * WIDTH, WIDTH),
}
params = {
    "embed": weights(next(keys), VOCABULARY, WIDTH),
    "blocks": [{name: weights(next(keys), *shape) for name, shape in shapes.items()} for _ in range(BLOCKS)],
}
text = (jnp.arange(BATCH * LENGTH) ** 2 // 7 % VOCABULARY).reshape(BATCH, LENGTH)

# %% [markdown]
# ## What it takes
#
# Nothing has to run: a compiled program says what it needs. `mw.jit` is `jax.jit` with the options under
# which plans hold on this platform.

# %%
plain = mw.jit(jax.value_and_grad(loss)).lower(params, text).compile()
needed = mw.temporaries(plain)
fixed = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(params)) + text.nbytes
print(f"backpropagation: {needed / 2**20:.1f} MiB of temporaries, {fixed / 2**20:.1f} MiB fixed")

# %% [markdown]
# ## Half of it
#
# `mw.fit_function` cuts the function into pieces, profiles them, plans, compiles, and measures. The budget is
# of the whole step.

# %%
fitted = mw.fit_function(loss, params, text, budget=fixed + needed // 2)
print(fitted)

# %% [markdown]
# Which pieces there are, and what becomes of each: S is stored, R recomputed, and of F the whole cotangent is
# kept.

# %%
print(fitted.cut)
print(fitted.schedule)

# %% [markdown]
# ## The same gradient
#
# No cotangent is rebuilt but from itself, so the gradient is backpropagation's to the order of additions.

# %%
(value, report), grads = fitted.step(params, text)
expected, truth = plain(params, text)
apart = max(
    float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(truth))
)
print(f"loss {value:.4f}, by backpropagation {expected:.4f}; worst gradient off by {apart:.0e}")
assert apart < 1e-4

# %% [markdown]
# ## Training
#
# The step is a function like any other.

# %%
optimizer = optax.adam(3e-3)
state = optimizer.init(params)
for step in range(20):
    (value, report), grads = fitted.step(params, text)
    updates, state = optimizer.update(grads, state)
    params = optax.apply_updates(params, updates)
    if step % 5 == 4:
        print(f"step {step + 1}: loss {value:.3f}")

# %% [markdown]
# ## As checkpoints
#
# If you would rather not use mwplan at run time: the plan in the words of `jax.checkpoint`.

# %%
print(fitted.policy())
