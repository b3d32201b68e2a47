"""Models of other libraries, as their users write them."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

PyTree = Any


# -- Equinox
# -----------------------------------------------------------------------------------------------------


class Layer(eqx.Module):
    """A pre-norm block; dropout's rate and mode are leaves that are no arrays."""

    norm1: eqx.nn.LayerNorm
    norm2: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    dropout: eqx.nn.Dropout

    def __init__(self, width: int, heads: int, key: Any) -> None:
        a, b, c = jax.random.split(key, 3)
        self.norm1, self.norm2 = eqx.nn.LayerNorm(width), eqx.nn.LayerNorm(width)
        self.attention = eqx.nn.MultiheadAttention(heads, width, key=a)
        self.up, self.down = eqx.nn.Linear(width, 4 * width, key=b), eqx.nn.Linear(4 * width, width, key=c)
        self.dropout = eqx.nn.Dropout(0.1)

    def __call__(self, x: Any, key: Any) -> Any:
        """Of one sequence."""
        y = jax.vmap(self.norm1)(x)
        x = x + self.dropout(self.attention(y, y, y), key=key)
        y = jax.vmap(self.norm2)(x)
        return x + jax.vmap(self.down)(jax.nn.gelu(jax.vmap(self.up)(y)))


class ViT(eqx.Module):
    """A small vision transformer."""

    patch: eqx.nn.Conv2d
    position: jax.Array
    layers: list[Layer]
    head: eqx.nn.Linear
    activation: Any

    def __init__(self, width: int, depth: int, key: Any) -> None:
        keys = jax.random.split(key, depth + 3)
        self.patch = eqx.nn.Conv2d(3, width, 4, stride=4, key=keys[0])
        self.position = jax.random.normal(keys[1], (16, width)) * 0.1
        self.layers = [Layer(width, 2, k) for k in keys[2:-1]]
        self.head = eqx.nn.Linear(width, 10, key=keys[-1])
        self.activation = jnp.tanh

    def __call__(self, image: Any, key: Any) -> Any:
        """Of one image."""
        x = self.patch(image).reshape(self.position.shape[1], -1).T + self.position
        for i, layer in enumerate(self.layers):
            x = layer(x, jax.random.fold_in(key, i))
        return self.head(self.activation(x.mean(0)))


def vit_loss(model: ViT, images: Any, labels: Any, key: Any) -> Any:
    """Cross-entropy of a batch."""
    logits = jax.vmap(model)(images, jax.random.split(key, images.shape[0]))
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()


def vit() -> tuple[Any, PyTree, tuple[Any, ...]]:
    """Loss, model, arguments."""
    model = ViT(16, 3, jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (4, 3, 16, 16))
    return vit_loss, model, (images, jnp.arange(4), jax.random.key(2))


# -- Flax NNX
# ----------------------------------------------------------------------------------------------------


def attention(query: Any, key: Any, value: Any, mask: Any = None, **_: Any) -> Any:
    """In the dtype of its arguments: the softmax of Flax's own is in float32, whose gradients differ in the
    eighth digit from program to program."""
    scores = jnp.einsum("...qhd,...khd->...hqk", query, key) / query.shape[-1] ** 0.5
    scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    return jnp.einsum("...hqk,...khd->...qhd", jax.nn.softmax(scores), value)


class DecoderLayer(nnx.Module):
    """A pre-norm block with causal attention."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.norm = nnx.RMSNorm(width, rngs=rngs, param_dtype=jnp.float64)
        self.attention = nnx.MultiHeadAttention(
            2, width, rngs=rngs, decode=False, param_dtype=jnp.float64, dtype=jnp.float64,
            attention_fn=attention,
        )  # fmt: skip
        self.up = nnx.Linear(width, 2 * width, rngs=rngs, param_dtype=jnp.float64)
        self.down = nnx.Linear(2 * width, width, rngs=rngs, param_dtype=jnp.float64)

    def __call__(self, x: Any, mask: Any) -> Any:
        """Of a batch."""
        x = x + self.attention(self.norm(x), mask=mask)
        return x + self.down(jax.nn.silu(self.up(self.norm(x))))


class Decoder(nnx.Module):
    """A decoder whose embedding is its last product too."""

    def __init__(self, width: int, depth: int, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(40, width, rngs=rngs, param_dtype=jnp.float64, dtype=jnp.float64)
        self.layers = nnx.List([DecoderLayer(width, rngs) for _ in range(depth)])
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, tokens: Any) -> Any:
        """Logits."""
        self.calls[...] += 1
        x = self.embed(tokens)
        mask = nnx.make_causal_mask(tokens)
        for layer in self.layers:
            x = layer(x, mask)
        return self.embed.attend(x)


def decoder() -> tuple[Any, PyTree, tuple[Any, ...]]:
    """Loss (with the module's new state), parameters, arguments."""
    graph, params, rest = nnx.split(Decoder(16, 2, nnx.Rngs(0)), nnx.Param, ...)

    def loss(params: PyTree, rest: PyTree, tokens: Any) -> tuple[Any, PyTree]:
        model = nnx.merge(graph, params, jax.tree.map(lambda leaf: leaf, rest))  # variables of its own
        logits = model(tokens[:, :-1])
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1)
        return -picked.mean(), nnx.state(model, nnx.Not(nnx.Param))

    return loss, params, (rest, jax.random.randint(jax.random.key(1), (4, 13), 0, 40))


# -- Flax Linen
# --------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two convolutions with batch normalisation, and the way around them."""

    channels: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """Of a batch."""
        y = nn.Conv(self.channels, (3, 3), self.stride, use_bias=False, param_dtype=jnp.float64)(x)
        y = nn.relu(nn.BatchNorm(use_running_average=False, param_dtype=jnp.float64)(y))
        y = nn.Conv(self.channels, (3, 3), use_bias=False, param_dtype=jnp.float64)(y)
        y = nn.BatchNorm(use_running_average=False, param_dtype=jnp.float64)(y)
        if x.shape != y.shape:
            x = nn.Conv(self.channels, (1, 1), self.stride, use_bias=False, param_dtype=jnp.float64)(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Some blocks and a classifier."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """Logits."""
        x = nn.relu(nn.Conv(8, (3, 3), param_dtype=jnp.float64)(x))
        for channels, stride in ((8, 1), (8, 1), (16, 2)):
            x = Residual(channels, stride)(x)
        return nn.Dense(10, param_dtype=jnp.float64)(x.mean((1, 2)))


def resnet() -> tuple[Any, PyTree, tuple[Any, ...]]:
    """Loss (with the new averages), parameters, arguments."""
    net = ResNet()
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    variables = net.init(jax.random.key(0), images)

    def loss(params: PyTree, averages: PyTree, images: Any, labels: Any) -> tuple[Any, PyTree]:
        both = {"params": params, "batch_stats": averages}
        logits, new = net.apply(both, images, mutable=["batch_stats"])
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean(), new["batch_stats"]

    return loss, variables["params"], (variables["batch_stats"], images, jnp.arange(4))


# -- plain JAX
# ---------------------------------------------------------------------------------------------------


def _conv(x: Any, w: Any, stride: int = 1) -> Any:
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def unet_loss(params: PyTree, noisy: Any, time: Any, noise: Any) -> Any:
    """The squared error of a denoiser: skips from the way down to the way up, time everywhere."""
    angle = time[:, None] * jnp.arange(1.0, 5.0)
    emb = jax.nn.silu(jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1) @ params["time"])
    x, skips = noisy, []
    for p in params["down"]:
        x = jax.nn.silu(_conv(x, p["w"]) + (emb @ p["t"])[:, None, None])
        skips.append(x)
        x = _conv(x, p["s"], 2)
    x = jax.nn.silu(_conv(x, params["middle"]))
    for p, skip in zip(params["up"], skips[::-1]):
        x = jax.image.resize(x, (*skip.shape[:3], x.shape[-1]), "nearest")
        x = jax.nn.silu(_conv(jnp.concatenate([x, skip], -1), p["w"]) + (emb @ p["t"])[:, None, None])
    return jnp.mean((_conv(x, params["out"]) - noise) ** 2)


def unet(channels: tuple[int, ...] = (8, 12, 16)) -> tuple[Any, PyTree, tuple[Any, ...]]:
    """Loss, parameters, arguments."""
    keys = iter(jax.random.split(jax.random.key(0), 50))

    def normal(*shape: int) -> Any:
        fan = 1
        for n in shape[:-1]:
            fan *= n
        return jax.random.normal(next(keys), shape) / fan**0.5

    ins = (3, *channels[:-1])
    down = [
        {"w": normal(3, 3, i, o), "t": normal(8, o), "s": normal(3, 3, o, o)} for i, o in zip(ins, channels)
    ]
    up, before = [], channels[-1]
    for c in channels[::-1]:
        up.append({"w": normal(3, 3, before + c, c), "t": normal(8, c)})
        before = c
    params = {
        "down": down, "up": up, "middle": normal(3, 3, channels[-1], channels[-1]),
        "out": normal(3, 3, channels[0], 3), "time": normal(8, 8),
    }  # fmt: skip
    a, b, c = jax.random.split(jax.random.key(1), 3)
    noisy, noise = jax.random.normal(a, (2, 16, 16, 3)), jax.random.normal(b, (2, 16, 16, 3))
    return unet_loss, params, (noisy, jax.random.uniform(c, (2,)), noise)


def flow_loss(params: PyTree, x: Any) -> Any:
    """The negative log-likelihood under affine couplings with permutations between them."""
    total = jnp.zeros(x.shape[0])
    for p in params:
        a, b = jnp.split(x, 2, -1)
        h = jnp.tanh(a @ p["w1"] + p["b1"])
        scale, shift = jnp.split(h @ p["w2"] + p["b2"], 2, -1)
        scale = jnp.tanh(scale)
        b = b * jnp.exp(scale) + shift
        total = total + scale.sum(-1)
        x = jnp.concatenate([b, a], -1)
    return jnp.mean(0.5 * (x**2).sum(-1) - total)


def flow(depth: int = 6, width: int = 8) -> tuple[Any, PyTree, tuple[Any, ...]]:
    """Loss, parameters, arguments."""
    keys = jax.random.split(jax.random.key(0), 2 * depth)
    params = [
        {
            "w1": jax.random.normal(a, (width // 2, 32)) * 0.3, "b1": jnp.zeros(32),
            "w2": jax.random.normal(b, (32, width)) * 0.1, "b2": jnp.zeros(width),
        }
        for a, b in zip(keys[::2], keys[1::2])
    ]  # fmt: skip
    return flow_loss, params, (jax.random.normal(jax.random.key(1), (32, width)),)
