"""Layers made of layers: coupling blocks, contractive residual blocks, and sequences as one layer."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mwplan.common import trees
from mwplan.common.errors import ArgumentError
from mwplan.common.trees import widen
from mwplan.layers.linear import WholeOf
from mwplan.network import rules
from mwplan.network.layer import layer
from mwplan.network.rules import (
    InvertRule,
    StoreRule,
    Unavailable,
    VijpRule,
    WholeFragment,
    full_precision,
)

_Halves = Array | tuple[Array, Array]


def _halves(x: _Halves) -> tuple[Array, Array]:
    """The two parts that a coupling acts on."""
    if isinstance(x, tuple):
        if len(x) != 2:
            raise ArgumentError(f"`x` has {len(x)} parts: Coupling takes an array or a pair of arrays")
        return x
    if not hasattr(x, "shape"):
        raise ArgumentError(
            f"`x` is a {type(x).__name__}: Coupling takes an array or a pair (a tuple) of arrays"
        )
    if x.ndim < 1 or x.shape[-1] % 2:
        raise ArgumentError(
            f"`x.shape={x.shape}`: Coupling needs an even number of channels on the last axis"
        )
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _as(x: _Halves, first: Array, second: Array) -> Any:
    """The parts as `x` has them."""
    return (first, second) if isinstance(x, tuple) else jnp.concatenate([first, second], -1)


@full_precision
def _vjp(branch: Any, x: Array) -> tuple[Array, Any]:
    """A branch in working and full precision at `x`, and its vjp."""
    y, vjp = jax.vjp(widen(branch), x)
    return y, vjp


@layer
class Coupling:
    """`y1 = x1 + f(x2)`, `y2 = x2 + g(y1)`, for any layers `f`, whose output is shaped like `x1`, and `g`,
    whose output is shaped like `x2`.

    `x`: the pair `(x1, x2)`, and then the output is one too, or an array of which they are the halves, by its
    last axis. Pairs are cheaper: nothing is copied between one coupling and the next (`mwplan.layers.Split`
    makes pairs, `Concatenate` ends them).
    """

    f: Any
    g: Any

    def __call__(self, x: _Halves) -> Any:
        """Applies the block."""
        x1, x2 = _halves(x)
        y1 = x1 + self.f(x2)
        return _as(x, y1, x2 + self.g(y1))

    def vijp_rules(self, x: Any) -> Sequence[VijpRule | Unavailable]:
        """Subtraction, from the input or from the branches' own residuals."""
        return [Subtract(), SubtractVjps(), WholeOf("whole_input", base=Subtract())]

    def invert_rules(self, x: Any) -> Sequence[InvertRule | Unavailable]:
        """Subtraction, and where a branch's vjp keeps booleans (ReLU masks) subtraction that keeps them:
        last, for it is the more accurate."""
        leaves, treedef = jax.tree.flatten((self, x))
        shapes = tuple(trees.struct_of(a) if hasattr(a, "dtype") else a for a in leaves)
        try:
            keeps = _keeps_booleans(treedef, shapes)
        except TypeError:  # something in a branch cannot be hashed: traced for this call alone
            keeps = _keeps_booleans.__wrapped__(treedef, shapes)
        return [CouplingInverse(), *[CouplingBits()] * keeps]


@dataclass(frozen=True)
class Subtract(VijpRule):
    r"""$\bar x_1 = \bar y_1 + \bar y_2\,dG(y_1)$, $\bar x_2 = \bar y_2 + \bar x_1\,dF(x_2)$, solved by
    subtraction.

    $\bar y_2 = \bar x_2 - \bar x_1\,dF(x_2)$ and $\bar y_1 = \bar x_1 - \bar y_2\,dG(y_1)$: nothing is
    erased, whatever $F$ and $G$ are.

    **Residuals:** the input, often shared; both sweeps differentiate the branches at it, in float32 or wider.
    **Cost:** a forward and an input vjp of both branches in each. **Growth:** near 1 while the branches are
    small beside the identity. **Source:** ours; the block is RevNet's, arXiv:1707.04585.
    """

    name: str = "subtract"

    def forward(self, layer: Coupling, x: Any) -> tuple[Any, Any]:
        """The output and the input."""
        return layer(x), x

    def _branches(self, layer: Coupling, x: _Halves) -> tuple[Any, Any]:
        x1, x2 = _halves(widen(x))
        moved, f_vjp = _vjp(layer.f, x2)
        _, g_vjp = _vjp(layer.g, x1 + moved)
        return f_vjp, g_vjp

    def reverse(self, layer: Coupling, residuals: Any, ct_out: Any) -> tuple[Any, Any]:
        """`ct_in`."""
        return self._pull(self._branches(layer, residuals), ct_out), ()

    def _pull(self, branches: tuple[Any, Any], ct_out: _Halves) -> Any:
        f_vjp, g_vjp = branches
        ct1, ct2 = _halves(widen(ct_out))
        ct1 = ct1 + g_vjp(ct2)[0]
        return _as(ct_out, ct1, ct2 + f_vjp(ct1)[0])

    def rebuild(self, layer: Coupling, x: Any, ct_in: Any, fragment: Any) -> Any:
        """`ct_out`."""
        f_vjp, g_vjp = self._branches(layer, x)
        ct1, ct2 = _halves(ct_in)
        ct2 = ct2 - f_vjp(ct1)[0]
        return _as(ct_in, ct1 - g_vjp(ct2)[0], ct2)


@dataclass(frozen=True)
class SubtractVjps(Subtract):
    """As `subtract`, keeping what the branches' input vjps keep instead of the input: the reverse sweep runs
    no forward."""

    name: str = "subtract_vjps"

    def forward(self, layer: Coupling, x: Any) -> tuple[Any, Any]:
        """The output and the branches' vjps."""
        return layer(x), self._branches(layer, x)

    def reverse(self, layer: Coupling, residuals: Any, ct_out: Any) -> tuple[Any, Any]:
        """`ct_in`."""
        return self._pull(residuals, ct_out), ()


@dataclass(frozen=True)
class CouplingInverse(InvertRule):
    """`x2 = y2 - g(y1)`, `x1 = y1 - f(x2)`. The branches compute as in the forward pass, in JAX's default
    precision: what was added is subtracted.

    **Cost:** a forward and a vjp of both branches, the one's memory after the other's.
    """

    name: str = "subtract"

    def inverse(self, layer: Coupling, y: Any, kept: Any) -> Any:
        """`x`."""
        y1, y2 = _halves(y)
        x2 = y2 - layer.g(y1)
        return _as(y, y1 - layer.f(x2), x2)

    def backward(self, layer: Coupling, y: Any, kept: Any, ct_out: Any) -> tuple[Any, list[Any], Any]:
        """What is subtracted is what is differentiated: no branch runs twice."""
        (y1, y2), (ct1, ct2) = _halves(y), _halves(ct_out)
        f_bits, g_bits = kept or (None, None)
        moved, g_vjp = _value_and_vjp(layer.g, y1, g_bits)
        g_grads, ct = g_vjp(ct2)
        x2, ct1, g_grads = trees.tie((y2 - moved, ct1 + ct, g_grads))
        moved, f_vjp = _value_and_vjp(layer.f, x2, f_bits)
        f_grads, ct = f_vjp(ct1)
        x = _as(y, y1 - moved, x2)
        return x, [*f_grads, *g_grads], _as(ct_out, ct1, ct2 + ct)


@dataclass(frozen=True)
class CouplingBits(CouplingInverse):
    """As `subtract`, differentiating the branches with the booleans of the forward pass: however far off the
    activation is rebuilt, no ReLU's mask flips.

    **Residuals:** the boolean leaves of the branches' vjps, for a ReLU one bit an element. **Cost:** as
    `subtract`. Only booleans: a kink that a vjp keeps as floats (`jnp.maximum`) or as integers (`MaxPool`) is
    differentiated where it is rebuilt.
    """

    name: str = "subtract_bits"
    keeps: bool = True

    def forward(self, layer: Coupling, x: Any) -> tuple[Any, Any]:
        """The output, and the booleans of the vjps of `f` and `g`."""
        x1, x2 = _halves(x)
        moved, f_vjp = rules.value_and_vjp(layer.f, x2)
        y1 = x1 + moved
        moved, g_vjp = rules.value_and_vjp(layer.g, y1)
        kept = tuple(list(filter(_is_boolean, jax.tree.leaves(vjp))) for vjp in (f_vjp, g_vjp))
        return _as(x, y1, x2 + moved), kept


@functools.lru_cache(maxsize=512)
def _keeps_booleans(treedef: Any, shapes: tuple[Any, ...]) -> bool:
    """Whether `CouplingBits` keeps anything of the flattened layer and input. Traced once for all that are
    alike: a step asks for every layer."""
    arrays = [leaf for leaf in shapes if isinstance(leaf, jax.ShapeDtypeStruct)]

    def kept(arrays: list[Any]) -> Any:
        left = iter(arrays)
        leaves = [next(left) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf for leaf in shapes]
        return CouplingBits().forward(*jax.tree.unflatten(treedef, leaves))[1]

    return bool(jax.tree.leaves(jax.eval_shape(kept, arrays)))


def _is_boolean(leaf: Any) -> bool:
    return trees.is_array(leaf) and leaf.dtype == jnp.bool_


def _value_and_vjp(branch: Any, x: Any, bits: list[Any] | None) -> tuple[Any, Any]:
    """`rules.value_and_vjp`, with `bits` in place of the boolean leaves of the vjp, which is a pytree of what
    it keeps."""
    y, vjp = rules.value_and_vjp(branch, x)
    if bits is None:
        return y, vjp
    leaves, treedef = jax.tree.flatten(vjp)
    where = [i for i, leaf in enumerate(leaves) if _is_boolean(leaf)]
    for i, bit in zip(where, bits, strict=True):
        leaves[i] = bit
    return y, jax.tree.unflatten(treedef, leaves)


STEPS = (8, 16, 32)
"""The numbers of fixed-point steps that are offered as options."""


@layer
class Residual:
    """`y = x + branch(x)` for a branch that keeps the shape.

    Submersive and invertible if the branch is a contraction, of Lipschitz constant below 1. That is not
    checked: what a step count does not solve is in the measured local error, and too large an error forbids
    the option.
    """

    branch: Any

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Applies the block."""
        return x + self.branch(x)

    def vijp_rules(self, x: Any) -> Sequence[VijpRule | Unavailable]:
        """Fixed-point iteration with 8, 16 or 32 steps."""
        return [*map(FixedPoint, STEPS), WholeOf("whole_input", base=FixedPoint(STEPS[0]))]

    def invert_rules(self, x: Any) -> Sequence[InvertRule | Unavailable]:
        """Fixed-point iteration with 8, 16 or 32 steps."""
        return [FixedPointInverse(k) for k in STEPS]


@dataclass(frozen=True)
class FixedPoint(VijpRule):
    r"""$\bar x = \bar y + \bar y\,dF(x)$, solved by $\bar y \leftarrow \bar x - \bar y\,dF(x)$ from
    $\bar y = \bar x$.

    With $\rho$ the norm of $dF(x)$, $k$ steps leave a relative error of at most $\rho^{k+1} (1 + \rho)$, so
    it converges for $\rho < 1$: 16 steps reach $10^{-5}$ for $\rho = 0.5$, and 1e-2 for 0.75. Growth is at
    most $(1 + \rho)/(1 - \rho)$.

    **Residuals:** the input, often shared. **Cost:** a forward of the branch and $k$ of its input vjps.
    **Source:** ours; for the forward, i-ResNet, arXiv:1811.00995.
    """

    steps: int

    @property
    def name(self) -> str:  # type: ignore[override]
        """`fixed_16` for 16 steps."""
        return f"fixed_{self.steps}"

    def forward(self, layer: Residual, x: Any) -> tuple[Any, Any]:
        """The output and the input."""
        return layer(x), x

    def reverse(self, layer: Residual, residuals: Any, ct_out: Any) -> tuple[Any, Any]:
        """`ct_in`."""
        _, vjp = _vjp(layer.branch, widen(residuals))
        ct_out = widen(ct_out)
        return ct_out + vjp(ct_out)[0], ()

    def rebuild(self, layer: Residual, x: Any, ct_in: Any, fragment: Any) -> Any:
        """`ct_out`."""
        _, vjp = _vjp(layer.branch, widen(x))
        return jax.lax.fori_loop(0, self.steps, lambda _, ct: ct_in - vjp(ct)[0], ct_in)


@dataclass(frozen=True)
class FixedPointInverse(InvertRule):
    r"""$x \leftarrow y - F(x)$ from $x = y$: i-ResNet's inversion, arXiv:1811.00995.

    With $\rho < 1$ the Lipschitz constant of $F$, $k$ steps leave
    $|x_k - x| \le \rho^k |F(y) - F(x)| \le \rho^{k+1} |F(x)|$, measured with rounding as the local error;
    growth is at most $(1 + \rho)/(1 - \rho)$. **Cost:** $k$ forwards of the branch. Workspace: that of one,
    and an activation.
    """

    steps: int

    @property
    def name(self) -> str:  # type: ignore[override]
        """`fixed_16` for 16 steps."""
        return f"fixed_{self.steps}"

    def inverse(self, layer: Residual, y: Any, kept: Any) -> Any:
        """`x`."""
        return jax.lax.fori_loop(0, self.steps, lambda _, x: y - layer.branch(x), y)


@layer
class Sequential:
    """Several layers as one, applied in order."""

    layers: tuple[Any, ...]

    def __call__(self, x: Any) -> Any:
        """Applies the layers."""
        for one in self.layers:
            x = one(x)
        return x

    def with_inputs(self, x: Any) -> Iterator[tuple[Any, Any]]:
        """Each layer with the struct of its input."""
        for one in self.layers:
            yield one, x
            x = jax.eval_shape(one, x)

    def vijp_rules(self, x: Any) -> Sequence[VijpRule | Unavailable]:
        """The parts' rules composed: `parts` with each one's first, `parts.NAME` with option NAME wherever a
        part has it."""
        offers = []
        for one, at in self.with_inputs(x):
            own = [r for r in rules.vijp_rules(one, at) if isinstance(r, VijpRule)]
            # Stable: a vijp before a fragment before a whole one.
            offers.append(sorted(own, key=lambda r: (isinstance(r, WholeFragment), r.has_fragment)))
        first = tuple(offer[0] for offer in offers)
        found: list[VijpRule | Unavailable] = [Parts("parts", first, any(r.has_fragment for r in first))]
        for name in dict.fromkeys(
            r.name for offer in offers for r in offer if not isinstance(r, WholeFragment)
        ):
            parts = tuple(next((r for r in offer if r.name == name), offer[0]) for offer in offers)
            if parts != first:
                found.append(Parts(f"parts.{name}", parts, any(r.has_fragment for r in parts)))
        return found

    def store_rules(self, x: Any) -> Sequence[StoreRule]:
        """Each part's own first rule; those by their output where there are any; only convolutions and
        products; only the input."""
        offers = [rules.store_rules(one, at) for one, at in self.with_inputs(x)]
        first = tuple(next(rule for rule in offer if rule not in rules.LEANER) for offer in offers)
        output = tuple(
            next((rule for rule in offer if rule.name == "output"), rule)
            for offer, rule in zip(offers, first)
        )
        shared = [StoreParts(output, "parts.output")] if output != first else []
        return [StoreParts(first), *shared, *rules.LEANER]

    def invert_rules(self, x: Any) -> Sequence[InvertRule | Unavailable]:
        """The parts' inverses composed, where all have one."""
        found: list[InvertRule] = []
        for position, (one, at) in enumerate(self.with_inputs(x)):
            own = [r for r in rules.invert_rules(one, at) if isinstance(r, InvertRule)]
            if not own:
                return [Unavailable("parts", f"part {position}, {type(one).__name__}, has no inverse")]
            found.append(own[-1])
        return [InvertParts(tuple(found), keeps=any(rule.keeps for rule in found))]


def _forward_parts(
    layer: Sequential, parts: Sequence[StoreRule | VijpRule | InvertRule], x: Any
) -> tuple[Any, Any]:
    """The output, and what the parts' rules keep."""
    kept = []
    for one, rule in zip(layer.layers, parts, strict=True):
        x, own = rule.forward(one, x)
        kept.append(own)
    return x, tuple(kept)


@dataclass(frozen=True)
class Parts(VijpRule):
    r"""Composition: $J = J_1 J_2 \cdots$, so the parts' vijps in order, at inner activations that are
    recomputed from `x`.

    **Residuals, fragment:** the parts'. **Cost:** the parts', and a forward in the rebuild; its workspace
    holds one inner activation and cotangent at a time. Growth multiplies, local errors add as along a run.
    """

    name: str
    parts: tuple[VijpRule, ...]
    has_fragment: bool = False

    def check(self, layer: Sequential, x: Any) -> str | None:
        """The first reason among the parts."""
        for position, ((one, at), rule) in enumerate(zip(layer.with_inputs(x), self.parts)):
            reason = rule.check(one, at)
            if reason is not None:
                return f"part {position}, {type(one).__name__}: {reason}"
        return None

    def forward(self, layer: Sequential, x: Any) -> tuple[Any, Any]:
        """The output and the parts' residuals."""
        return _forward_parts(layer, self.parts, x)

    def reverse(self, layer: Sequential, residuals: Any, ct_out: Any) -> tuple[Any, Any]:
        """`ct_in` and the parts' fragments."""
        fragments = []
        for one, rule, kept in zip(
            reversed(layer.layers), reversed(self.parts), reversed(residuals), strict=True
        ):
            ct_out, fragment = rule.reverse(one, kept, ct_out)
            fragments.append(fragment)
        return ct_out, tuple(reversed(fragments)) if self.has_fragment else ()

    def rebuild(self, layer: Sequential, x: Any, ct_in: Any, fragment: Any) -> Any:
        """`ct_out`."""
        pieces = fragment if self.has_fragment else ((),) * len(self.parts)
        for position, (one, rule, piece) in enumerate(zip(layer.layers, self.parts, pieces, strict=True)):
            ct_in = rule.rebuild(one, x, ct_in, piece)
            if position + 1 < len(self.parts):
                x = one(x)
        return ct_in


@dataclass(frozen=True)
class StoreParts(StoreRule):
    """Each part stored by a rule of its own."""

    parts: tuple[StoreRule, ...]
    name: str = "parts"

    def forward(self, layer: Sequential, x: Any) -> tuple[Any, Any]:
        """The output and the parts' residuals."""
        return _forward_parts(layer, self.parts, x)

    def backward(self, layer: Sequential, residuals: Any, ct_out: Any) -> tuple[list[Any], Any]:
        """The parts' gradients, in order, and `ct_in`."""
        grads: list[list[Any]] = []
        for one, rule, kept in zip(
            reversed(layer.layers), reversed(self.parts), reversed(residuals), strict=True
        ):
            own, ct_out = rule.backward(one, kept, ct_out)
            grads.insert(0, own)
        return [g for own in grads for g in own], ct_out


@dataclass(frozen=True)
class InvertParts(InvertRule):
    """The parts' inverses, last first. **Residuals, cost:** the parts'; no forward besides."""

    parts: tuple[InvertRule, ...]
    name: str = "parts"
    keeps: bool = False

    def check(self, layer: Sequential, x: Any) -> str | None:
        """The first reason among the parts."""
        for (one, at), rule in zip(layer.with_inputs(x), self.parts):
            reason = rule.check(one, at)
            if reason is not None:
                return reason
        return None

    def forward(self, layer: Sequential, x: Any) -> tuple[Any, Any]:
        """The output and what the parts keep."""
        return _forward_parts(layer, self.parts, x)

    def inverse(self, layer: Sequential, y: Any, kept: Any) -> Any:
        """`x`."""
        for one, rule, own in zip(reversed(layer.layers), reversed(self.parts), reversed(kept), strict=True):
            y = rule.inverse(one, y, own)
        return y

    def backward(self, layer: Sequential, y: Any, kept: Any, ct_out: Any) -> tuple[Any, list[Any], Any]:
        """The parts' own, so that of what was inside the block only one array and its cotangent are there at
        a time."""
        grads: list[list[Any]] = []
        for one, rule, own in zip(reversed(layer.layers), reversed(self.parts), reversed(kept), strict=True):
            y, found, ct_out = trees.tie(rule.backward(one, y, own, ct_out))
            grads.insert(0, found)
        return y, [g for found in grads for g in found], ct_out


def refresh(tree: Any) -> Any:
    """`tree` (a layer, a chain, any pytree of them) with every basis of a numerical cokernel made anew from
    the present weights.

    On the host, an SVD a layer (a frequency, for convolutions): to be called now and then, never every step.
    """

    def has_basis(node: Any) -> bool:
        return callable(getattr(node, "refresh", None)) and hasattr(node, "basis")

    return jax.tree.map(lambda node: node.refresh() if has_basis(node) else node, tree, is_leaf=has_basis)


def with_bases(chain: Sequence[Any], x: Any, fraction: float = 0.5) -> list[Any]:
    """The layers of `chain` with a basis in each that can have one, at inputs like `x` (array or struct)."""
    made = []
    at = trees.struct(x) if not isinstance(x, jax.ShapeDtypeStruct) else x
    for one in chain:
        if hasattr(one, "with_basis"):
            takes_input = hasattr(one, "geometry")
            made.append(one.with_basis(at, fraction) if takes_input else one.with_basis(fraction))
        else:
            made.append(one)
        at = jax.eval_shape(one, at)
    return made
