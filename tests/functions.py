"""Models and losses as people write them, in plain JAX: nothing of this package."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


def mlp(depth: int = 6, width: int = 16, batch: int = 64) -> tuple[PyTree, Any, Any]:
    """Parameters, inputs and targets."""
    keys = jax.random.split(jax.random.key(0), depth)
    params = [{"w": jax.random.normal(k, (width, width)) / width**0.5, "b": jnp.zeros(width)} for k in keys]
    x, y = jax.random.normal(jax.random.key(1), (2, batch, width))
    return params, x, y


def mlp_loss(params: PyTree, x: Any, y: Any) -> Any:
    """Mean squared error."""
    for p in params:
        x = jnp.tanh(x @ p["w"] + p["b"])
    return jnp.mean((x - y) ** 2)


def norm(x: Any, p: PyTree) -> Any:
    """LayerNorm."""
    mean = x.mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(jnp.var(x, axis=-1, keepdims=True) + 1e-5) * p["g"] + p["b"]


def attention(x: Any, p: PyTree, mask: Any, heads: int = 4) -> Any:
    """Multi-head self-attention."""
    b, s, d = x.shape
    q, k, v = ((x @ p[name]).reshape(b, s, heads, d // heads) for name in "qkv")
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(d // heads)
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e9))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, s, d) @ p["o"]


def block(x: Any, p: PyTree, mask: Any) -> Any:
    """A transformer's block."""
    x = x + attention(norm(x, p["ln1"]), p["attn"], mask)
    return x + jax.nn.gelu(norm(x, p["ln2"]) @ p["up"]) @ p["down"]


def transformer(
    depth: int = 3, width: int = 32, length: int = 32, vocabulary: int = 50, batch: int = 4
) -> tuple[PyTree, Any]:
    """Parameters (tied embeddings) and tokens."""
    keys = iter(jax.random.split(jax.random.key(0), 8 * depth + 8))

    def normal(*shape: int) -> Any:
        return jax.random.normal(next(keys), shape) * 0.1

    def norms() -> PyTree:
        return {"g": jnp.ones(width), "b": jnp.zeros(width)}

    blocks = [
        {
            "ln1": norms(), "ln2": norms(), "attn": {n: normal(width, width) for n in "qkvo"},
            "up": normal(width, 4 * width), "down": normal(4 * width, width),
        }
        for _ in range(depth)
    ]  # fmt: skip
    params = {
        "wte": normal(vocabulary, width), "wpe": normal(length, width), "lnf": norms(), "blocks": blocks
    }  # fmt: skip
    return params, jax.random.randint(jax.random.key(1), (batch, length + 1), 0, vocabulary)


def head(x: Any, params: PyTree, targets: Any) -> Any:
    """The cross-entropy of the next token, with the embedding for the last product."""
    logits = norm(x, params["lnf"]) @ params["wte"].T
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1).mean()


def transformer_loss(params: PyTree, batch: Any) -> Any:
    """A decoder's loss, blocks in a Python loop."""
    tokens, targets = batch[:, :-1], batch[:, 1:]
    mask = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))
    x = params["wte"][tokens] + params["wpe"][: tokens.shape[1]]
    for p in params["blocks"]:
        x = block(x, p, mask)
    return head(x, params, targets)


def scanned(params: PyTree) -> PyTree:
    """A transformer's parameters with its blocks stacked."""
    return {**params, "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *params["blocks"])}


def scanned_loss(params: PyTree, batch: Any) -> Any:
    """As `transformer_loss`, blocks in a scan, each in a checkpoint, the mask made within."""
    tokens, targets = batch[:, :-1], batch[:, 1:]

    @jax.checkpoint
    def body(carry: Any, p: PyTree) -> tuple[Any, None]:
        x, count = carry
        mask = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))
        return (block(x, p, mask), count + 1), None

    x = params["wte"][tokens] + params["wpe"][: tokens.shape[1]]
    (x, _), _ = jax.lax.scan(body, (x, 0), params["blocks"])
    return head(x, params, targets)
