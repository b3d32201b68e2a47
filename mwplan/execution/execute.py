"""Runs a schedule: `apply`, an ordinary differentiable JAX function, and `value_and_grad` with its error
report."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mwplan.common import trees
from mwplan.common.errors import ArgumentError, ScheduleMismatchError, SecondDerivativeError
from mwplan.common.sizes import show_bytes
from mwplan.compilers.compiling import warn_if_undone
from mwplan.execution import barriers, plain
from mwplan.execution.barriers import Barriers, Performer
from mwplan.execution.gradients import Gradients
from mwplan.execution.interpreter import Interpreter
from mwplan.execution.view import View
from mwplan.network import residuals, sharding
from mwplan.network.carried import Carried
from mwplan.network.chain import Chain, Stack, boundaries, check_chain, check_closures, fingerprint
from mwplan.plans.schedule import RunKind, Schedule, allow_nesting, nesting, reporting_runs

PyTree = Any
#: How the program of a step is written: 0, with the barriers that its platform needs; `UNTIED`; `LOOSE`;
#: `PLAIN`; or with barriers of one's own.
Arrangement = int | Barriers
#: The arrangement without barriers around operations: those around recomputed stretches and reconstructions
#: stay.
UNTIED = -1
#: The arrangement with barriers around activations and cotangents, but not around residuals.
LOOSE = -2
#: The arrangement that JAX itself makes (`mwplan.execution.plain`): of schedules that store layers or
#: recompute single ones.
PLAIN = -3


class InputGrownWarning(UserWarning):
    """A planned step is differentiated at an input larger than the one it was planned for.

    >>> import warnings
    >>> net = mw.Chain([jnp.tanh] * 8)
    >>> schedule = mw.plan(mw.estimate(net, jnp.ones((256, 64)), device="h100"), budget="400KiB")
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     grads = jax.grad(lambda x: jnp.sum(mw.apply(schedule, net, x)))(jnp.ones((512, 64)))
    >>> [one.category.__name__ for one in caught]
    ['InputGrownWarning']
    """


@dataclass(frozen=True, slots=True)
class RunDiscrepancy:
    """How far one run's reconstruction was from the truth, relative; as in `Report`."""

    start: int
    stop: int
    kind: RunKind
    discrepancy: float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Report:
    """What a step's runs report of themselves.

    `discrepancy`: one float32 for each MOONWALK and INVERT run (inner ones too, in the order of `runs`), an
    estimate of its gradients' relative error beside those of `jax.grad`: the distance between 64-number
    random sketches of what the run rebuilt last and of the truth. For an INVERT run, which rebuilds
    activations, it is what the profile says such an error does to gradients (`Schedule.report_scales`; in a
    schedule made by hand the distance itself). NaN if no cotangent reached the run.

    >>> net, x = mw.Chain([mw.layers.LeakyReLU(0.5)] * 2), jnp.linspace(-1.0, 1.0, 64)
    >>> vijps = mw.Run(kind=mw.RunKind.MOONWALK, start=0, stop=2, options=("divide", "divide"))
    >>> step = mw.jit(mw.value_and_grad(jnp.sum, mw.Schedule(runs=(vijps,))))
    >>> (value, report), grads = step(net, x)
    >>> report.discrepancy.shape, bool(report.worst < 1e-6)
    ((1,), True)
    """

    discrepancy: Float[Array, " runs"]
    runs: tuple[tuple[int, int, RunKind], ...] = field(metadata={"static": True})

    @classmethod
    def of(cls, schedule: Schedule, found: Float[Array, " runs"]) -> Report:
        """The report from the discrepancies that the runs found."""
        runs = tuple((run.start, run.stop, run.kind) for run in reporting_runs(schedule.runs))
        scales = schedule.report_scales or ((1.0, 0.0),) * len(runs)
        linear, kink = jnp.asarray(scales, found.dtype).reshape(-1, 2).T
        return cls(jnp.hypot(linear * found, jnp.sqrt(kink * found)), runs)

    def __str__(self) -> str:
        if not self.runs:
            return "gradients are those of `jax.grad`, to rounding: nothing was rebuilt"
        if isinstance(self.discrepancy, jax.core.Tracer) or jnp.ndim(self.discrepancy) != 1:
            return repr(self)
        if not jnp.any(self.discrepancy):
            return "gradients are those of `jax.grad`, to rounding: what was rebuilt is exact"
        rows = [
            f"  layers {one.start + 1} to {one.stop}, {one.kind.value}: {one.discrepancy:.1e}"
            for one in self.table()
        ]
        return "\n".join(["estimated relative error of the gradients, by run:", *rows])

    @property
    def worst(self) -> Float[Array, ""]:
        """The largest discrepancy; 0 if no run reconstructs anything."""
        return jnp.max(self.discrepancy, initial=0.0)

    def table(self) -> tuple[RunDiscrepancy, ...]:
        """The report as plain values; needs concrete arrays."""
        return tuple(
            RunDiscrepancy(start, stop, kind, float(value))
            for (start, stop, kind), value in zip(self.runs, self.discrepancy)
        )


@jax.custom_jvp
def _once(tree: PyTree) -> PyTree:
    return tree


@_once.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    raise SecondDerivativeError(
        "a planned step was differentiated twice: its backward pass is a schedule of its own and has no "
        "derivative. "
        "Take second derivatives of the plain chain, `chain(x)`, instead of `mw.apply(schedule, chain, x)`"
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Saved:
    """What crosses from the forward to the backward function of `custom_vjp`."""

    chain: Chain
    x: dict[int, PyTree]
    kept: list[Any]
    sketches: dict[int, Array]
    claims: tuple[tuple[int, int], ...] = field(metadata={"static": True})


def _planned(
    schedule: Schedule, *, check: bool, arrangement: Arrangement, wrt_input: bool = True
) -> Callable[[Chain, PyTree, Array], PyTree]:
    """`(chain, x, probe) -> chain(x)`, differentiated by `schedule`; the probe's cotangent is the report.

    A cotangent is the only way out of a custom backward function, so the report leaves as that of an input
    that is not used.
    """

    perform = _performer(arrangement)
    if arrangement == PLAIN:
        plain.check(schedule)
        return lambda chain, x, probe: plain.apply(schedule, chain, x)

    @jax.custom_vjp
    def call(chain: Chain, x: PyTree, probe: Array) -> PyTree:
        return chain(x)

    def forward(chain: Chain, x: PyTree, probe: Array) -> tuple[PyTree, _Saved]:
        warn_if_grown(schedule, x)
        interpreter = _interpreter(chain, x, check, perform, wrt_input)
        interpreter.claim(0, x)
        interpreter.claim(0)  # the input is an argument: it is there to the end
        kept = interpreter.forward(schedule.runs, 0)
        y = interpreter.x[len(chain)]
        interpreter.release(len(chain))
        residuals.forget()
        claims = tuple(sorted(interpreter.claims.items()))
        return y, _Saved(chain, interpreter.x, kept, interpreter.sketches, claims)

    def backward(saved: _Saved, ct: PyTree) -> tuple[Chain, PyTree, Array]:
        saved, ct = _once((saved, ct))
        ct = trees.tie(ct)  # or XLA computes it from the output again for each of its users
        interpreter = _interpreter(saved.chain, saved.x[0], check, perform, wrt_input)
        interpreter.x, interpreter.claims = dict(saved.x), dict(saved.claims)
        interpreter.sketches = dict(saved.sketches)
        box = [interpreter.carried.dropped(ct, len(saved.chain))]
        del ct
        interpreter.backward(schedule.runs, saved.kept, box, 0)
        residuals.forget()
        report = interpreter.reported(
            [(run.start, run.stop) for run in reporting_runs(schedule.runs)] if check else []
        )
        chain_ct = Chain.tree_unflatten(
            None, [_part_cotangent(part, g) for part, g in zip(saved.chain.parts, interpreter.grads.parts)]
        )
        whole = interpreter.carried.filled(box[0], 0, interpreter.structs[0])
        x_ct = jax.tree.map(_instantiate, saved.x[0], whole)
        axes = trees.varying_axes((saved.chain, saved.x[0]))
        varied: tuple[Chain, PyTree, Array] = trees.vary((chain_ct, x_ct, report), axes)
        return varied

    call.defvjp(forward, backward)

    def alike(chain: Chain, x: PyTree, probe: Array) -> PyTree:
        # Within `jax.shard_map` weights may be the same on every device where the input is not. A gradient
        # has its argument's type, so all arguments are first declared to vary alike; the derivative of that
        # declaration sums the weights' gradient, as JAX does.
        return call(*trees.vary((chain, x, probe), trees.varying_axes((chain, x, probe))))

    def placed(chain: Chain, x: PyTree, probe: Array) -> PyTree:
        # On a mesh of explicit axes every reshape would have to say where its result lies. Inside, the
        # compiler decides.
        mesh = sharding.explicit_mesh((chain, x))
        if mesh is None:
            return alike(chain, x, probe)
        y = jax.eval_shape(lambda chain, x: chain(x), chain, x)
        with jax.sharding.use_abstract_mesh(mesh):
            return jax.sharding.auto_axes(alike, out_sharding=jax.tree.map(sharding.spec, y))(chain, x, probe)

    return placed


def _interpreter(chain: Chain, x: PyTree, check: bool, perform: Performer, wrt_input: bool) -> Interpreter:
    structs, view = boundaries(chain, x), View(chain, chain.places())
    carried = Carried.along(chain, structs, wrt_input=wrt_input)
    return Interpreter(view, structs, Gradients(chain), perform, check=check, carried=carried)


def warn_if_grown(schedule: Schedule, x: PyTree) -> None:
    """Warns where `x` is larger than what the schedule was made for. What lies on several devices is not
    looked at: the profile is of one of them."""
    if 0 < schedule.input_bytes < trees.nbytes(x) and not sharding.may_be_spread():
        warnings.warn(
            f"the schedule was made for an input of {show_bytes(schedule.input_bytes)} and this one has "
            f"{show_bytes(trees.nbytes(x))}: gradients are "
            "right, but activations are larger too, and the step takes more memory than was planned. Profile "
            "at this input and plan again, or split the batch",
            InputGrownWarning,
            stacklevel=2,
        )


def _part_cotangent(part: PyTree, grads: list[Any]) -> PyTree:
    if not isinstance(part, Stack):
        return cotangent(part, grads)
    return Stack(tuple(cotangent(one, g) for one, g in zip(part.block, grads)), part.depth)


def cotangent(layer: PyTree, grads: list[Any]) -> PyTree:
    """A cotangent for every leaf of `layer`: `grads` for its parameters, zeros for what is frozen, and float0
    zeros for the rest."""
    return trees.map_parameters(
        layer,
        grads,
        lambda leaf: jnp.zeros_like(leaf) if trees.is_inexact(leaf) else trees.no_cotangent(leaf),
    )


def _instantiate(leaf: Any, ct: Any) -> Any:
    return ct if trees.is_inexact(leaf) else trees.no_cotangent(leaf)


def checked_schedule(schedule: Any) -> Schedule:
    """`schedule` if it is one, else `ArgumentError`."""
    if not isinstance(schedule, Schedule):
        raise ArgumentError(
            f"`schedule` is a {type(schedule).__name__}: make one with `mw.plan(profile, budget=...)`"
        )
    return schedule


def check_match(schedule: Schedule, chain: Chain) -> None:
    """Raises `ScheduleMismatchError` unless `schedule` was made for a chain like this one."""
    checked_schedule(schedule)
    check_closures(check_chain(chain))
    allow_nesting(nesting(schedule.runs))
    if len(schedule) != len(chain):
        raise ScheduleMismatchError(
            f"the schedule covers {len(schedule)} layers and the chain has {len(chain)}: "
            "profile this chain and plan again"
        )
    got = fingerprint(chain)
    if schedule.fingerprint and schedule.fingerprint != got:
        raise ScheduleMismatchError(
            f"the schedule was made for another chain (fingerprint {schedule.fingerprint}, this one has "
            f"{got}): "
            "same length, but other layers or parameter shapes. Profile this chain and plan again"
        )


def apply(schedule: Schedule, chain: Chain, x: PyTree, *, arrangement: Arrangement = 0) -> PyTree:
    """`chain(x)`, to be differentiated by `schedule`.

    An ordinary JAX function of `chain` and `x`: `jax.grad`, `jit`, `vmap`, `shard_map` and `optax` work on it
    as on the plain chain. Jit it with `mw.jit`, or pass `compiler_options=mw.compiler_options()` to
    `jax.jit`: without them XLA:CPU undoes the plan.

    **Arguments:** `schedule` from `mw.plan`; `chain`, with the layers and parameter shapes that the schedule
    was made for; `x`, a pytree of arrays; `arrangement`, as in `value_and_grad`.
    **Returns:** the chain's output. Its gradient's error is that of the schedule; measure it with
    `mw.value_and_grad`.
    **Raises:** `ScheduleMismatchError`; `SecondDerivativeError` when differentiated twice. **Warns:**
    `InputGrownWarning` when differentiated at an input of more bytes than planned for.

    >>> net, x = mw.Chain([jnp.tanh] * 8), jnp.ones((256, 64))
    >>> schedule = mw.plan(mw.estimate(net, x, device="h100"), budget="400KiB")
    >>> gradient = mw.jit(jax.grad(lambda x: jnp.sum(mw.apply(schedule, net, x))))
    >>> bool(jnp.allclose(gradient(x), jax.grad(lambda x: jnp.sum(net(x)))(x), rtol=1e-4))
    True
    """
    check_match(schedule, chain)
    warn_if_undone(x, chain)
    call = _planned(schedule, check=False, arrangement=arrangement)
    return call(chain, x, jnp.zeros(0, jnp.float32))


def value_and_grad(
    loss: Callable[..., Any],
    schedule: Schedule,
    *,
    has_aux: bool = False,
    wrt_input: bool = False,
    arrangement: Arrangement = 0,
) -> Callable[..., tuple[tuple[Any, Report], Any]]:
    """A function that returns `(loss, report), grads`, like `jax.value_and_grad` with the runs' error report.

    **Arguments:** `loss(y, *args)`, a scalar (with `has_aux`, a pair of it and anything); `schedule`;
    `wrt_input`: also the gradient with respect to the input; `arrangement`, how the program is written. By
    default with the barriers under which the peak is the planned one on the platform that it is compiled for:
    around all operations on CPUs, behind those of the backward sweep on GPUs, none on TPUs, whose compiler
    removes them before it orders instructions (`docs/barriers.md`).
    `mw.UNTIED`: no barriers around operations, so that XLA fuses across layers; `mw.LOOSE`: none around
    residuals, so that XLA may compute them again from what is there anyway. On CPUs both are often a few per
    cent faster, but the peak is no longer the planned one (loose, it is mostly lower): compile and measure
    it. `fitted.arrangement` is that of `mw.fit`.
    **Returns:** `f(chain, x, *args) -> ((value, report), grads)`, where `value` is what `loss` returned,
    `grads` is a chain (with None for leaves that are not parameters), or a pair `(chain, x)` of gradients.
    `report` is a `Report`; within `jax.shard_map`, each run's worst of all devices.
    **Raises:** `ArgumentError` for a loss that is not scalar (with `has_aux`, no pair); as `apply`.

    >>> net = mw.Chain([mw.layers.Dense.init(jax.random.key(0), 8, 8), jnp.tanh])
    >>> x, target = jnp.ones((4, 8)), jnp.zeros((4, 8))
    >>> schedule = mw.plan(mw.estimate(net, x, device="h100"), budget="1MiB")
    >>> loss = lambda y, target: jnp.mean((y - target) ** 2)
    >>> (value, report), grads = mw.jit(mw.value_and_grad(loss, schedule))(net, x, target)
    >>> value.shape, grads[0].weight.shape
    ((), (8, 8))
    """
    check_loss(loss)
    runs = reporting_runs(checked_schedule(schedule).runs)

    def step(chain: Chain, x: PyTree, *args: Any) -> tuple[tuple[Any, Report], Any]:
        check_match(schedule, chain)
        warn_if_undone(x, chain)
        call = _planned(schedule, check=True, arrangement=arrangement, wrt_input=wrt_input)

        def total(params: list[Any], x_params: list[Any], probe: Array) -> tuple[Any, Any]:
            y = call(trees.with_parameters(chain, params), trees.with_parameters(x, x_params), probe)
            value = loss(y, *args)
            return checked_scalar(value, has_aux), value

        wrt = (0, 1, 2) if wrt_input else (0, 2)
        probe = trees.vary(jnp.zeros(len(runs), jnp.float32), trees.varying_axes((chain, x)))
        (_, value), got = jax.value_and_grad(total, argnums=wrt, has_aux=True)(
            trees.parameters(chain), trees.parameters(x), probe
        )
        axes = tuple(sorted(trees.varying_axes(got[-1])))
        discrepancy = jax.lax.pmax(got[-1], axes) if axes else got[-1]  # the worst of all devices
        report = Report.of(schedule, discrepancy)
        grads = _only_parameters(chain, got[0])
        return (value, report), ((grads, _only_parameters(x, got[1])) if wrt_input else grads)

    return step


def _performer(arrangement: Arrangement) -> Performer:
    if isinstance(arrangement, Barriers):
        return arrangement
    none = barriers.UNTIED
    known = {0: barriers.planned(), UNTIED: none, LOOSE: barriers.LOOSE, PLAIN: none}
    if isinstance(arrangement, bool) or arrangement not in known:
        raise ArgumentError(
            f"`arrangement={arrangement!r}` must be 0, `mw.UNTIED`, `mw.LOOSE` or what `mw.fit` found "
            "(`fitted.arrangement`)"
        )
    return known[arrangement]


def _only_parameters(tree: PyTree, grads: list[Any]) -> PyTree:
    return trees.only_parameters(tree, grads)


def check_loss(loss: Any) -> None:
    """Raises `ArgumentError` unless `loss` can be called."""
    if not callable(loss):
        raise ArgumentError(
            f"`loss` is a {type(loss).__name__}, which is not callable: give a function `loss(y, *args)` "
            "that returns a scalar"
        )


def checked_scalar(value: Any, has_aux: bool) -> Any:
    """The scalar in what a loss returned (with `has_aux`, the first of a pair) if a gradient can be taken of
    it, else `ArgumentError`."""
    if has_aux:
        if not isinstance(value, (tuple, list)) or len(value) != 2:
            raise ArgumentError(
                f"`loss` returned {_described(value)}, and with `has_aux=True` it must return a pair, "
                "`(loss, anything)`: "
                "return one, or leave `has_aux` out"
            )
        value = value[0]
    if not hasattr(value, "shape") or value.shape != () or not trees.is_inexact(value):
        raise ArgumentError(
            f"`loss` returned {_described(value)}, and a gradient needs one floating-point number: take the "
            "mean or the sum "
            "(if it returns more than the loss, pass `has_aux=True`)"
        )
    return value


def _described(value: Any) -> str:
    if hasattr(value, "shape"):
        return f"{value.dtype}{list(value.shape)}"
    many = f" of {len(value)}" if isinstance(value, (tuple, list)) else ""
    return f"{type(value).__name__}{many}"


def check_losses_shape(loss: Callable[..., Any], y: PyTree, args: tuple[Any, ...], has_aux: bool) -> None:
    """Raises `ArgumentError` unless `loss(y, *args)` is what `value_and_grad` needs, from shapes alone (`y`:
    arrays or structs); what the loss itself raises it raises."""
    check_loss(loss)
    try:
        inspect.signature(loss).bind(None, *args)
    except TypeError as error:
        raise ArgumentError(
            f"`loss` cannot be called as `loss(y, *args)` with {len(args)} `args`: {error}. What follows `x` "
            "is given to it"
        ) from error
    except ValueError:  # a builtin without a signature
        pass
    jax.eval_shape(lambda y, args: checked_scalar(loss(y, *args), has_aux), y, args)
