"""A plan in `jax.checkpoint`'s words, for those who cannot run the planned step itself."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from mwplan.compilers.compiling import jit, temporaries
from mwplan.functions.cut import Cut
from mwplan.network import kept, rules
from mwplan.plans.schedule import Run, RunKind, Schedule

PyTree = Any


@dataclass(frozen=True, kw_only=True, repr=False)
class Policy:
    """The function, its pieces within the `jax.checkpoint`s that a plan amounts to: `fitted.policy()`.

    Called as the function itself, it returns the same; `jax.value_and_grad` of it keeps what the plan keeps,
    as far as `jax.checkpoint` can say that: stretches that are recomputed, nested ones too, and pieces of
    which only products are kept; pieces of which other values are kept are a `jax.custom_vjp`. What neither
    can say (`unsaid`, the runs): cotangents or activations that are
    rebuilt, and what is kept in the host's memory; the first are recomputed instead, the last kept on the
    device. Nor are there the planned step's barriers, so the compiler may reorder and keep more:
    `temporary_bytes` compiles it and says how much.

    **Attributes:** `cut`, the pieces; `schedule`, the plan; `has_aux`, as of the function.
    """

    cut: Cut
    schedule: Schedule
    has_aux: bool

    @property
    def unsaid(self) -> tuple[Run, ...]:
        """The runs that `jax.checkpoint` has no words for."""
        return tuple(
            run for run in _all(self.schedule.runs) if run.kind not in (RunKind.STORE, RunKind.RECOMPUTE)
        )

    def __call__(self, params: PyTree, *args: Any) -> Any:
        """What the function returns."""
        signature = self.cut.flow.traced.signature
        chain, x, _ = self.cut.build(params, *args)
        for run in self.schedule.runs:
            x = _through(run, chain.layers, x)
        arrays = signature.arrays(params, args)
        value, aux = self.cut.value(x, arrays, self.cut.flow.traced.captured)
        return (value, aux) if self.has_aux else value

    def temporary_bytes(self, params: PyTree, *args: Any) -> int:
        """What the compiled gradient of this needs beside arguments and results: to be compared with the
        planned step's. Cost: a compilation."""
        gradient = jax.value_and_grad(self, has_aux=self.has_aux, allow_int=True)
        return temporaries(jit(gradient).lower(params, *args).compile())

    def __repr__(self) -> str:
        return f"Policy({len(self.schedule)} pieces)"

    def __str__(self) -> str:
        names = self.cut.plan.labels()
        lines = []
        for run, level in _levels(self.schedule.runs, 0):
            alone = run.stop - run.start == 1
            first, last = names[run.start], names[run.stop - 1]
            number = f"{run.stop}" if alone else f"{run.start + 1}-{run.stop}"
            lines.append(
                f"{'  ' * level}{number}: {_words(run)}  ({first if alone else f'{first} .. {last}'})"
            )
        return "\n".join(lines)


def _words(run: Run) -> str:
    """What is done with a run's pieces."""
    if run.kind is RunKind.RECOMPUTE:
        return "jax.checkpoint: their input is saved, they are recomputed"
    if run.kind is RunKind.STORE:
        names = {"vjp": "as it is", "products": "jax.checkpoint, products saved", "nothing": "jax.checkpoint"}
        if run.options[0].startswith(kept.PREFIX):
            count = len(kept.KeepStore(run.options[0]).kept)
            return f"jax.custom_vjp, {count} values of its program saved"
        return names.get(run.options[0], run.options[0])
    if run.kind is RunKind.OFFLOAD:
        return "as it is (planned: kept in the host's memory, which is not said here)"
    return f"jax.checkpoint (planned: {run.kind.value}, which it has no words for)"


def _levels(runs: Sequence[Run], level: int) -> list[tuple[Run, int]]:
    """All runs with how deep they are nested."""
    return [pair for run in runs for pair in ((run, level), *_levels(run.inner, level + 1))]


def _all(runs: Sequence[Run]) -> list[Run]:
    return [run for run, _ in _levels(runs, 0)]


def _through(run: Run, layers: Sequence[Any], x: PyTree) -> PyTree:
    """The activation after a run of the chain's layers."""
    own = tuple(layers[run.start : run.stop])
    if run.kind is RunKind.RECOMPUTE:

        def whole(own: tuple[Any, ...], x: PyTree) -> PyTree:
            around = (*layers[: run.start], *own)
            for inner in run.inner:
                x = _through(inner, around, x)
            return x

        return jax.checkpoint(whole)(own, x)
    if run.kind in (RunKind.STORE, RunKind.OFFLOAD):
        (one,) = own
        if run.options[0].startswith(kept.PREFIX):
            return kept.applied(one, x, run.options[0])
        policies = {rule.name: rule.policy for rule in rules.SMALLER}
        apply = (
            jax.checkpoint(_apply, policy=policies[run.options[0]]) if run.options[0] in policies else _apply
        )
        return apply(one, x)
    return jax.checkpoint(lambda own, x: functools.reduce(lambda x, one: one(x), own, x))(own, x)


def _apply(layer: Any, x: PyTree) -> PyTree:
    return layer(x)
