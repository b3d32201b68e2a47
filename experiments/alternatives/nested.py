"""Plans of recomputation as nested `jax.checkpoint`s: the optimal one, and rotor's."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from experiments.alternatives.problem import (
    RECOMPUTATION,
    Candidate,
    Network,
    NotApplicableError,
    Problem,
    cached_frontier,
    through,
)
from experiments.alternatives.scheduled import fastest_within
from mwplan import planning
from mwplan.common.errors import InfeasibleError
from mwplan.plans.profiles import Profile
from mwplan.plans.schedule import Run, RunKind
from mwplan.solvers import problem as solvers
from mwplan.solvers import rotor

#: STORE options that `jax.checkpoint` can express, and their policies.
POLICIES: dict[str, Callable[..., Any] | None] = {
    "vjp": None,
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "input": jax.checkpoint_policies.nothing_saveable,
}


def nested_checkpoint(runs: Sequence[Run]) -> Network:
    """A schedule of STORE and RECOMPUTE runs as nested `jax.checkpoint`s."""

    def run_all(runs: Sequence[Run], layers: Sequence[Any], at: int, x: Any) -> Any:
        for run in runs:
            own = layers[run.start - at : run.stop - at]
            if run.kind is RunKind.RECOMPUTE:
                x = jax.checkpoint(functools.partial(run_all, run.inner, at=run.start))(own, x=x)
            else:
                policy = POLICIES[run.options[0]]
                x = jax.checkpoint(through, policy=policy)(own, x) if policy else through(own, x)
        return x

    return lambda chain, x: run_all(runs, chain.layers, 0, x)


def _expressible(profile: Profile) -> Profile:
    """The profile with the STORE options that `jax.checkpoint` can express.

    A profile leaves out "vjp" where another option keeps the same and needs less beside it: that one's costs
    stand for it then.
    """
    layers = []
    for layer in profile.layers:
        store = tuple(option for option in layer.store if option.name in POLICIES)
        if not store:
            same = max(layer.store, key=lambda option: option.residual_bytes)
            store = (dataclasses.replace(same, name="vjp"),)
        layers.append(dataclasses.replace(layer, store=store, moonwalk=(), invert=()))
    return dataclasses.replace(profile, layers=tuple(layers))


def recompute_checkpoint(problem: Problem, budget: int | None) -> Candidate:
    """The fastest plan of what `jax.checkpoint` can express, as nested `jax.checkpoint`s."""
    profile = _expressible(problem.profile)
    schedule = fastest_within(
        cached_frontier(profile, problem.max_error, RECOMPUTATION, problem.thin), budget
    )
    return Candidate(nested_checkpoint(schedule.runs), problem.chain, schedule, ("nested", schedule.runs))


def rotor_checkpoint(problem: Problem, budget: int | None) -> Candidate:
    """rotor's plan as nested `jax.checkpoint`s."""
    if budget is None:
        raise NotApplicableError("rotor plans for one budget: give one")
    profile = _expressible(problem.profile)
    room = budget - profile.fixed_bytes
    solution = rotor.rotor(solvers.Problem(profile=profile, budget_bytes=room)) if room > 0 else None
    if solution is None or solution.runs is None:
        raise InfeasibleError("rotor finds nothing that fits", budget_bytes=budget)
    schedule = planning.scheduled(profile, solution, problem.max_error)
    return Candidate(nested_checkpoint(schedule.runs), problem.chain, schedule, ("nested", schedule.runs))
