"""The networks that the experiments train, each by name: `build(Config(model="revnet", depth=32))`.

| name | what it is |
|---|---|
| `strided` | submersive CNN: three resolutions, strided convolutions between them, leaky ReLU |
| `lipschitz` | 1-Lipschitz CNN at one resolution: MaxMin and orthogonal (paraunitary) convolutions |
| `fragmental` | 1D CNN on long signals: SAME convolutions of stride 1, first tap dominant |
| `revnet` | couplings of convolutional branches |
| `revvit` | vision transformer whose blocks are couplings of attention and MLP |
| `mlp` | orthogonal dense layers and leaky ReLU |
| `gpt` | pre-norm transformer on characters; its blocks have no vijp |
| `resnet` | pre-activation ResNet; its blocks have no vijp |

`depth` counts blocks (gpt: transformer blocks, two layers each); with `group=k`, up to k consecutive blocks
of one kind are one layer of the chain, so that very deep networks stay quick to plan; with 0, every layer is
itself. Data comes with scikit-learn: digits, enlarged to the resolution, and the descriptions of its data
sets as text. The long signals are generated.
"""

from __future__ import annotations

import os  # before JAX starts its CPU client

# Linear solves of one step block XLA:CPU's threads while they wait for others: with two threads, a network of
# Cayley convolutions never finishes a step (jaxlib 0.10.2). More threads than cores leave some to wait for.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import mwplan as mw
from mwplan import layers as ml
from mwplan.app.training import cross_entropy, digits
from mwplan.common.errors import ArgumentError

CLASSES = 10
#: Chains of more innermost layers than this are run stacked.
UNROLL = 64
SLOPE = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Sizes of one network. `depth` blocks of `width` channels or features; `resolution`: pixels a side,
    samples of a signal, or characters of a text; `batch` examples; `group` blocks a layer of the chain."""

    model: str
    depth: int = 8
    width: int = 16
    batch: int = 64
    resolution: int = 16
    group: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ArgumentError(f"`model={self.model!r}` is none of {', '.join(MODELS)}")
        for name, least in (("depth", 1), ("width", 1), ("batch", 1), ("resolution", 1), ("group", 0)):
            if getattr(self, name) < least:
                raise ArgumentError(f"`{name}={getattr(self, name)}` must be at least {least}")


class Model(NamedTuple):
    """A network with its first batch: `loss(chain(x), labels)` is a scalar."""

    chain: mw.Chain
    x: Any
    labels: Any
    loss: Callable[[Any, Any], Any]


class Data(NamedTuple):
    """Examples to train on, one a row."""

    x: np.ndarray
    labels: np.ndarray


def build(config: Config) -> Model:
    """The network, initialised by its seed, and the first batch of its data (repeated where the data set is
    smaller)."""
    make, load = MODELS[config.model]
    everything = load(config)
    at = np.arange(config.batch) % len(everything.x)
    layers = make(config, iter(jax.random.split(jax.random.key(config.seed), 4 * config.depth + 8)))
    x, labels = jnp.asarray(everything.x[at]), jnp.asarray(everything.labels[at])
    chain = mw.Chain(layers)
    return Model(grouped(chain, x, config.group) if config.group else chain, x, labels, cross_entropy)


def joined(depth: int, layers: int) -> int:
    """The `group` with which `depth` blocks make a chain of at most `layers` layers; 0 (no grouping) if the
    chain, at two layers a block, is short enough to unroll."""
    return 0 if 2 * depth <= UNROLL else math.ceil(depth / layers)


def grouped(chain: mw.Chain, x: Any, size: int) -> mw.Chain:
    """The layers of `chain`, `size` repetitions of each repeated block joined into one `Sequential`."""
    made: list[Any] = []
    for part in mw.stack(chain, x).parts:
        if not isinstance(part, mw.Stack):
            made.append(part)
            continue
        layers, step = part.unstacked(), len(part.block) * min(size, part.depth)
        made += [ml.Sequential(tuple(layers[at : at + step])) for at in range(0, len(layers), step)]
    return mw.Chain(made)


def data(config: Config) -> Data:
    """All that the network can be trained on."""
    return MODELS[config.model][1](config)


# -- data
# --------------------------------------------------------------------------------


def images(config: Config) -> Data:
    """Handwritten digits, `n resolution resolution 1`, bilinear from 8x8."""
    found = digits(config.seed)
    shape = (len(found.train_x), config.resolution, config.resolution, 1)
    return Data(np.asarray(jax.image.resize(found.train_x, shape, "bilinear")), found.train_y)


def signals(config: Config, count: int = 512) -> Data:
    """Noisy chirps, `n resolution 1`: the class is how fast the frequency rises."""
    rng = np.random.default_rng(config.seed)
    labels = rng.integers(0, CLASSES, count).astype(np.int32)
    time = np.linspace(0, 1, config.resolution)
    phase = rng.uniform(0, 2 * math.pi, (count, 1))
    rise = 20 * (1 + labels[:, None]) * time**2
    x = np.sin(2 * math.pi * (10 * time + rise) + phase) + 0.3 * rng.standard_normal((count, time.size))
    return Data(x[..., None].astype(np.float32), labels)


def text(config: Config, count: int = 2048) -> Data:
    """Characters and those that follow them, `n resolution` each, from scikit-learn's descriptions of its
    data sets."""
    folder = resources.files("sklearn.datasets.descr")
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".rst")), key=lambda f: f.name)
    raw = b"".join(f.read_bytes() for f in files)
    codes = np.minimum(np.frombuffer(raw, np.uint8), VOCABULARY - 1).astype(np.int32)
    start = np.random.default_rng(config.seed).integers(0, len(codes) - config.resolution - 1, (count, 1))
    at = start + np.arange(config.resolution)
    return Data(codes[at], codes[at + 1])


VOCABULARY = 128


# -- layers without a vijp
# ---------------------------------------------------------------------------------------------


@ml.layer
class Skip:
    """`x + branch(x)` without a vijp or an inverse, whatever the branch."""

    branch: Any

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Applies the block."""
        return x + self.branch(x)


@ml.layer
class Attention:
    """Multi-head attention over the axis before the last.

    Written as products of matrices with the heads among the leading axes: XLA:CPU copies the scores of
    `jax.nn.dot_product_attention` into another layout, once or twice by how the rest of a program is written,
    and writes its scale out as large as the scores.
    """

    qkv: Any
    out: Any
    heads: int = ml.static(default=2)
    causal: bool = ml.static(default=False)

    def __call__(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
        """Applies the layer."""
        q, k, v = jnp.split(self.qkv(x).reshape(*x.shape[:-1], self.heads, -1).swapaxes(-2, -3), 3, axis=-1)
        scores = q * q.shape[-1] ** -0.5 @ k.mT
        if self.causal:
            scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
        y = jax.nn.softmax(scores) @ v
        return self.out(y.swapaxes(-2, -3).reshape(x.shape))


@ml.layer
class Position:
    """Adds a learned vector to each position."""

    table: Float[Array, "time width"]

    def __call__(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
        """Applies the layer."""
        return x + self.table


@ml.layer
class Embed:
    """Looks characters up."""

    table: Float[Array, "vocabulary width"]

    def __call__(self, x: Int[Array, "batch time"]) -> Float[Array, "batch time width"]:
        """Applies the layer."""
        return self.table[x]


@ml.layer
class LastMean:
    """The mean over the axes between the first and the last."""

    def __call__(self, x: Float[Array, "batch *space width"]) -> Float[Array, "batch width"]:
        """Applies the layer."""
        return jnp.mean(x, axis=tuple(range(1, x.ndim - 1)))


# -- networks
# ----------------------------------------------------------------------------------------------------------

Keys = Iterator[Array]


def _small(one: Any, scale: float) -> Any:
    """`one` with its parameters scaled: a branch that starts near zero."""
    return jax.tree.map(lambda leaf: scale * leaf, one)


def _head(config: Config, keys: Keys, width: int) -> list[Any]:
    return [LastMean(), ml.Dense.init(next(keys), width, CLASSES)]


def _image_stem(config: Config, block: int = 2) -> list[Any]:
    if config.width < block**2 or config.resolution % block:
        raise ArgumentError(
            f"`width={config.width}`, `resolution={config.resolution}`: needs {block**2} channels and a "
            f"multiple of {block}"
        )
    stem: list[Any] = [ml.SpaceToDepth((block, block))]
    return [*stem, ml.PadChannels(config.width - block**2)] if config.width > block**2 else stem


def strided(config: Config, keys: Keys) -> list[Any]:
    """Stages at full, half and quarter resolution; each but the first begins with a strided convolution to
    twice the channels."""
    layers, width = _image_stem(config), config.width
    stages = 3 if config.resolution % 8 == 0 and config.depth >= 3 else 1
    for stage in range(stages):
        for at in range(config.depth * stage // stages, config.depth * (stage + 1) // stages):
            down = stage > 0 and at == config.depth * stage // stages
            layers += [
                ml.Conv2D.init(next(keys), width, 2 * width, stride=2, padding=1)
                if down
                else ml.Conv2D.init(next(keys), width, width),
                ml.LeakyReLU(SLOPE),
            ]
            width *= 1 + down
    return layers + _head(config, keys, width)


def lipschitz(config: Config, keys: Keys) -> list[Any]:
    """MaxMin and orthogonal convolutions at constant resolution."""
    layers = _image_stem(config)
    for _ in range(config.depth):
        conv = ml.ParaunitaryConv.init(next(keys), config.width, config.width, reflections=4)
        layers += [ml.MaxMin(), conv]
    return layers + _head(config, keys, config.width)


def fragmental(config: Config, keys: Keys) -> list[Any]:
    """1D convolutions of three taps: the first orthogonal, the others small, so that substitution is stable
    over a block."""
    layers: list[Any] = [ml.SpaceToDepth((4,)), ml.PadChannels(config.width - 4)]
    for _ in range(config.depth):
        first = jax.nn.initializers.orthogonal()(next(keys), (1, config.width, config.width))
        rest = 0.1 / math.sqrt(config.width) * jax.random.normal(next(keys), (2, config.width, config.width))
        bias = jnp.zeros((config.width,))
        layers += [ml.Conv1D(jnp.concatenate([first, rest]), bias), ml.LeakyReLU(SLOPE)]
    return layers + _head(config, keys, config.width)


def _conv_branch(keys: Keys, width: int) -> ml.Sequential:
    """Norm, ReLU, convolution, twice; small at the start."""
    return ml.Sequential(
        (
            ml.RMSNorm.init(None, width), ml.ReLU(), ml.Conv2D.he(next(keys), width, width),
            ml.RMSNorm.init(None, width), ml.ReLU(), _small(ml.Conv2D.he(next(keys), width, width), 0.3),
        )
    )  # fmt: skip


def _conv_stem(config: Config, keys: Keys) -> list[Any]:
    """A convolution that is not submersive. No channel starts as zeros, because norms of zeros are too steep
    to be inverted."""
    return [ml.SpaceToDepth((2, 2)), ml.Conv2D.he(next(keys), 4, config.width)]


def revnet(config: Config, keys: Keys) -> list[Any]:
    """Couplings of one-convolution branches at constant resolution. They use gelu, because inversion flips
    the signs of ReLUs near 0."""
    layers, half = _conv_stem(config, keys), config.width // 2

    def branch() -> ml.Sequential:
        conv = _small(ml.Conv2D.he(next(keys), half, half), 0.3)
        return ml.Sequential((ml.RMSNorm.init(None, half), ml.Smooth("gelu"), conv))

    couplings = [ml.Coupling(branch(), branch()) for _ in range(config.depth)]
    return [*layers, ml.Split(), *couplings, ml.Concatenate(), *_head(config, keys, config.width)]


def resnet(config: Config, keys: Keys) -> list[Any]:
    """Two stages of pre-activation blocks, a strided convolution between."""
    layers, width = _conv_stem(config, keys), config.width
    for at in range(config.depth):
        if at == config.depth // 2 and config.depth > 1:
            layers.append(ml.Conv2D.he(next(keys), width, 2 * width, stride=2, padding=1))
            width *= 2
        layers.append(Skip(_conv_branch(keys, width)))
    return layers + _head(config, keys, width)


def mlp(config: Config, keys: Keys) -> list[Any]:
    """Flattened images through dense layers."""
    layers: list[Any] = [ml.Flatten(3), ml.Dense.init(next(keys), config.resolution**2, config.width)]
    for _ in range(config.depth):
        layers += [ml.LeakyReLU(SLOPE), ml.Dense.init(next(keys), config.width, config.width)]
    return [*layers, ml.LeakyReLU(SLOPE), ml.Dense.init(next(keys), config.width, CLASSES)]


def _attention(keys: Keys, width: int, scale: float, causal: bool) -> ml.Sequential:
    qkv, out = ml.Dense.init(next(keys), width, 3 * width), ml.Dense.init(next(keys), width, width)
    heads = max(1, width // 32)
    return ml.Sequential((ml.LayerNorm.init(None, width), Attention(qkv, _small(out, scale), heads, causal)))


def _feed_forward(keys: Keys, width: int, scale: float) -> ml.Sequential:
    up, down = ml.Dense.init(next(keys), width, 4 * width), ml.Dense.init(next(keys), 4 * width, width)
    return ml.Sequential((ml.LayerNorm.init(None, width), up, ml.Smooth("gelu"), _small(down, scale)))


def revvit(config: Config, keys: Keys, patch: int = 2) -> list[Any]:
    """Patches, positions, and couplings of attention and MLP over the halves of the width."""
    side, half = config.resolution // patch, config.width // 2
    layers: list[Any] = [
        ml.SpaceToDepth((patch, patch)),
        ml.Reshape((side, side, patch**2), (side**2, patch**2)),
        ml.Dense.init(next(keys), patch**2, config.width),
        Position(0.02 * jax.random.normal(next(keys), (side**2, config.width))),
    ]
    layers.append(ml.Split())
    for _ in range(config.depth):
        layers.append(ml.Coupling(_attention(keys, half, 0.3, False), _feed_forward(keys, half, 0.3)))
    return [*layers, ml.Concatenate(), *_head(config, keys, config.width)]


def gpt(config: Config, keys: Keys) -> list[Any]:
    """Characters, positions, and blocks of causal attention and MLP, each a layer."""
    layers: list[Any] = [
        Embed(0.5 * jax.random.normal(next(keys), (VOCABULARY, config.width))),
        Position(0.02 * jax.random.normal(next(keys), (config.resolution, config.width))),
    ]
    scale = 1 / math.sqrt(2 * config.depth)
    for _ in range(config.depth):
        layers.append(Skip(_attention(keys, config.width, scale, True)))
        layers.append(Skip(_feed_forward(keys, config.width, scale)))
    return [
        *layers,
        ml.LayerNorm.init(None, config.width),
        ml.Dense.init(next(keys), config.width, VOCABULARY),
    ]


MODELS: dict[str, tuple[Callable[[Config, Keys], list[Any]], Callable[[Config], Data]]] = {
    "strided": (strided, images),
    "lipschitz": (lipschitz, images),
    "fragmental": (fragmental, signals),
    "revnet": (revnet, images),
    "revvit": (revvit, images),
    "mlp": (mlp, images),
    "gpt": (gpt, text),
    "resnet": (resnet, images),
}
#: Networks whose blocks are submersive or reversible, and those whose blocks are neither.
SUBMERSIVE = ("strided", "lipschitz", "fragmental", "revnet", "revvit", "mlp")
OTHERS = ("gpt", "resnet")
