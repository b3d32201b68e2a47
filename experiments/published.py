"""Models of published libraries, as they are, for `python -m experiments.functions`.

Each function makes one: a loss, its parameters and its other arguments, in float64 where the library has it.
Models and layers are the libraries' own. Lines that the library's own training loop would not have, because
`mw.fit_function` wants `loss(params, *args)`, end in `# glue` and are counted. Install them with `pip install
-e '.[published]'`; those that are missing are left out, visibly."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


@dataclass(frozen=True, kw_only=True)
class Case:
    """`loss(params, *args)`, which returns a pair with `has_aux`."""

    loss: Callable[..., Any]
    params: PyTree
    args: tuple[Any, ...]
    has_aux: bool = False


def _normal(seed: int, *shape: int) -> Any:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


def _cross_entropy(logits: Any, labels: Any) -> Any:
    import optax

    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def equinox_lstm() -> Case:
    """Equinox's example of a recurrent network: an `eqx.nn.LSTMCell` in a `jax.lax.scan` over time."""
    import equinox as eqx

    class RNN(eqx.Module):
        cell: eqx.nn.LSTMCell
        linear: eqx.nn.Linear

        def __init__(self, key: Any) -> None:
            a, b = jax.random.split(key)
            self.cell, self.linear = eqx.nn.LSTMCell(4, 32, key=a), eqx.nn.Linear(32, 1, key=b)

        def __call__(self, xs: Any) -> Any:
            start = (jnp.zeros(32), jnp.zeros(32))
            (h, _), _ = jax.lax.scan(lambda state, x: (self.cell(x, state), None), start, xs)
            return jax.nn.sigmoid(self.linear(h))[0]

    def loss(model: RNN, x: Any, y: Any) -> Any:
        p = jax.vmap(model)(x)
        return -jnp.mean(y * jnp.log(p) + (1 - y) * jnp.log(1 - p))

    return Case(loss=loss, params=RNN(jax.random.key(0)), args=(_normal(1, 32, 64, 4), jnp.arange(32.0) % 2))


def equinox_transformer() -> Case:
    """Equinox's example of BERT: pre-norm blocks of `eqx.nn.MultiheadAttention` and `eqx.nn.MLP`, dropout."""
    import equinox as eqx

    class Block(eqx.Module):
        attention: eqx.nn.MultiheadAttention
        norms: tuple[eqx.nn.LayerNorm, eqx.nn.LayerNorm]
        mlp: eqx.nn.MLP
        dropout: eqx.nn.Dropout

        def __init__(self, width: int, key: Any) -> None:
            a, b = jax.random.split(key)
            self.attention = eqx.nn.MultiheadAttention(4, width, dropout_p=0.1, key=a)
            self.norms = (eqx.nn.LayerNorm(width), eqx.nn.LayerNorm(width))
            self.mlp = eqx.nn.MLP(width, width, 2 * width, 1, jax.nn.gelu, key=b)
            self.dropout = eqx.nn.Dropout(0.1)

        def __call__(self, x: Any, key: Any) -> Any:
            a, b = jax.random.split(key)
            y = jax.vmap(self.norms[0])(x)
            x = x + self.attention(y, y, y, key=a)
            return x + self.dropout(jax.vmap(self.mlp)(jax.vmap(self.norms[1])(x)), key=b)

    def loss(blocks: list[Block], x: Any, y: Any, key: Any) -> Any:
        def one(x: Any, key: Any) -> Any:
            for block, k in zip(blocks, jax.random.split(key, len(blocks)), strict=True):
                x = block(x, k)
            return x

        return jnp.mean((jax.vmap(one)(x, jax.random.split(key, len(x))) - y) ** 2)

    blocks = [Block(32, key) for key in jax.random.split(jax.random.key(0), 4)]
    return Case(
        loss=loss, params=blocks, args=(_normal(1, 8, 32, 32), _normal(2, 8, 32, 32), jax.random.key(3))
    )


def equimo_vit() -> Case:
    """Equimo's vision transformer, with dropout and stochastic depth."""
    from equimo.models import VisionTransformer

    model = VisionTransformer(
        img_size=16, in_channels=3, dim=32, patch_size=4, num_heads=4, depths=[4], num_classes=10,
        drop_path_rate=0.1, proj_drop=0.1, attn_drop=0.1, key=jax.random.key(0),
    )  # fmt: skip
    return Case(loss=_equimo_loss, params=model, args=_images(16, 16))


def equimo_convnext() -> Case:
    """Equimo's ConvNeXt."""
    from equimo.models import ConvNeXt

    model = ConvNeXt(3, dims=[16, 32], depths=[2, 2], num_classes=10, key=jax.random.key(0))
    return Case(loss=_equimo_loss, params=model, args=_images(4, 32))


def _images(batch: int, size: int) -> tuple[Any, ...]:
    return _normal(1, batch, 3, size, size), jnp.arange(batch) % 10, jax.random.key(3)


def _equimo_loss(model: Any, images: Any, labels: Any, key: Any) -> Any:
    logits = jax.vmap(lambda x, k: model(x, key=k, inference=False))(
        images, jax.random.split(key, len(images))
    )
    return _cross_entropy(logits, labels)


def haiku_mobilenet() -> Case:
    """Haiku's MobileNet, with batch normalisation's state."""
    import haiku as hk

    def forward(x: Any) -> Any:
        return hk.nets.MobileNetV1(strides=(1, 2, 1), channels=(16, 32, 32), num_classes=10)(
            x, is_training=True
        )

    return _haiku_classifier(forward)


def haiku_resnet() -> Case:
    """Haiku's ResNet v2, with batch normalisation's state."""
    import haiku as hk

    def forward(x: Any) -> Any:
        return hk.nets.ResNet(
            (1, 1, 1, 1), 10, resnet_v2=True, bottleneck=False, channels_per_group=(16, 16, 32, 32),
            use_projection=(True,) * 4,
        )(x, is_training=True)  # fmt: skip

    return _haiku_classifier(forward)


def _haiku_classifier(forward: Any) -> Case:
    import haiku as hk

    net = hk.transform_with_state(forward)
    images = _normal(1, 8, 32, 32, 3)
    params, state = net.init(jax.random.key(0), images)

    def loss(params: PyTree, state: PyTree, x: Any, y: Any) -> tuple[Any, PyTree]:
        logits, state = net.apply(params, state, None, x)
        return _cross_entropy(logits, y), state

    return Case(loss=loss, params=params, args=(state, images, jnp.arange(8) % 10), has_aux=True)


def linen_scanned() -> Case:
    """Flax Linen's attention in `nn.scan` over `nn.remat`, with dropout."""
    import flax.linen as nn

    kind = {"param_dtype": jnp.float64}

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: Any, _: Any) -> tuple[Any, None]:
            y = nn.LayerNorm(**kind)(x)
            x = x + nn.MultiHeadDotProductAttention(4, dropout_rate=0.1, deterministic=False, **kind)(y, y)
            y = nn.gelu(nn.Dense(64, **kind)(nn.LayerNorm(**kind)(x)))
            return x + nn.Dense(32, **kind)(y), None

    class Decoder(nn.Module):
        @nn.compact
        def __call__(self, tokens: Any) -> Any:
            x = nn.Embed(50, 32, **kind)(tokens)
            rngs: dict[Any, bool] = {"params": True, "dropout": True}
            x, _ = nn.scan(nn.remat(Block), {"params": 0}, split_rngs=rngs, length=6)()(x, None)
            return nn.Dense(50, **kind)(x)

    net = Decoder()
    tokens = jax.random.randint(jax.random.key(1), (8, 33), 0, 50)
    params = net.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, tokens[:, :-1])

    def loss(params: PyTree, tokens: Any, key: Any) -> Any:
        return _cross_entropy(net.apply(params, tokens[:, :-1], rngs={"dropout": key}), tokens[:, 1:])

    return Case(loss=loss, params=params, args=(tokens, jax.random.key(5)))


def penzai_neox() -> Case:
    """Penzai's GPT-NeoX, of named arrays."""
    from penzai import pz
    from penzai.models.transformer.variants import gpt_neox

    config = gpt_neox.GPTNeoXTransformerConfig(
        num_attention_heads=4, embedding_dim=32, projection_dim=8, mlp_hidden_dim=64, num_decoder_blocks=4,
        vocab_size=50, activation_fn="gelu_approx", rope_subset_size=4, rope_wavelength=10_000,
        layernorm_epsilon=1e-5, parameter_dtype=jnp.float64, activation_dtype=jnp.float64,
        use_layer_stack=False,
    )  # fmt: skip
    whole = gpt_neox.build_gpt_neox_transformer(config, init_base_rng=jax.random.key(0))
    model, variables = pz.unbind_params(whole)
    params = [one.freeze() for one in variables]  # glue
    tokens = jax.random.randint(jax.random.key(1), (8, 17), 0, 50)

    def loss(params: PyTree, tokens: Any) -> Any:
        bound = pz.bind_variables(model, params)
        x = pz.nx.wrap(tokens[:, :-1]).tag("batch", "seq")
        logits = bound(x, token_positions=pz.nx.wrap(jnp.arange(x.named_shape["seq"])).tag("seq"))
        return _cross_entropy(logits.unwrap("batch", "seq", "vocabulary"), tokens[:, 1:])

    return Case(loss=loss, params=params, args=(tokens,))


def flowjax_autoregressive() -> Case:
    """FlowJAX's masked autoregressive flow, and its loss."""
    import equinox as eqx
    import paramax
    from flowjax import distributions, flows
    from flowjax.train.losses import MaximumLikelihoodLoss

    base = distributions.StandardNormal((8,))
    flow = flows.masked_autoregressive_flow(jax.random.key(0), base_dist=base)
    params, static = eqx.partition(
        flow, eqx.is_inexact_array, is_leaf=lambda one: isinstance(one, paramax.NonTrainable)
    )
    likelihood = MaximumLikelihoodLoss()

    def loss(params: PyTree, x: Any) -> Any:  # glue
        return likelihood(params, static, x)  # glue

    return Case(loss=loss, params=params, args=(_normal(1, 256, 8),))


def distrax_realnvp() -> Case:
    """Distrax's RealNVP of masked couplings, whose conditioners are Haiku's."""
    import distrax
    import haiku as hk

    width = 8

    def log_prob(x: Any) -> Any:
        mask = jnp.arange(width) % 2 == 0
        layers = [
            distrax.MaskedCoupling(
                mask if i % 2 else ~mask,
                hk.Sequential([hk.nets.MLP([32, 32, 2 * width]), hk.Reshape((width, 2))]),
                lambda p: distrax.ScalarAffine(p[..., 0], log_scale=jnp.tanh(p[..., 1])),
            )
            for i in range(6)
        ]
        base = distrax.Independent(distrax.Normal(jnp.zeros(width), jnp.ones(width)), 1)
        return distrax.Transformed(base, distrax.Inverse(distrax.Chain(layers))).log_prob(x)

    net = hk.without_apply_rng(hk.transform(log_prob))
    x = _normal(1, 256, width)

    def loss(params: PyTree, x: Any) -> Any:
        return -net.apply(params, x).mean()

    return Case(loss=loss, params=net.init(jax.random.key(0), x), args=(x,))


def bijx_realnvp() -> Case:
    """Bijx's RealNVP, a Flax NNX module."""
    import bijx
    from flax import nnx

    flow = bijx.Transformed(bijx.IndependentNormal((8,)), bijx.realnvp_flow(8, rngs=nnx.Rngs(0)))
    graph, params, rest = nnx.split(flow, nnx.Param, ...)  # type: ignore[misc]  # glue

    def loss(params: PyTree, rest: PyTree, x: Any) -> Any:
        flow = nnx.merge(graph, params, rest)  # glue
        return -flow.log_density(x).mean()

    return Case(loss=loss, params=params, args=(rest, _normal(1, 128, 8)))


def optax_ctc() -> Case:
    """Optax's connectionist temporal classification, a scan over time, after a few dense layers."""
    import optax

    def loss(params: PyTree, x: Any, labels: Any) -> Any:
        for weight in params:
            x = jnp.tanh(x @ weight)
        return optax.ctc_loss(x, jnp.zeros(x.shape[:2]), labels, jnp.zeros(labels.shape)).mean()

    labels = jax.random.randint(jax.random.key(1), (8, 6), 1, 16)
    return Case(
        loss=loss, params=[_normal(i, 16, 16) / 4 for i in range(8)], args=(_normal(9, 8, 32, 16), labels)
    )


def diffrax_ode() -> Case:
    """Diffrax's neural differential equation, solved by adaptive steps."""
    import diffrax
    import equinox as eqx

    class Field(eqx.Module):
        mlp: eqx.nn.MLP

        def __call__(self, t: Any, y: Any, args: Any) -> Any:
            return self.mlp(y)

    def loss(field: Field, start: Any, end: Any) -> Any:
        def solved(y: Any) -> Any:
            term, control = diffrax.ODETerm(field), diffrax.PIDController(1e-3, 1e-6)
            out = diffrax.diffeqsolve(term, diffrax.Tsit5(), 0.0, 1.0, 0.1, y, stepsize_controller=control)
            return out.ys[-1]

        return jnp.mean((jax.vmap(solved)(start) - end) ** 2)

    field = Field(eqx.nn.MLP(4, 4, 32, 2, jax.nn.softplus, key=jax.random.key(0)))
    return Case(loss=loss, params=field, args=(_normal(1, 16, 4), _normal(2, 16, 4)))


#: Each model, and the packages that it needs.
MODELS: dict[str, tuple[Callable[[], Case], tuple[str, ...]]] = {
    "equinox_lstm": (equinox_lstm, ("equinox",)),
    "equinox_transformer": (equinox_transformer, ("equinox",)),
    "equimo_vit": (equimo_vit, ("equimo",)),
    "equimo_convnext": (equimo_convnext, ("equimo",)),
    "haiku_mobilenet": (haiku_mobilenet, ("haiku", "optax")),
    "haiku_resnet": (haiku_resnet, ("haiku", "optax")),
    "linen_scanned": (linen_scanned, ("flax", "optax")),
    "penzai_neox": (penzai_neox, ("penzai", "optax")),
    "flowjax_autoregressive": (flowjax_autoregressive, ("flowjax",)),
    "distrax_realnvp": (distrax_realnvp, ("distrax", "haiku")),
    "bijx_realnvp": (bijx_realnvp, ("bijx", "flax")),
    "optax_ctc": (optax_ctc, ("optax",)),
    "diffrax_ode": (diffrax_ode, ("diffrax",)),
}


def missing(model: str) -> list[str]:
    """The packages that are not installed."""
    return [name for name in MODELS[model][1] if importlib.util.find_spec(name) is None]


def glue(model: str) -> int:
    """How many lines of a model's function are glue."""
    return sum(line.endswith("# glue") for line in inspect.getsource(MODELS[model][0]).splitlines())
