r"""What rounding does to a cotangent that is rebuilt: local error and growth of one option, measured.

Along a moonwalk run `err_l^2 = (growth_l * err_{l-1})^2 + local_error_l^2` (docs/accounting.md). Both numbers
come from random cotangents on the layer's present weights, in working precision; seeds are the caller's key.

- **local error**: $|\bar y' - \bar y| / |\bar y|$ with $\bar y'$ rebuilt from the reverse sweep's own
  $\bar x$ and fragment: the rounding of both sweeps, amplified by this one layer.
- **growth**: $\frac{|d J^+| / |d|}{|\bar y| / |\bar x|}$ with $d$ fresh white noise in place of $\bar x$ and
  no noise in the fragment, which is kept exactly: a vijp is linear in the cotangent and the fragment
  together, so $d J^+$ is the rebuild from $(d, 0)$.

An INVERT run rebuilds activations, and differentiates at them. Of an inverse, local error and growth are
those of the activation, and three more numbers say what an activation's error does to the vjp there
(`InverseErrors`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mwplan.common import trees
from mwplan.network.residuals import remembered
from mwplan.network.rules import InvertRule, VijpRule, WholeFragment, layer_vjp, parameter_gradient
from mwplan.profiling.noise import another, draws, random_cotangent

PyTree = Any


def _finite_part(tree: PyTree) -> PyTree:
    """`tree` with zeros for what is not finite, the infinities of an attention's mask, say, which tell
    nothing of an activation's size."""
    return jax.tree.map(lambda a: jnp.where(jnp.isfinite(a), a, 0) if trees.is_inexact(a) else a, tree)


def _norm(tree: PyTree) -> jax.Array:
    """The Euclidean norm of all inexact leaves together."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if trees.is_inexact(leaf)]
    return jnp.sqrt(sum((jnp.sum(jnp.square(jnp.abs(leaf))) for leaf in leaves), start=jnp.zeros(())))


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a / b`, 0 where both are 0."""
    return jnp.where(a == 0, 0.0, a / b)


def _vijp_errors(rule: VijpRule, layer: PyTree, x: PyTree, ct_out: PyTree, noise: PyTree) -> jax.Array:
    _, residuals = rule.forward(layer, x)
    ct_in, fragment = rule.reverse(layer, residuals, trees.widen(ct_out))
    # Without the barrier the compiler could cancel reverse against rebuild and report an error that no run
    # has.
    ct_in, fragment, x = trees.tie((ct_in, fragment, x))
    back = rule.rebuild(layer, x, ct_in, fragment)
    local = _ratio(_norm(_minus(back, ct_out)), _norm(ct_out))
    moved = rule.rebuild(layer, x, noise, jax.tree.map(_zeros_like, fragment))
    growth = _ratio(_norm(moved) * _norm(ct_in), _norm(noise) * _norm(ct_out))
    return jnp.stack([local, growth])


def _output(rule: None, layer: PyTree, x: PyTree) -> PyTree:
    return layer(x)


class InverseErrors(NamedTuple):
    """What an inverse, and the vjp at what it rebuilds, do to errors.

    `local_error`, `growth`: of the activation, relative to it. `sensitivity`: relative change of the input's
    cotangent over the relative change of the input; `gradient_sensitivity`: likewise of the parameters'
    gradient. `kink`: the square of what either changes besides, over the change of the input, where the layer
    is not smooth.
    """

    local_error: float
    growth: float
    sensitivity: float
    gradient_sensitivity: float
    kink: float


def _invert_errors(rule: InvertRule, layer: PyTree, x: PyTree, y: PyTree, noise: PyTree) -> jax.Array:
    _, kept = rule.forward(layer, x)
    back = rule.inverse(layer, y, kept)
    scale = _norm(_finite_part(x))
    local = _ratio(_norm(_minus(back, x)), scale)
    tangent = trees.cast_like(noise, y)
    _, moved = jax.jvp(lambda out: rule.inverse(layer, out, kept), (y,), (tangent,))
    growth = _ratio(_norm(moved) * _norm(_finite_part(y)), _norm(noise) * scale)
    return jnp.stack([local, growth])


_LEVELS = (2.0**5, 2.0**10)  # of the input's precision: an error early in a run, and one near the tolerance
_KINK_LEVELS = (2.0**-11, 2.0**-7)  # of the input: large enough for some of a few thousand ReLUs to flip
_DRAWS = 4


def _sensitivities(rule: InvertRule | None, layer: PyTree, x: PyTree, y: PyTree, key: jax.Array) -> jax.Array:
    r"""`(sensitivity, gradient_sensitivity, kink)`: the layer's vjp at `x` moved by white noise against that
    at `x`, the root mean square of 4 draws, the larger of two sizes of noise (4e-6 and 1e-4 of the input in
    float32). `rule`: an inverse that keeps something of `x`, which does not move; its vjp is at what it
    rebuilds from `y` moved by the layer's derivative times the noise.

    Differences, not a derivative: where a norm's input is nearly zero, or a ReLU's is exactly so, the vjp
    changes by a part of itself however small the noise. The vjp is of the output itself and white noise,
    equal in size, so that the gradient of the parameters is a sum of terms that agree, as gradients of losses
    are, and not the small remainder of terms that cancel.

    **Kinks.** Noise of relative size $h$ flips a share of about $0.4h$ of a layer's ReLUs, each of which
    changes its element of the cotangent by a part of itself: in Euclidean norm the square of the change is
    $(sh)^2 + kh$, with $k$ the `kink`. It is the difference between the same noise at two sizes (1/2048 and
    1/128 of the input), $k = (D_1^2/h_1^2 - D_2^2/h_2^2) / (1/h_1 - 1/h_2)$, near 0 where the layer is
    smooth. So that flips do not count in the sensitivity of the cotangent as well, that is of sums of
    absolute values, to which a flip adds by its share.
    """
    leaves = [leaf for leaf in jax.tree.leaves(x) if trees.is_inexact(leaf)]
    if not leaves:
        return jnp.zeros(3)
    noise_key, key = jax.random.split(key)
    noise = random_cotangent(y, noise_key)
    scale, size = _ratio(_norm(noise), _norm(_finite_part(y))), _norm(_finite_part(x))
    ct = jax.tree.map(
        lambda n, leaf: (n + scale * leaf).astype(leaf.dtype) if trees.is_inexact(leaf) else n,
        noise,
        _finite_part(y),
    )

    kept = () if rule is None else rule.forward(layer, x)[1]

    def pull(at: PyTree) -> tuple[list[Any], list[Any]]:
        if rule is None:
            grads, ct_in = layer_vjp(layer, at, ct)
        else:
            _, out = jax.jvp(layer, (x,), (jax.tree.map(_tangent, at, x),))
            moved = jax.tree.map(lambda a, b: a + b if trees.is_inexact(a) else a, y, out)
            _, grads, ct_in = rule.backward(layer, moved, kept, ct)
        return [g for g in jax.tree.leaves(trees.widen(ct_in)) if trees.is_inexact(g)], trees.widen(grads)

    def total(arrays: list[Any]) -> jax.Array:
        return sum((jnp.sum(jnp.abs(a)) for a in arrays), start=jnp.zeros(()))

    def moved(level: jax.Array, noise: PyTree, its_norm: jax.Array) -> jax.Array:
        step = level * _ratio(size, its_norm)
        other = jax.tree.map(
            lambda leaf, n: (
                trees.typed_like((leaf + step * n).astype(leaf.dtype), leaf)
                if trees.is_inexact(leaf)
                else leaf
            ),
            x,
            noise,
        )
        by = _ratio(_norm(_minus(other, x)), size)  # what rounding left of it
        ct_in, grads = pull(other)
        moved_ct, moved_grads = _minus(ct_in, truth[0]), _minus(grads, truth[1])
        changes = (
            _ratio(total(moved_ct), total(truth[0])),
            _ratio(_norm(moved_grads), _norm(truth[1])),
            _ratio(_norm(moved_ct), _norm(truth[0])),
        )
        return jnp.stack([_ratio(change, by) for change in changes])

    def of_one_draw(key: jax.Array) -> jax.Array:
        noise = random_cotangent(x, key)
        norm = _norm(noise)
        draws: jax.Array = jax.lax.map(lambda level: moved(level, noise, norm), jnp.asarray(sizes))
        return draws

    truth = jax.lax.optimization_barrier(pull(x))
    eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in leaves)
    sizes = [*(min(0.25, level * eps) for level in _LEVELS), *_KINK_LEVELS]
    # Draws are slow beside the vjps: each serves all sizes.
    found = jax.lax.map(of_one_draw, jnp.stack(draws(key, _DRAWS)))
    squares = jnp.mean(found**2, axis=0)
    small, large = (1 / h for h in _KINK_LEVELS)
    kink = (squares[2] - squares[3])[1:].max() / (small - large)
    return jnp.append(jnp.sqrt(squares[:2, :2].max(axis=0)), jnp.maximum(kink, 0))


def _tangent(at: jax.Array, x: jax.Array) -> Any:
    return jnp.where(at == x, 0, at - x).astype(x.dtype) if trees.is_inexact(x) else trees.no_cotangent(x)


def _zeros_like(leaf: Any) -> Any:
    return jnp.zeros_like(leaf) if trees.is_inexact(leaf) else leaf


def _minus(a: PyTree, b: PyTree) -> list[Any]:
    """The differences of the inexact leaves, in working precision; infinities that are the same do not
    differ."""
    pairs = zip(jax.tree.leaves(trees.widen(a)), jax.tree.leaves(trees.widen(b)), strict=True)
    return [jnp.where(p == q, 0, p - q) for p, q in pairs if trees.is_inexact(q)]


@lru_cache(maxsize=512)
def _compiled(
    function: Callable[..., Any], rule: Any, treedef: Any, fixed: tuple[Any, ...]
) -> Callable[..., Any]:
    """`function` compiled for one rule and one structure of layer; its arrays are arguments, so equal layers
    share it."""

    def call(arrays: list[Any], *args: Any) -> Any:
        left = iter(arrays)
        leaves = [next(left) if is_array else leaf for is_array, leaf in fixed]
        return function(rule, jax.tree.unflatten(treedef, leaves), *args)

    return jax.jit(call)


#: The same for layers with functions in them, which are let go.
_compiled_for_now = remembered(_compiled.__wrapped__)


def _holds_functions(structure: Any) -> bool:
    """Whether there are functions among the parts of a structure that are no arrays."""
    if isinstance(structure, jax.tree_util.PyTreeDef):
        data = structure.node_data()
        return any(map(_holds_functions, (data and data[1], *structure.children())))
    if isinstance(structure, (tuple, list)):
        return any(map(_holds_functions, structure))
    return callable(structure) and not isinstance(structure, type)


def _call(function: Callable[..., Any], rule: Any, layer: PyTree, *args: Any) -> Any:
    """`function(rule, layer, *args)`, compiled."""
    leaves, treedef = jax.tree.flatten(layer)
    fixed = tuple((True, None) if trees.is_array(leaf) else (False, leaf) for leaf in leaves)
    arrays = [leaf for leaf in leaves if trees.is_array(leaf)]
    held = _holds_functions((treedef, [leaf for _, leaf in fixed]))
    try:
        call = (_compiled_for_now if held else _compiled)(function, rule, treedef, fixed)
    except TypeError:  # something in the layer cannot be hashed: compiled for this call alone
        call = _compiled.__wrapped__(function, rule, treedef, fixed)
    return call(arrays, *args)


def _finite(value: Any) -> float:
    number = float(value)
    return number if math.isfinite(number) else math.inf


def _run(function: Callable[..., Any], rule: Any, layer: PyTree, *args: Any) -> tuple[float, ...]:
    return tuple(map(_finite, jax.device_get(_call(function, rule, layer, *args))))


def measure(
    layer: PyTree, rule: VijpRule, x: PyTree, key: jax.Array, ct_out: PyTree = None
) -> tuple[float, float]:
    """`(local_error, growth)` of one vijp of `layer` at input `x` (arrays) by `rule`; infinity where not
    finite.

    `ct_out`: the cotangent to rebuild, white noise from `key` by default. Both 0 for `WholeFragment`.
    Compiled once for each rule and structure of layer.
    """
    if isinstance(rule, WholeFragment):
        return 0.0, 0.0
    if ct_out is None:
        ct_out = random_cotangent(jax.eval_shape(layer, x), key)
    local, growth = _run(_vijp_errors, rule, layer, x, ct_out, random_cotangent(x, another(key)))
    return local, growth


def measure_inverse(layer: PyTree, rule: InvertRule, x: PyTree, key: jax.Array) -> InverseErrors:
    """The errors of `layer` inverted by `rule` at input `x` (arrays), infinity where not finite. **Cost:** an
    inverse and its derivative, and 17 vjps; where the rule keeps something, 17 times its backward and a
    derivative of the layer."""
    y = _call(_output, None, layer, x)
    errors = _run(_invert_errors, rule, layer, x, y, random_cotangent(y, another(key)))
    return InverseErrors(*errors, *_run(_sensitivities, rule if rule.keeps else None, layer, x, y, key))


def predict(options: Iterable[tuple[float, float]]) -> list[float]:
    """The predicted error after each layer of a run from its `(local_error, growth)` pairs, input first, from
    0 at its start."""
    errors, error = [], 0.0
    for local, growth in options:
        error = ((growth * error) ** 2 + local**2) ** 0.5 if growth * error < 1e150 else float("inf")
        errors.append(error)
    return errors


_SLACK = 2.0


def steady(factors: Sequence[float], each: float = 1.0) -> float:
    """One growth for layers that share an option: the least with which no run over some of them is predicted
    below half of what their own growths say.

    `factors`: of layers spread evenly over those that share, in order, each standing for `each` layers. Their
    largest would be wrong by a power of the run's length where growth changes with depth, as that of residual
    blocks does; it is what comes out for `each = 1` if one factor stands out.
    """
    if not all(map(math.isfinite, factors)):
        return math.inf
    logs = [math.log(max(f, 1e-30)) for f in factors]
    best = sum(logs) / len(logs)
    for i in range(len(logs)):
        for j in range(i + 1, len(logs) + 1):
            best = max(best, sum(logs[i:j]) / (j - i) - math.log(_SLACK) / (each * (j - i)))
    return math.exp(best) if best > math.log(1e-30) else 0.0


def predict_inverse(options: Sequence[InverseErrors]) -> float:
    """The predicted error of an INVERT run, input first: the largest of its activations', its gradients' and
    of the cotangent that leaves it."""
    activation = cotangent = worst = 0.0
    for o in reversed(options):
        activation = math.hypot(o.growth * activation, o.local_error)
        kink = math.sqrt(o.kink * activation)
        gradient = math.hypot(cotangent, o.gradient_sensitivity * activation, kink)
        cotangent = math.hypot(cotangent, o.sensitivity * activation, kink)
        worst = max(worst, activation, gradient, cotangent)
    return worst


@dataclass(frozen=True, slots=True, kw_only=True)
class Followed:
    """One moonwalk run, followed layer by layer from its input.

    `predicted`, `measured`: relative error of each layer's rebuilt output cotangent; `growth`, `local_error`:
    of each layer's option; `gradient`: relative error of all parameter gradients together, `worst_gradient`:
    of the worst layer's.
    """

    predicted: tuple[float, ...]
    measured: tuple[float, ...]
    growth: tuple[float, ...]
    local_error: tuple[float, ...]
    gradient: float
    worst_gradient: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Inverted:
    """One INVERT run, followed layer by layer from its end: relative errors.

    `predicted` of the run; measured ones of the worst rebuilt activation, of all parameter gradients
    together, of the worst layer's, and of the cotangent that leaves the run.
    """

    predicted: float
    activation: float
    gradient: float
    worst_gradient: float
    cotangent: float


def _invert_step(rule: InvertRule, layer: PyTree, y: PyTree, ct: PyTree, x: PyTree, truth: PyTree) -> Any:
    """`(x rebuilt, ct_in there, ct_in at x, [error and norm of the activation, of the gradient, of
    ct_in])`."""
    _, kept = rule.forward(layer, x)
    back, got, got_in = rule.backward(layer, y, kept, ct)
    want, want_in = layer_vjp(layer, x, truth)
    pairs = ((back, x), (got, want), (got_in, want_in))
    return back, got_in, want_in, [norm for a, b in pairs for norm in (_norm(_minus(a, b)), _norm(b))]


def _activations(layers: Sequence[PyTree], x: PyTree) -> list[PyTree]:
    xs = [x]
    for one in layers:
        xs.append(_call(_output, None, one, xs[-1]))
    return xs


def inverse_errors(
    layers: Sequence[PyTree], options: Sequence[InvertRule], x: PyTree, key: jax.Array
) -> list[InverseErrors]:
    """`measure_inverse` of each layer of a run, input first."""
    return [
        measure_inverse(one, rule, at, jax.random.fold_in(key, i))
        for i, (one, rule, at) in enumerate(zip(layers, options, _activations(layers, x)))
    ]


def follow_inverse(
    layers: Sequence[PyTree],
    options: Sequence[InvertRule],
    x: PyTree,
    ct_out: PyTree,
    key: jax.Array,
    errors: Sequence[InverseErrors] | None = None,
) -> Inverted:
    """Takes `layers` through one INVERT run, as `follow` does through a moonwalk run; `ct_out` as there.
    `errors`: as `inverse_errors` gives them, if they are known."""
    xs = _activations(layers, x)
    y = xs[-1]
    ct = trees.cast_like(random_cotangent(y, key), y) if ct_out is None else ct_out
    truth, rows = ct, []
    errors = inverse_errors(layers, options, x, key) if errors is None else errors
    for i in range(len(layers) - 1, -1, -1):
        one, rule = layers[i], options[i]
        y, ct, truth, row = _call(_invert_step, rule, one, y, ct, xs[i], truth)
        rows.append([float(v) for v in row])

    def relative(error: float, norm: float) -> float:
        return _finite(error / norm) if norm else 0.0

    total = math.hypot(*(row[3] for row in rows))
    return Inverted(
        predicted=predict_inverse(errors),
        activation=max(relative(row[0], row[1]) for row in rows),
        gradient=relative(math.hypot(*(row[2] for row in rows)), total),
        worst_gradient=max(relative(row[2], row[3]) for row in rows),
        cotangent=relative(rows[-1][4], rows[-1][5]),
    )


def _forward(rule: VijpRule, layer: PyTree, x: PyTree) -> Any:
    return rule.forward(layer, x)


def _reverse(rule: VijpRule, layer: PyTree, residuals: Any, ct_out: PyTree) -> Any:
    return rule.reverse(layer, residuals, ct_out)


def _rebuild(rule: VijpRule, layer: PyTree, x: PyTree, ct_in: PyTree, fragment: PyTree) -> Any:
    return rule.rebuild(layer, x, ct_in, fragment)


def _gradients(rule: Any, layer: PyTree, x: PyTree, true: PyTree, rebuilt: PyTree) -> Any:
    """`(error of the cotangent, its norm, error of the parameter gradient, its norm)`, absolute."""
    wants, gots = parameter_gradient(layer, x, true), parameter_gradient(layer, x, rebuilt)
    pairs = ((true, rebuilt), (wants, gots))
    return [norm for a, b in pairs for norm in (_norm(_minus(b, a)), _norm(a))]


def follow(
    layers: Sequence[PyTree], options: Sequence[VijpRule], x: PyTree, ct_out: PyTree, key: jax.Array
) -> Followed:
    """Takes `layers` through one moonwalk run, an operation at a time, and compares it with what R knew and
    with the prediction.

    `ct_out`: the cotangent at the run's end, white noise from `key` where None. Holds every activation and
    cotangent: for study, not for use.
    """
    xs, kept = [x], []
    for one, rule in zip(layers, options, strict=True):
        y, residuals = _call(_forward, rule, one, xs[-1])
        xs.append(y)
        kept.append(residuals)
    ct = trees.widen(random_cotangent(xs[-1], key) if ct_out is None else ct_out)
    cts, fragments = [ct], []
    for one, rule, residuals in zip(reversed(layers), reversed(options), reversed(kept)):
        ct, fragment = _call(_reverse, rule, one, residuals, ct)
        cts.append(ct)
        fragments.append(fragment)
    cts, fragments = cts[::-1], fragments[::-1]
    rows, pairs = [], []
    for i, (one, rule) in enumerate(zip(layers, options)):
        ct = _call(_rebuild, rule, one, xs[i], ct, fragments[i])
        rows.append([float(v) for v in _call(_gradients, None, one, xs[i], cts[i + 1], ct)])
        pairs.append(measure(one, rule, xs[i], jax.random.fold_in(key, i), cts[i + 1]))
    total = math.sqrt(sum(row[3] ** 2 for row in rows))
    return Followed(
        predicted=tuple(predict(pairs)),
        measured=tuple(_finite(e / n) if n else 0.0 for e, n, _, _ in rows),
        growth=tuple(g for _, g in pairs),
        local_error=tuple(e for e, _ in pairs),
        gradient=_finite(math.sqrt(sum(row[2] ** 2 for row in rows)) / total) if total else 0.0,
        worst_gradient=max((_finite(e / n) for _, _, e, n in rows if n), default=0.0),
    )
