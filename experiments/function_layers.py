"""Networks in plain `jax.lax` calls against the same networks of `mwplan.layers`: what plans take of either.

A part of `python -m experiments.functions --target h200`, which says what it writes. The functions are cut
and their layers recognised (docs/functions.md); both chains are estimated for the target, which need not be
there, and planned for the same bytes of temporaries. Times are modelled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import rich.box
from jax import lax
from rich.table import Table

import mwplan as mw
from experiments import record
from mwplan import layers as ml
from mwplan.common.sizes import show_bytes, show_ns
from mwplan.functions.fit_function import profile_pieces

PyTree = Any
#: Budgets, in units of the least that both need.
SHARES = (1.0, 1.25, 1.5, 2.0, 3.0)


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of a network: layers or blocks, channels, and images `size` x `size`."""

    depth: int = 12
    channels: int = 64
    size: int = 32
    batch: int = 64


def _conv(x: Any, weight: Any, bias: Any) -> Any:
    y = lax.conv_general_dilated(x, weight, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return y + bias


def _cross_entropy(logits: Any) -> Any:
    labels = jnp.arange(logits.shape[0]) % logits.shape[1]
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1))


def lipschitz(size: Size) -> tuple[Any, PyTree, mw.Chain]:
    """Convolutions and MaxMin, a mean over windows, a classifier: the function, its parameters, the chain."""
    keys = jax.random.split(jax.random.key(0), size.depth + 1)
    convs = [ml.Conv2D.init(key, size.channels, size.channels, 3, padding=1) for key in keys[1:]]
    pooled = size.size // 4
    dense = ml.Dense.init(keys[0], pooled**2 * size.channels, 10)
    params = {"convs": [(c.weight, c.bias) for c in convs], "w": dense.weight, "b": dense.bias}

    def loss(params: PyTree, x: Any) -> Any:
        for weight, bias in params["convs"]:
            a, b = jnp.split(_conv(x, weight, bias), 2, -1)
            x = jnp.concatenate([lax.max(a, b), lax.min(a, b)], -1)
        x = lax.reduce_window(x, 0.0, lax.add, (1, 4, 4, 1), (1, 4, 4, 1), "VALID") / 16
        return _cross_entropy(x.reshape(len(x), -1) @ params["w"] + params["b"])

    pairs = [layer for c in convs for layer in (c, ml.MaxMin())]
    return loss, params, mw.Chain([*pairs, ml.AveragePool((4, 4)), ml.Flatten(3), dense, _cross_entropy])


def revnet(size: Size) -> tuple[Any, PyTree, mw.Chain]:
    """Additive couplings of two convolutions a branch, on two arrays: the function, its parameters, the
    chain."""
    half = size.channels // 2
    keys = iter(jax.random.split(jax.random.key(0), 4 * size.depth + 1))
    stem = ml.Conv2D.init(next(keys), size.channels, size.channels, 3, padding=1)
    branches = [
        [[ml.Conv2D.he(next(keys), half, half, 3, padding=1) for _ in range(2)] for _ in range(2)]
        for _ in range(size.depth)
    ]
    weights = [[[(c.weight, c.bias) for c in convs] for convs in block] for block in branches]
    params = {"stem": (stem.weight, stem.bias), "blocks": weights}

    def body(x: Any, convs: Any) -> Any:
        for conv in convs:
            x = _conv(lax.max(x, 0.0), *conv)
        return x

    def loss(params: PyTree, x: Any) -> Any:
        x1, x2 = jnp.split(_conv(x, *params["stem"]), 2, -1)
        for f, g in params["blocks"]:
            x1 = x1 + body(x2, f)
            x2 = x2 + body(x1, g)
        return jnp.mean(jnp.concatenate([x1, x2], -1) ** 2)

    def branch(convs: list[Any]) -> Any:
        return ml.Sequential(tuple(layer for conv in convs for layer in (ml.ReLU(), conv)))

    blocks = [ml.Coupling(branch(f), branch(g)) for f, g in branches]
    parts = [stem, ml.Split(), *blocks, ml.Concatenate(), lambda x: jnp.mean(x**2)]
    return loss, params, mw.Chain(parts)


NETWORKS: dict[str, Callable[[Size], tuple[Any, PyTree, mw.Chain]]] = {
    "lipschitz": lipschitz,
    "revnet": revnet,
}


def compare(name: str, target: str, size: Size) -> list[dict[str, Any]]:
    """A row for each budget."""
    loss, params, chain = NETWORKS[name](size)
    x = jax.random.normal(jax.random.key(1), (size.batch, size.size, size.size, size.channels))
    found = mw.cut(loss, params, x)
    unknown = [piece.why for piece in found.plan.pieces if not piece.layers]
    profiles = (
        mw.estimate(chain, x, device=target, progress=False),
        profile_pieces(found, params, x, device=target, progress=False),
    )
    least = max(mw.frontier(one).points[0][0] - one.fixed_bytes for one in profiles)
    rows = []
    for share in SHARES:
        budget = int(least * share)
        plans = [mw.plan(one, budget=budget + one.fixed_bytes) for one in profiles]
        rows.append(
            {
                "network": name,
                "layers": len(chain),
                "pieces": len(found),
                "unknown": unknown,
                "temporaries": budget,
                "of_layers_ns": plans[0].time_ns,
                "of_function_ns": plans[1].time_ns,
                "ratio": plans[1].time_ns / plans[0].time_ns,
            }
        )
    return rows


def main(target: str, out: Path, networks: Sequence[str], size: Size = Size()) -> None:
    """Estimates, prints and saves."""
    console = record.console()
    rows = [row for name in networks for row in compare(name, target, size)]
    made = Table(
        title=f"modelled time of a step's layers on {target}", title_justify="left", box=rich.box.SIMPLE
    )
    for column in ("network", "temporaries", "of layers", "of the function", "ratio"):
        made.add_column(column, justify="left" if column == "network" else "right")
    for row in rows:
        made.add_row(
            row["network"],
            show_bytes(row["temporaries"]),
            show_ns(row["of_layers_ns"]),
            show_ns(row["of_function_ns"]),
            f"{row['ratio']:.4f}",
        )
    console.print(made)
    record.save(out / "layers.json", {"target": target, "size": asdict(size), "rows": rows})
    console.print(f"wrote {out}")
