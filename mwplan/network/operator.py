r"""The vector-inverse-Jacobian product as an operator that mirrors `jax.vjp`, and what a layer can do,
explained.

```python
y, vjp_fn = jax.vjp(layer, x)      # ct_in  = vjp_fn(ct_out)
y, vijp_fn = mw.vijp(layer, x)     # ct_out = vijp_fn(ct_in, fragment)
```
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import rich.box
import rich.console
import rich.table

from mwplan.common import trees
from mwplan.common.errors import ArgumentError, NotSubmersiveError
from mwplan.network import operations, rules
from mwplan.network import residuals as res
from mwplan.network.chain import Chain, as_layer, layer_name

PyTree = Any


def _one(layer: Any) -> Any:
    """`layer` as it is in a chain. Raises `ArgumentError` for a chain."""
    if isinstance(layer, Chain):
        raise ArgumentError(f"`layer` is a chain of {len(layer)} layers: give one of them, `chain[0]`")
    return as_layer(layer, 0)


#: What recognises a layer in a callable without rules, `(layer or None, reason)`; `mwplan.functions` fills
#: it.
RECOGNISERS: list[Callable[[Any, PyTree], tuple[Any, str]]] = []


def _recognised(layer: Any, x: PyTree) -> tuple[Any, str]:
    """`layer`, or what is recognised in it where it has no rules of its own; and why nothing is."""
    reason = ""
    if not any(callable(getattr(layer, f"{kind}_rules", None)) for kind in ("vijp", "store", "invert")):
        for recognise in RECOGNISERS:
            found, reason = recognise(layer, x)
            if found is not None:
                return found, ""
    return layer, f"no vijp rule, and not recognised: {reason}" if reason else ""


def _concrete(tree: PyTree) -> bool:
    """Whether the values of `tree` can be looked at: no tracers, no shapes in place of arrays."""
    leaves = jax.tree.leaves(tree)
    return not any(isinstance(leaf, (jax.core.Tracer, jax.ShapeDtypeStruct)) for leaf in leaves)


def _structs(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda a: a if isinstance(a, jax.ShapeDtypeStruct) else trees.struct(a), tree)


def _rule(layer: PyTree, x: PyTree, option: str | None, unknown: str = "") -> rules.VijpRule:
    """The rule named `option`; by default the first without a fragment, else the first with one that is not
    the whole. `unknown`, why nothing was recognised in it."""
    offered = rules.vijp_rules(layer, x)
    usable = [rule for rule in offered if isinstance(rule, rules.VijpRule)]
    name = layer_name(layer)
    if option is None:
        own = [rule for rule in usable if not isinstance(rule, rules.WholeFragment)]
        if not own:
            why = unknown or "; ".join(
                f"{r.name}: {r.reason}" for r in offered if isinstance(r, rules.Unavailable)
            )
            raise NotSubmersiveError(
                f"`layer` ({name}) has no vijp at this input: {why}. "
                'Give `option="whole"` to carry the whole cotangent as its fragment.'
            )
        return next((rule for rule in own if not rule.has_fragment), own[0])
    for one in offered:
        unavailable = isinstance(one, rules.Unavailable)
        if one.name == option or (unavailable and one.name == option.split("_")[0]):
            if isinstance(one, rules.Unavailable):
                raise NotSubmersiveError(f'`option="{option}"` is not available for {name}: {one.reason}')
            return one
    raise ArgumentError(
        f"`option={option!r}` is none of the options of {name}: {', '.join(r.name for r in usable)}"
    )


def _checked(rule: rules.VijpRule, layer: PyTree, x: PyTree) -> rules.VijpRule:
    problem = rule.check(layer, x) if _concrete(layer) else None
    if problem is not None:
        raise NotSubmersiveError(
            f'`layer` ({layer_name(layer)}) cannot be inverted by option "{rule.name}": {problem}'
        )
    return rule


def _match(got: PyTree, want: PyTree, name: str) -> PyTree:
    """`got` widened, if it has the structure and shapes of `want`; raises `ArgumentError` otherwise."""
    have: Any = jax.tree.structure(got)
    wanted: Any = jax.tree.structure(want)
    if have != wanted:
        raise ArgumentError(f"`{name}` has structure {have}; this layer and option want {wanted}")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        if jnp.shape(a) != b.shape:
            raise ArgumentError(f"`{name}` has a leaf of shape {jnp.shape(a)} where {b.shape} is wanted")
    return trees.widen(jax.tree.map(lambda a: a if trees.is_array(a) else jnp.asarray(a), got))


def vijp(
    layer: Callable[[PyTree], PyTree], x: PyTree, option: str | None = None, *, check: bool = True
) -> tuple[PyTree, Callable[..., PyTree]]:
    r"""Evaluates `layer(x)` and returns a function that rebuilds the output's cotangent from the input's.

    With $\bar x = \bar y\,J^\top$ the input's cotangent, `vijp_fn(ct_in, fragment)` returns $\bar y$:
    determined by $\bar x$ alone where $J$ erases nothing, and by $\bar x$ and the fragment otherwise
    (`fragment_of` takes it from a cotangent that is at hand).

    **Arguments:** `layer`, a callable pytree with rules (`mwplan.layers`), a function whose operations are
    those of such layers (`mw.recognises`), or any callable with `option="whole"`; `x`, its input; `option`,
    the name of a rule (`explain` lists them), by default the first that needs no fragment, else the first at
    all; `check`, whether to look at the weights' values first, which costs a factorisation on the host;
    skipped while tracing.
    **Returns:** `(y, vijp_fn)`; `vijp_fn(ct_in, fragment=())` gives `ct_out` in float32 or wider, whatever
    the dtype of `y`. That `ct_in` is in the image of $J^\top$ is assumed and not checked.
    **Raises:** `NotSubmersiveError` where the layer has no such rule or its weights do not allow it;
    `ArgumentError` for an unknown option and, from `vijp_fn`, for wrong shapes.
    **Source:** Krylov et al., arXiv:2402.14212.

    >>> layer, x = mw.layers.Dense.init(jax.random.key(0), 4, 3), jnp.ones((2, 4))
    >>> y, vijp_fn = mw.vijp(layer, x)
    >>> ct_out = jnp.arange(6.0).reshape(2, 3)
    >>> (ct_in,) = jax.vjp(layer, x)[1](ct_out)
    >>> bool(jnp.allclose(vijp_fn(ct_in), ct_out, atol=1e-5))
    True

    A plain function:

    >>> y, vijp_fn = mw.vijp(lambda x: jax.nn.leaky_relu(x @ layer.weight + 1, 0.5), x)
    >>> y.shape
    (2, 3)
    """
    layer, unknown = (_one(layer), "") if option == "whole" else _recognised(_one(layer), x)
    rule = _rule(layer, x, option, unknown)
    if check:
        _checked(rule, layer, _structs(x))
    fragment_struct = jax.eval_shape(lambda: _sweep(rule, layer, x)[1])

    def vijp_fn(ct_in: PyTree, fragment: PyTree = ()) -> PyTree:
        wanted = "fragment" if rule.has_fragment else "fragment (none is needed: leave it out)"
        ct = trees.as_cotangent(_match(ct_in, x, "ct_in"), x)
        return operations.vijp(layer, x, ct, _match(fragment, fragment_struct, wanted), rule=rule)

    return layer(x), vijp_fn


def _sweep(rule: rules.VijpRule, layer: PyTree, x: PyTree, ct_out: PyTree = None) -> tuple[PyTree, PyTree]:
    """`(ct_in, fragment)`; for shapes alone `ct_out` may be left out."""
    y, kept = rule.forward(layer, x)
    ct_out = y if ct_out is None else _match(ct_out, _structs(y), "ct_out")
    return rule.reverse(layer, kept, trees.widen(trees.as_cotangent(ct_out, y)))


def fragment_of(layer: PyTree, x: PyTree, ct_out: PyTree, option: str | None = None) -> PyTree:
    """The fragment of `ct_out` that `vijp(layer, x, option)` wants beside the input's cotangent: `()` where
    it wants none.

    In float32 or wider. Raises as `vijp` does.

    >>> layer, x, ct_out = mw.layers.ReLU(), jnp.array([-1.0, 2.0]), jnp.array([5.0, 7.0])
    >>> mw.fragment_of(layer, x, ct_out, option="whole").tolist()
    [5.0, 7.0]
    """
    layer, unknown = (_one(layer), "") if option == "whole" else _recognised(_one(layer), x)
    return _sweep(_rule(layer, x, option, unknown), layer, x, ct_out)[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to handle a layer, or the reason why it is not one.

    `residual_bytes`: kept from forward to backward, new beside parameters, input and output; `shares`: which
    of those it keeps too.
    """

    strategy: str
    option: str
    residual_bytes: int | None = None
    fragment_bytes: int | None = None
    shares: str = ""
    reason: str | None = None

    @property
    def available(self) -> bool:
        """Whether a plan may use it."""
        return self.reason is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What a layer can do at an input, and why not the rest. Prints as a table."""

    layer: str
    output_bytes: int
    ways: tuple[Way, ...]

    def __rich__(self) -> rich.table.Table:
        """The table."""
        table = rich.table.Table(
            title=f"{self.layer}: output {self.output_bytes:_} bytes",
            box=rich.box.SIMPLE,
            title_justify="left",
        )
        for column, justify in (
            ("strategy", "left"),
            ("option", "left"),
            ("keeps", "right"),
            ("fragment", "right"),
        ):
            table.add_column(column, justify=justify)  # type: ignore[arg-type]
        table.add_column("note")
        for way in self.ways:
            note = (
                f"not available: {way.reason}"
                if way.reason
                else way.shares and f"and the layer's {way.shares}"
            )
            table.add_row(
                way.strategy,
                way.option,
                self._size(way.residual_bytes),
                self._size(way.fragment_bytes),
                note,
                style="dim" if way.reason else "",
            )
        return table

    def _size(self, size: int | None) -> str:
        if size is None:
            return ""
        if not self.output_bytes:
            return f"{size:_} B"
        share = size / self.output_bytes
        return f"{size:_} B ({share:.1%})" if share < 10 else f"{size:_} B ({share:,.0f} times the output)"

    def __str__(self) -> str:
        console = rich.console.Console(width=150, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def explain(layer: Callable[[PyTree], PyTree], x: PyTree) -> Explanation:
    """Which strategies `layer` has at input `x`, what each keeps, and why it has not the others. Of a
    function without rules those of the layers of `mwplan.layers` that are recognised in it.

    **Arguments:** `layer`, any callable pytree, explained as it is in a chain; `x`, arrays or
    `jax.ShapeDtypeStruct`s. Preconditions on values (full rank, slopes, finite weights) are checked where the
    layer's arrays are concrete.

    >>> table = mw.explain(mw.layers.LeakyReLU(0.5), jnp.ones((256, 64)))
    >>> [way.option for way in table.ways if way.strategy == "VIJP"]
    ['divide']
    """
    name = layer_name(one := _one(layer))
    layer, unknown = _recognised(one, x)
    name = name if layer is one else f"{name}, recognised as {layer_name(layer)}"
    x = _structs(x)
    output = jax.eval_shape(lambda layer, x: layer(x), layer, x)
    ways: list[Way] = []
    for store in operations.store_rules(layer, x):
        ways.append(_way("STORE", store, layer, x))
    ways.append(Way(strategy="RECOMPUTE", option="", residual_bytes=0, shares="input"))
    for rule in rules.vijp_rules(layer, x):
        if isinstance(rule, rules.Unavailable):
            ways.append(Way(strategy="VIJP/FRAGMENT", option=rule.name, reason=unknown or rule.reason))
        else:
            reason = rule.check(layer, x) if _concrete(layer) else None
            ways.append(_way("FRAGMENT" if rule.has_fragment else "VIJP", rule, layer, x, reason))
    inversions = rules.invert_rules(layer, x)
    for inversion in inversions:
        if isinstance(inversion, rules.Unavailable):
            ways.append(Way(strategy="INVERT", option=inversion.name, reason=inversion.reason))
        else:
            reason = inversion.check(layer, x) if _concrete(layer) else None
            way = _way("INVERT", inversion, layer, x, reason)
            ways.append(dataclasses.replace(way, shares="output"))
    if not inversions:
        ways.append(Way(strategy="INVERT", option="", reason=_no_inverse(layer)))
    return Explanation(layer=name, output_bytes=trees.nbytes(output), ways=tuple(ways))


def _no_inverse(layer: PyTree) -> str:
    """Why a layer offers none."""
    if not hasattr(layer, "invert_rules"):
        return f"{layer_name(layer)} defines no `invert_rules`"
    return f"{layer_name(layer)} has no inverse for these shapes"


def _way(
    strategy: str,
    rule: rules.StoreRule | rules.VijpRule | rules.InvertRule,
    layer: PyTree,
    x: PyTree,
    reason: str | None = None,
) -> Way:
    """The bytes of one rule, from shapes alone."""
    held = jax.eval_shape(lambda layer, x: operations.forward(layer, x, rule=rule)[1], layer, x)
    shares = " and ".join(
        n for n, kept in (("input", held.keeps_input), ("output", held.keeps_output)) if kept
    )
    size = None
    if isinstance(rule, rules.VijpRule):
        size = trees.nbytes(jax.eval_shape(lambda layer, x: _sweep(rule, layer, x)[1], layer, x))
    return Way(
        strategy=strategy,
        option=rule.name,
        residual_bytes=res.new_bytes(held),
        fragment_bytes=size,
        shares=shares,
        reason=reason,
    )
