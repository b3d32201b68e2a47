"""What a layer can do in the sweeps: rules for storing, for moonwalk runs and for inversion.

A *rule* is a small frozen object, named as an option of the profile and of the schedule. Any callable pytree
has some without doing anything: `VjpStore`, whatever `jax.vjp` keeps, `SMALLER` ones, and `WholeFragment`,
the input residuals that `jax.vjp` with respect to the input keeps, with the whole cotangent as the fragment.
A layer with more to offer (see `mwplan.layers`) says so by three optional methods, each of which gets the
input's `jax.ShapeDtypeStruct` pytree and returns a sequence of rules:

- `vijp_rules(x)`: `VijpRule`s, and an `Unavailable` with the reason for each that the shapes forbid;
- `store_rules(x)`: `StoreRule`s that keep less than whatever `jax.vjp` keeps, in place of `SMALLER`;
- `invert_rules(x)`: `InvertRule`s.

Residuals are plain pytrees of arrays. A leaf that *is* a parameter, the layer's input or its output (the same
object) is not new memory: `mwplan.network.residuals` finds and shares it.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar, cast

import jax

from mwplan.common import trees

PyTree = Any
Function = TypeVar("Function", bound=Callable[..., Any])


def full_precision(function: Function) -> Function:
    """`function`, whose products are of float32 operands as they are, whatever JAX's default.

    GPUs and TPUs round them to fewer bits by default (TF32 has 10): an error that a vijp amplifies. For what
    *inverts*: the reverse sweep and the vijp of a rule with products, and what pulls back in both. Not for a
    layer's own forward pass, which must be the same in every sweep.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return cast("Function", call)


@dataclass(frozen=True)
class Unavailable:
    """A rule that a layer does not have, and why: what `explain` prints. Never offered to a planner."""

    name: str
    reason: str


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class InputVjp:
    """The vjp of a layer with respect to its input alone, called in the working precision of a moonwalk run.

    `dtypes` are those of the layer's output leaves, which the vjp was traced for.
    """

    vjp: Any
    dtypes: tuple[str, ...] = field(metadata={"static": True})

    def __call__(self, ct_out: PyTree) -> PyTree:
        """`ct_in`, widened, from `ct_out` of any precision."""
        leaves, treedef = jax.tree.flatten(ct_out)
        narrow = [
            leaf.astype(dtype) if trees.is_inexact(leaf) else leaf for leaf, dtype in zip(leaves, self.dtypes)
        ]
        (ct_in,) = self.vjp(jax.tree.unflatten(treedef, narrow))
        return trees.widen(ct_in)


class StoreRule(abc.ABC):
    """A way to keep what a layer's backward needs (strategy STORE)."""

    name: str

    @abc.abstractmethod
    def forward(self, layer: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        """Returns `(layer(x), residuals)`."""

    @abc.abstractmethod
    def backward(self, layer: PyTree, residuals: PyTree, ct_out: PyTree) -> tuple[list[Any], PyTree]:
        """Returns the cotangents of `trees.parameters(layer)`, in that order, and of the input."""


@dataclass(frozen=True)
class OutputStore(StoreRule):
    """Keeps the layer's output, all that a `backward` of this kind needs: no memory where the next layer
    keeps it anyway."""

    name: str = "output"

    def forward(self, layer: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        """The output, twice."""
        y = layer(x)
        return y, y


class VijpRule(abc.ABC):
    """A way to take a layer through a moonwalk run: F, R and M sweeps.

    Cotangents inside a run are in `trees.working_dtype` of the activations' dtype (float32 or wider), in
    `reverse` and `rebuild` alike; fragments too. Where these hold products they ask for `full_precision`.
    `has_fragment` is False where `fragment` is always `()`: strategy VIJP. `any_weights` is True where local
    error and growth are the same for all weights, so that they are known without them.
    """

    name: str
    has_fragment: bool = False
    any_weights: ClassVar[bool] = False

    def check(self, layer: PyTree, x: PyTree) -> str | None:
        """The reason why this layer's present weights do not allow the rule, or None. Concrete values only.

        `x` is the input's shape pytree.
        """
        return None

    def forward(self, layer: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        """F sweep: returns `(layer(x), input residuals)`.

        By default what `jax.vjp` with respect to the input alone keeps: nothing for a linear layer.
        """
        y, vjp = jax.vjp(layer, x)
        return y, InputVjp(vjp, tuple(leaf.dtype.name for leaf in jax.tree.leaves(y)))

    def reverse(self, layer: PyTree, residuals: PyTree, ct_out: PyTree) -> tuple[PyTree, PyTree]:
        """R sweep: returns `(ct_in, fragment)`.

        By default applies the vjp from `forward` in its own dtype and calls `fragment`.
        """
        return residuals(ct_out), self.fragment(layer, residuals, ct_out)

    def fragment(self, layer: PyTree, residuals: PyTree, ct_out: PyTree) -> PyTree:
        """The part of `ct_out` that `rebuild` cannot recover from `ct_in`; `()` where there is none."""
        return ()

    @abc.abstractmethod
    def rebuild(self, layer: PyTree, x: PyTree, ct_in: PyTree, fragment: PyTree) -> PyTree:
        """M sweep, the vijp: `ct_out` from `ct_in`, the fragment and the layer's input."""


class InvertRule(abc.ABC):
    """A way to rebuild a layer's input from its output, and from what the forward pass keeps of it (strategy
    INVERT)."""

    name: str
    keeps: bool = False
    """Whether `forward` keeps anything."""

    def check(self, layer: PyTree, x: PyTree) -> str | None:
        """As `VijpRule.check`."""
        return None

    def forward(self, layer: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        """`layer(x)`, and what the output does not tell of `x`: arrays other than `x` and `layer(x)`; by
        default nothing."""
        return layer(x), ()

    @abc.abstractmethod
    def inverse(self, layer: PyTree, y: PyTree, kept: PyTree) -> PyTree:
        """`x` with `layer(x) == y`, up to rounding; `kept` by `forward`."""

    def backward(
        self, layer: PyTree, y: PyTree, kept: PyTree, ct_out: PyTree
    ) -> tuple[PyTree, list[Any], PyTree]:
        """`(x, parameter gradients, ct_in)`: by default the inverse, and the vjp at what it rebuilds."""
        # Tied, so that `y` is gone before the vjp needs memory.
        x, ct_out = trees.tie((self.inverse(layer, y, kept), ct_out))
        return x, *layer_vjp(layer, x, ct_out)


def layer_vjp(layer: PyTree, x: PyTree, ct_out: PyTree) -> tuple[list[Any], PyTree]:
    """`(parameter gradients, ct_in)` of `layer` at `x`."""
    return value_and_vjp(layer, x)[1](ct_out)


def value_and_vjp(
    layer: PyTree, x: PyTree, policy: Callable[..., Any] | None = None
) -> tuple[PyTree, Callable[[PyTree], tuple[list[Any], PyTree]]]:
    """`layer(x)`, and what takes `ct_out` to `(parameter gradients, ct_in)`; `policy`, of `jax.checkpoint`,
    says what of the rest is kept."""

    def call(params: list[Any], x: PyTree) -> PyTree:
        return trees.with_parameters(layer, params)(x)

    if policy is not None:
        call = jax.checkpoint(call, policy=policy)
    return jax.vjp(call, trees.parameters(layer), x)


@dataclass(frozen=True)
class VjpStore(StoreRule):
    """Whatever `jax.vjp` keeps. Every layer has it.

    With a `jax.checkpoint` policy (`policy`), only what the policy saves is kept, and the rest recomputed.
    """

    name: str = "vjp"
    policy: Callable[..., Any] | None = None

    def forward(self, layer: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        """`jax.vjp` with respect to parameters and input."""

        return value_and_vjp(layer, x, self.policy)

    def backward(self, layer: PyTree, residuals: PyTree, ct_out: PyTree) -> tuple[list[Any], PyTree]:
        """Applies the vjp. On TPUs what is recomputed waits for the cotangent, as it does elsewhere by the
        barrier of `jax.checkpoint`."""
        if self.policy is not None:
            own = {id(leaf) for leaf in jax.tree.leaves(layer)}
            residuals = jax.tree.map(
                lambda leaf: leaf if id(leaf) in own else trees.after(leaf, ct_out), residuals
            )
        params, ct_in = residuals(ct_out)
        return params, ct_in


@dataclass(frozen=True)
class WholeFragment(VijpRule):
    """The whole cotangent as the fragment: any layer may stand in a moonwalk run, and its error restarts
    there.

    Fragment bytes: those of `ct_out`. The vijp costs nothing, growth and local error are 0.
    """

    name: str = "whole"
    has_fragment: bool = True
    any_weights: ClassVar[bool] = True

    def fragment(self, layer: PyTree, residuals: PyTree, ct_out: PyTree) -> PyTree:
        """All of `ct_out`."""
        return ct_out

    def rebuild(self, layer: PyTree, x: PyTree, ct_in: PyTree, fragment: PyTree) -> PyTree:
        """The fragment itself."""
        return fragment


def parameter_gradient(layer: PyTree, x: PyTree, ct_out: PyTree) -> list[Any]:
    """The cotangents of `trees.parameters(layer)` at `(x, ct_out)`: the M sweep's gradient.

    `ct_out` may be wider than the layer's output; it is cast. Cost: one parameter vjp, and whatever of the
    forward pass it needs.
    """
    params = trees.parameters(layer)
    y, vjp = jax.vjp(lambda p: trees.with_parameters(layer, p)(x), params)
    grads: list[Any] = vjp(trees.cast_like(ct_out, y))[0]
    return grads


def _collect(layer: PyTree, x: PyTree, method: str) -> tuple[Any, ...]:
    if not callable(getattr(layer, method, None)):
        return ()
    found: list[Any] = []

    def ask(layer: PyTree) -> None:
        found.extend(getattr(layer, method)(trees.struct(x)))

    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(layer)):
        jax.eval_shape(ask, layer)  # with tracers for weights, which may be computed with as shapes may not
    else:
        ask(layer)
    return tuple(found)


def products(primitive: Any, *args: Any, **params: Any) -> bool:
    """A policy of `jax.checkpoint` that keeps convolutions and products of matrices, but not the products of
    attention."""
    convolution = primitive.name in ("conv_general_dilated", "bilinear")
    return convolution or jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **params)


#: Ways to keep less than `jax.vjp` does, whatever the layer.
SMALLER = (VjpStore("products", products), VjpStore("nothing", jax.checkpoint_policies.nothing_saveable))


def has_own(layer: PyTree, x: PyTree) -> bool:
    """Whether `layer` has rules of its own at input `x` (arrays or shapes), of any kind."""
    return any(_collect(layer, x, method) for method in ("store_rules", "vijp_rules", "invert_rules"))


def store_rules(layer: PyTree, x: PyTree) -> tuple[StoreRule, ...]:
    """All the ways to store `layer`'s residuals at input `x` (arrays or shapes): its own, or `SMALLER` where
    it has none, and whatever `jax.vjp` keeps."""
    return (*(_collect(layer, x, "store_rules") or SMALLER), VjpStore())


def vijp_rules(layer: PyTree, x: PyTree) -> tuple[VijpRule | Unavailable, ...]:
    """All the ways through a moonwalk run, the unavailable ones with their reasons; `WholeFragment` last."""
    own = _collect(layer, x, "vijp_rules")
    if not own:
        own = (Unavailable("vijp", "no vijp rule: the layer defines no `vijp_rules`"),)
    return (*own, WholeFragment())


def invert_rules(layer: PyTree, x: PyTree) -> tuple[InvertRule | Unavailable, ...]:
    """All the ways to rebuild `layer`'s input from its output."""
    found = _collect(layer, x, "invert_rules")
    if not any(map(trees.is_weak, jax.tree.leaves(x))):
        return found
    why = "the layer's input is weakly typed, and what is rebuilt would not be: another dtype may come of it"
    return tuple(one if _keeps_types(one, layer, x) else Unavailable(one.name, why) for one in found)


def _keeps_types(rule: InvertRule | Unavailable, layer: PyTree, x: PyTree) -> bool:
    """Whether what a rule rebuilds is weakly typed where `x` is."""
    if isinstance(rule, Unavailable):
        return True

    def back(layer: PyTree, x: PyTree) -> PyTree:
        return rule.inverse(layer, *rule.forward(layer, x))

    pairs = zip(jax.tree.leaves(jax.eval_shape(back, layer, x)), jax.tree.leaves(x), strict=True)
    return all(trees.is_weak(got) == trees.is_weak(want) for got, want in pairs)
