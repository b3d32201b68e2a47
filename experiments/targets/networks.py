"""Networks at the sizes at which people train them, as shapes: nothing of their size is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import mwplan as mw
from experiments import zoo
from mwplan import layers as ml
from mwplan.app.training import cross_entropy
from mwplan.common.errors import ArgumentError

Keys = Iterator[jax.Array]


class Shapes(NamedTuple):
    """A network, its input and labels as `jax.ShapeDtypeStruct`s; `loss(chain(x), labels)`."""

    chain: mw.Chain
    x: Any
    labels: Any
    loss: Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Network:
    """`layers(keys)` makes the chain's; `x` and `labels`, shapes; `dtype`, of weights and activations."""

    layers: Callable[[Keys], list[Any]]
    x: jax.ShapeDtypeStruct
    labels: jax.ShapeDtypeStruct
    dtype: Any = jnp.float32

    def shapes(self) -> Shapes:
        """The network as shapes."""

        def make() -> mw.Chain:
            chain = mw.Chain(self.layers(iter(jax.random.split(jax.random.key(0), 1024))))
            return jax.tree.map(
                lambda a: a.astype(self.dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, chain
            )

        x = self.x
        if jnp.issubdtype(x.dtype, jnp.floating):
            x = jax.ShapeDtypeStruct(x.shape, self.dtype)
        return Shapes(jax.eval_shape(make), x, self.labels, _loss)


def _loss(y: Any, labels: Any) -> Any:
    """Cross entropy, in float32 whatever the activations are."""
    return cross_entropy(y.astype(jnp.float32).reshape(-1, y.shape[-1]), labels.reshape(-1))


def _images(batch: int, side: int, channels: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    return jax.ShapeDtypeStruct((batch, side, side, channels), jnp.float32), jax.ShapeDtypeStruct(
        (batch,), jnp.int32
    )


def _of_zoo(dtype: Any = jnp.float32, **sizes: Any) -> Network:
    """A network of `experiments.zoo`."""
    config = zoo.Config(**sizes)
    make, load = zoo.MODELS[config.model]
    if load is zoo.text:
        x = labels = jax.ShapeDtypeStruct((config.batch, config.resolution), jnp.int32)
    else:
        x, labels = _images(config.batch, config.resolution, 1)
    return Network(lambda keys: make(config, keys), x, labels, dtype)


def _bottleneck(keys: Keys, width: int, inner: int) -> Any:
    """Norm, ReLU and a convolution, three times: 1 x 1, 3 x 3, 1 x 1."""

    def part(before: int, after: int, kernel: int) -> list[Any]:
        return [ml.RMSNorm.init(None, before), ml.ReLU(), ml.Conv2D.he(next(keys), before, after, kernel)]

    return zoo.Skip(ml.Sequential((*part(width, inner, 1), *part(inner, inner, 3), *part(inner, width, 1))))


def resnet50(keys: Keys) -> list[Any]:
    """ResNet-50's shape, pre-activation: 3, 4, 6 and 3 bottlenecks of 256 to 2048 channels, from 56 x 56
    pixels on."""
    layers: list[Any] = [ml.SpaceToDepth((4, 4)), ml.Conv2D.he(next(keys), 48, 256)]
    width = 256
    for stage, depth in enumerate((3, 4, 6, 3)):
        if stage:
            layers.append(ml.Conv2D.he(next(keys), width, 2 * width, stride=2, padding=1))
            width *= 2
        layers += [_bottleneck(keys, width, width // 4) for _ in range(depth)]
    return [*layers, zoo.LastMean(), ml.Dense.init(next(keys), width, 1000)]


def vit_b(keys: Keys, width: int = 768, side: int = 224, patch: int = 16, depth: int = 12) -> list[Any]:
    """ViT-B/16: patches, positions, pre-norm blocks of attention and MLP."""
    tiles = (side // patch) ** 2
    layers: list[Any] = [
        ml.SpaceToDepth((patch, patch)),
        ml.Reshape((side // patch, side // patch, 3 * patch**2), (tiles, 3 * patch**2)),
        ml.Dense.init(next(keys), 3 * patch**2, width),
        zoo.Position(0.02 * jax.random.normal(next(keys), (tiles, width))),
    ]
    scale = 1 / math.sqrt(2 * depth)
    for _ in range(depth):
        layers += [
            zoo.Skip(zoo._attention(keys, width, scale, False)),
            zoo.Skip(zoo._feed_forward(keys, width, scale)),
        ]
    return [*layers, ml.LayerNorm.init(None, width), zoo.LastMean(), ml.Dense.init(next(keys), width, 1000)]


#: By name.
NETWORKS: dict[str, Network] = {
    "gpt": _of_zoo(model="gpt", depth=12, width=768, batch=8, resolution=1024),
    "gpt-2-blocks": _of_zoo(model="gpt", depth=2, width=768, batch=8, resolution=1024),
    "gpt-bf16": _of_zoo(jnp.bfloat16, model="gpt", depth=12, width=768, batch=8, resolution=1024),
    "resnet50": Network(resnet50, *_images(64, 224, 3)),
    "resnet50-bf16": Network(resnet50, *_images(64, 224, 3), jnp.bfloat16),
    "vit-b": Network(vit_b, *_images(64, 224, 3)),
    "revnet": _of_zoo(model="revnet", depth=32, width=64, batch=128, resolution=64),
    "lipschitz": _of_zoo(model="lipschitz", depth=64, width=64, batch=256, resolution=32),
    # Small ones, for tests.
    "mlp-small": _of_zoo(model="mlp", depth=4, width=32, batch=64, resolution=8),
}


def network(name: str) -> Network:
    """The one of that name. Raises `ArgumentError` where there is none."""
    if name not in NETWORKS:
        raise ArgumentError(f"`networks` has {name!r}, which is none of {', '.join(NETWORKS)}")
    return NETWORKS[name]
