"""Runs a schedule: `apply`, an ordinary differentiable JAX function, and `value_and_grad` with its error report.

One interpreter walks the runs forward and backward and hands each operation to a *performer*. In a compiled step the
performer puts `lax.optimization_barrier` around the operation, so that XLA neither postpones what it should free nor merges
a recomputation with what it recomputes; `mwplan.tracing` uses one that dispatches every operation by itself and looks at
what is alive.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mwplan import operations, rules, sketch, trees
from mwplan.chain import Chain, boundaries, check_chain, fingerprint, layer_name
from mwplan.compiling import warn_if_undone
from mwplan.errors import ArgumentError, ScheduleMismatchError, SecondDerivativeError
from mwplan.residuals import Residuals
from mwplan.schedule import Run, RunKind, Schedule, walk

PyTree = Any


class Performer(Protocol):
    """Executes one operation. `sweep`, `layer`, `depth` as in `ledger.Event`."""

    def __call__(self, sweep: str, layer: int, depth: int, operation: Callable[..., Any], *args: Any) -> Any:
        """Returns `operation(*args)`."""


def compiled(sweep: str, layer: int, depth: int, operation: Callable[..., Any], *args: Any) -> Any:
    """The performer of a compiled step.

    Inputs are tied so that no part of an operation (a factorisation of the weights, say) starts before its turn, outputs so
    that all of it is done before the next begins.
    """
    return trees.tie(operation(*trees.tie(args)))


class Interpreter:
    """Walks the runs of a schedule over a chain.

    **Arguments:** `chain`; `structs`, the shapes of its boundaries; `perform`, which executes an operation; `gate`, which makes
    arrays wait for one another; `check`, whether runs that reconstruct something are compared with the truth.

    **Attributes:** `x`, the activations alive by position, each once however many runs want it, and `claims`, how many do;
    `report`, the discrepancies by run; `sketches`, of the activations that INVERT runs will rebuild.
    """

    def __init__(
        self,
        chain: Chain,
        structs: Sequence[PyTree],
        perform: Performer = compiled,
        gate: Callable[[PyTree], PyTree] = trees.tie,
        *,
        check: bool = False,
    ) -> None:
        self.chain = chain
        self.structs = structs
        self.perform = perform
        self.gate = gate
        self.check = check
        self.x: dict[int, PyTree] = {}
        self.claims: dict[int, int] = {}
        self.report: dict[tuple[int, int], Array] = {}
        self.sketches: dict[int, Array] = {}

    # -- activations -----------------------------------------------------------------------------------------------

    def claim(self, position: int, value: PyTree = None) -> None:
        """One more user of `x_position`; `value` is needed from the first."""
        if position not in self.x:
            self.x[position] = value
        self.claims[position] = self.claims.get(position, 0) + 1

    def release(self, position: int) -> None:
        """One user less; the last one drops it."""
        self.claims[position] -= 1
        if not self.claims[position]:
            del self.x[position], self.claims[position]

    def shared(self, layer: int, held: Residuals) -> tuple[PyTree, PyTree]:
        """The layer's input and output where its residuals share them, else None."""
        return self.x[layer - 1] if held.keeps_input else None, self.x[layer] if held.keeps_output else None

    def release_shared(self, layer: int, held: Residuals) -> None:
        """The residuals are gone: so are their claims."""
        if held.keeps_output:
            self.release(layer)
        if held.keeps_input:
            self.release(layer - 1)

    # -- F ---------------------------------------------------------------------------------------------------------

    def forward(self, runs: Sequence[Run], depth: int) -> list[list[Residuals]]:
        """F over `runs`: returns what each keeps.

        The stretch's input is in `x`, claimed once; that claim is consumed, and one on its output is left.
        """
        return [self._forward_run(run, depth) for run in runs]

    def _forward_run(self, run: Run, depth: int) -> list[Residuals]:
        kept = []
        for layer in range(run.start + 1, run.stop + 1):
            one = self.chain[layer - 1]
            keeps_input = keeps_output = False
            if run.kind in (RunKind.STORE, RunKind.MOONWALK):
                operation = functools.partial(operations.forward, rule=self.rule(run, layer))
                y, held = self.perform("forward", layer, depth, operation, one, self.x[layer - 1])
                kept.append(held)
                keeps_input, keeps_output = held.keeps_input, held.keeps_output
            else:
                y = self.perform("forward", layer, depth, operations.plain_forward, one, self.x[layer - 1])
            self.claim(layer, y)
            del y
            if layer == run.start + 1 and run.kind in (RunKind.MOONWALK, RunKind.RECOMPUTE):
                self.claim(run.start)
            if keeps_output or (run.kind is RunKind.INVERT and layer == run.stop):
                self.claim(layer)
            if run.kind is RunKind.INVERT and self.check and layer <= run.start + 2:
                self.sketches[layer - 1] = sketch.take(self.x[layer - 1])
            if not keeps_input:
                self.release(layer - 1)
        return kept

    # -- backward --------------------------------------------------------------------------------------------------

    def backward(
        self,
        runs: Sequence[Run],
        kept: list[list[Residuals]],
        box: list[PyTree],
        grads: list[Any],
        depth: int,
    ) -> None:
        """Backward over `runs`: fills `grads` by layer.

        `box` holds one cotangent, that of the stretch's output on entry and of its input on exit: a list, so that no frame
        up the stack keeps alive what the sweep is done with. `kept` is emptied for the same reason.
        """
        for run in reversed(runs):
            held = kept.pop()
            match run.kind:
                case RunKind.STORE:
                    self._store(run, held, box, grads, depth)
                case RunKind.MOONWALK:
                    self._moonwalk(run, held, box, grads, depth)
                case RunKind.RECOMPUTE:
                    self._recompute(run, box, grads, depth)
                case RunKind.INVERT:
                    self._invert(run, box, grads, depth)

    def _store(
        self, run: Run, kept: list[Residuals], box: list[PyTree], grads: list[Any], depth: int
    ) -> None:
        layer, held = run.stop, kept.pop()
        operation = functools.partial(operations.store_backward, rule=self.rule(run, layer))
        grads[layer - 1], ct = self.perform(
            "backward",
            layer,
            depth,
            operation,
            self.chain[layer - 1],
            held,
            *self.shared(layer, held),
            box.pop(),
        )
        box.append(ct)
        self.release_shared(layer, held)

    def _moonwalk(
        self, run: Run, kept: list[Residuals], box: list[PyTree], grads: list[Any], depth: int
    ) -> None:
        layers = range(run.start + 1, run.stop + 1)
        ct = trees.widen(box.pop())
        truth = sketch.take(ct) if self.check else None
        fragments = {}
        for layer in reversed(layers):
            held = kept.pop()
            operation: Callable[..., Any] = functools.partial(operations.reverse, rule=self.rule(run, layer))
            ct, fragments[layer] = self.perform(
                "reverse", layer, depth, operation, self.chain[layer - 1], held, *self.shared(layer, held), ct
            )
            self.release_shared(layer, held)
        del held
        box.append(trees.cast_like(ct, self.structs[run.start]))
        for layer in layers:
            one, rule = self.chain[layer - 1], self.rule(run, layer)
            operation = functools.partial(operations.vijp, rule=rule)
            ct = self.perform(
                "rebuild", layer, depth, operation, one, self.x[layer - 1], ct, fragments.pop(layer)
            )
            operation = functools.partial(operations.advance, last=layer == run.stop)
            y, grads[layer - 1] = self.perform("advance", layer, depth, operation, one, self.x[layer - 1], ct)
            if layer < run.stop:
                self.claim(layer, y)
            del y
            self.release(layer - 1)
        if truth is not None:
            self.report[run.start, run.stop] = sketch.discrepancy(truth, sketch.take(ct))
        # The runs to the left need only what R found: without this tie XLA may start them before M is done.
        # (Tying the last `ct` would not do: what nobody uses is dropped from a barrier.)
        if run.start > 0:
            box[0], grads[run.start : run.stop] = self.gate((box[0], grads[run.start : run.stop]))

    def _recompute(self, run: Run, box: list[PyTree], grads: list[Any], depth: int) -> None:
        # Nothing but this tie keeps XLA from recomputing at once, or from not recomputing at all.
        self.x[run.start], ct = self.gate((self.x[run.start], box.pop()))
        box.append(ct)
        del ct
        kept = self.forward(run.inner, depth + 1)
        self.release(run.stop)
        self.backward(run.inner, kept, box, grads, depth + 1)

    def _invert(self, run: Run, box: list[PyTree], grads: list[Any], depth: int) -> None:
        if self.check:
            self.report[run.start, run.stop] = jnp.zeros(())  # where the one layer's input is there already
        for layer in range(run.stop, run.start, -1):
            operation = functools.partial(operations.invert_backward, rule=self.rule(run, layer))
            known = self.x.get(layer - 1)  # only the run's start can be: the run to the left keeps it
            x, grads[layer - 1], ct = self.perform(
                "backward", layer, depth, operation, self.chain[layer - 1], self.x[layer], box.pop(), known
            )
            box.append(ct)
            if self.check and layer <= run.start + 2:
                truth = self.sketches.pop(layer - 1)
                if known is None:
                    self.report[run.start, run.stop] = sketch.discrepancy(truth, sketch.take(x))
            del known, ct
            self.claim(layer - 1, x)
            del x
            self.release(layer)
        self.release(run.start)

    # -- rules -----------------------------------------------------------------------------------------------------

    def rule(self, run: Run, layer: int) -> Any:
        """The rule that a run names for one of its layers."""
        one, x = self.chain[layer - 1], self.structs[layer - 1]
        find = {
            RunKind.STORE: rules.store_rules,
            RunKind.MOONWALK: rules.vijp_rules,
            RunKind.INVERT: rules.invert_rules,
        }[run.kind]
        name = run.options[0 if run.kind is RunKind.STORE else layer - run.start - 1]
        offered = [r for r in find(one, x) if not isinstance(r, rules.Unavailable)]
        for candidate in offered:
            if candidate.name == name:
                return candidate
        raise ScheduleMismatchError(
            f"the schedule wants {run.kind.name} option {name!r} of layer {layer} ({layer_name(one)}), which has "
            f"{[r.name for r in offered]} for this input: profile and plan again"
        )


@dataclass(frozen=True, slots=True)
class RunDiscrepancy:
    """How far one run's reconstruction was from the truth, relative."""

    start: int
    stop: int
    kind: RunKind
    discrepancy: float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Report:
    """What a step's runs report of themselves.

    `discrepancy`: one float32 for each MOONWALK and INVERT run (inner ones too, in the order of `runs`), the relative distance between
    a 64-number random sketch of what the run rebuilt last and of the truth. NaN if no cotangent reached the run.
    """

    discrepancy: Float[Array, " runs"]
    runs: tuple[tuple[int, int, RunKind], ...] = field(metadata={"static": True})

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


def reporting_runs(schedule: Schedule) -> tuple[Run, ...]:
    """The runs that rebuild something, and so can be compared with the truth."""
    return tuple(run for run in walk(schedule.runs) if run.kind in (RunKind.MOONWALK, RunKind.INVERT))


@jax.custom_jvp
def _once(tree: PyTree) -> PyTree:
    return tree


@_once.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    raise SecondDerivativeError(
        "a planned step was differentiated twice: its backward pass is a schedule of its own and has no derivative. "
        "Take second derivatives of the plain chain, `chain(x)`, instead of `mw.apply(schedule, chain, x)`"
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Saved:
    """What crosses from the forward to the backward function of `custom_vjp`."""

    chain: Chain
    x: dict[int, PyTree]
    kept: list[list[Residuals]]
    sketches: dict[int, Array]
    claims: tuple[tuple[int, int], ...] = field(metadata={"static": True})


def _planned(schedule: Schedule, *, check: bool) -> Callable[[Chain, PyTree, Array], PyTree]:
    """`(chain, x, probe) -> chain(x)`, differentiated by `schedule`; the probe's cotangent is the report.

    A cotangent is the only way out of a custom backward function, so the report leaves as that of an input that is not used.
    """

    @jax.custom_vjp
    def call(chain: Chain, x: PyTree, probe: Array) -> PyTree:
        return chain(x)

    def forward(chain: Chain, x: PyTree, probe: Array) -> tuple[PyTree, _Saved]:
        interpreter = Interpreter(chain, boundaries(chain, x), check=check)
        interpreter.claim(0, x)
        interpreter.claim(0)  # the input is an argument: it is there to the end
        kept = interpreter.forward(schedule.runs, 0)
        y = interpreter.x[len(chain)]
        interpreter.release(len(chain))
        claims = tuple(sorted(interpreter.claims.items()))
        return y, _Saved(chain, interpreter.x, kept, interpreter.sketches, claims)

    def backward(saved: _Saved, ct: PyTree) -> tuple[Chain, PyTree, Array]:
        saved, ct = _once((saved, ct))
        interpreter = Interpreter(saved.chain, boundaries(saved.chain, saved.x[0]), check=check)
        interpreter.x, interpreter.claims = dict(saved.x), dict(saved.claims)
        interpreter.sketches = dict(saved.sketches)
        grads: list[Any] = [None] * len(saved.chain)
        box = [ct]
        interpreter.backward(schedule.runs, [list(held) for held in saved.kept], box, grads, 0)
        runs = reporting_runs(schedule) if check else ()
        report = [interpreter.report.get((run.start, run.stop), jnp.nan) for run in runs]
        chain_ct = Chain.tree_unflatten(None, [_cotangent(one, g) for one, g in zip(saved.chain, grads)])
        x_ct = jax.tree.map(_instantiate, saved.x[0], box[0])
        return chain_ct, x_ct, jnp.asarray(report, jnp.float32)

    call.defvjp(forward, backward)
    return call


def _cotangent(layer: PyTree, grads: list[Any]) -> PyTree:
    """A cotangent for every leaf of `layer`: `grads` for its parameters, float0 zeros for the rest."""
    values = iter(grads)
    return jax.tree.map(
        lambda leaf: next(values) if trees.is_inexact(leaf) else np.zeros(jnp.shape(leaf), jax.dtypes.float0),
        layer,
    )


def _instantiate(leaf: Any, ct: Any) -> Any:
    return ct if trees.is_inexact(leaf) else np.zeros(jnp.shape(leaf), jax.dtypes.float0)


def check_match(schedule: Schedule, chain: Chain) -> None:
    """Raises `ScheduleMismatchError` unless `schedule` was made for a chain like this one."""
    if not isinstance(schedule, Schedule):
        raise ArgumentError(
            f"`schedule` is a {type(schedule).__name__}: make one with `mw.plan(profile, budget=...)`"
        )
    check_chain(chain)
    if len(schedule) != len(chain):
        raise ScheduleMismatchError(
            f"the schedule covers {len(schedule)} layers and the chain has {len(chain)}: "
            "profile this chain and plan again"
        )
    got = fingerprint(chain)
    if schedule.fingerprint and schedule.fingerprint != got:
        raise ScheduleMismatchError(
            f"the schedule was made for another chain (fingerprint {schedule.fingerprint}, this one has {got}): "
            "same length, but other layers or parameter shapes. Profile this chain and plan again"
        )


def apply(schedule: Schedule, chain: Chain, x: PyTree) -> PyTree:
    """`chain(x)`, to be differentiated by `schedule`.

    An ordinary JAX function of `chain` and `x`: `jax.grad`, `jit`, `vmap` and `optax` work on it as on the plain chain. Jit
    it with `mw.jit`, or pass `compiler_options=mw.compiler_options()` to `jax.jit`: without them XLA:CPU undoes the plan.

    **Arguments:** `schedule` from `mw.plan`; `chain`, with the layers and parameter shapes that the schedule was made for;
    `x`, a pytree of arrays.
    **Returns:** the chain's output. Its gradient's error is that of the schedule; measure it with `mw.value_and_grad`.
    **Raises:** `ScheduleMismatchError`; `SecondDerivativeError` when differentiated twice.
    """
    check_match(schedule, chain)
    warn_if_undone(x, chain)
    return _planned(schedule, check=False)(chain, x, jnp.zeros(0, jnp.float32))


def value_and_grad(
    loss: Callable[..., Any], schedule: Schedule, *, has_aux: bool = False, wrt_input: bool = False
) -> Callable[..., tuple[tuple[Any, Report], Any]]:
    """A function that returns `(loss, report), grads`, like `jax.value_and_grad` with the runs' error report.

    **Arguments:** `loss(y, *args)`, a scalar (with `has_aux`, a pair of it and anything); `schedule`; `wrt_input`: also the
    gradient with respect to the input.
    **Returns:** `f(chain, x, *args) -> ((value, report), grads)`, where `value` is what `loss` returned, `grads` is a chain (with None
    for leaves that are not parameters), or a pair `(chain, x)` of gradients. `report` is a `Report`.
    **Raises:** `ArgumentError` for a loss that is not scalar; as `apply`.
    """
    if not callable(loss):
        raise ArgumentError(
            f"`loss` is {loss!r}, which is not callable: give a function `loss(y, *args)` that returns a scalar"
        )
    runs = reporting_runs(schedule)

    def step(chain: Chain, x: PyTree, *args: Any) -> tuple[tuple[Any, Report], Any]:
        check_match(schedule, chain)
        warn_if_undone(x, chain)
        call = _planned(schedule, check=True)

        def total(params: list[Any], x_params: list[Any], probe: Array) -> tuple[Any, Any]:
            y = call(trees.with_parameters(chain, params), trees.with_parameters(x, x_params), probe)
            value = loss(y, *args)
            scalar = _checked_scalar(value[0] if has_aux else value)
            return scalar, value

        wrt = (0, 1, 2) if wrt_input else (0, 2)
        probe = jnp.zeros(len(runs), jnp.float32)
        (_, value), got = jax.value_and_grad(total, argnums=wrt, has_aux=True)(
            trees.parameters(chain), trees.parameters(x), probe
        )
        report = Report(got[-1], tuple((run.start, run.stop, run.kind) for run in runs))
        grads = _only_parameters(chain, got[0])
        return (value, report), ((grads, _only_parameters(x, got[1])) if wrt_input else grads)

    return step


def _only_parameters(tree: PyTree, grads: list[Any]) -> PyTree:
    values = iter(grads)
    return jax.tree.map(lambda leaf: next(values) if trees.is_inexact(leaf) else None, tree)


def _checked_scalar(value: Any) -> Any:
    if not hasattr(value, "shape") or value.shape != () or not trees.is_inexact(value):
        what = f"{value.dtype}{list(value.shape)}" if hasattr(value, "shape") else type(value).__name__
        raise ArgumentError(
            f"`loss` returned {what}, and a gradient needs one floating-point number: take the mean or the sum "
            "(if it returns more than the loss, pass `has_aux=True`)"
        )
    return value
