"""Published models, unmodified, fitted to budgets: `python -m experiments.functions`.

Of each model of `experiments.published`, in float64: the compiled temporaries of plain `jax.value_and_grad`,
of the least of two `jax.checkpoint`s of the whole loss (all recomputed; products saved) and of one around
every block (piece of the cut), and of `mw.fit_function` at three budgets on the way from the least that a
plan is predicted to need to backpropagation; beside them what was predicted, and the largest difference of a
gradient from JAX's, relative to the largest entry of its array. Where nothing fits, the least that does is
named and taken. The plan that fits what checkpoints around every block take is timed in turn with them.

With `--target h200`: a RevNet and a Lipschitz CNN written in `jax.lax` calls against the same written with
`mwplan.layers`, at real sizes: modelled times of plans at equal budgets (`experiments.function_layers`).

Models are computed by processes of their own; finished ones are kept. Writes results/functions/.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import rich.box
from rich.table import Table

import mwplan as mw
from experiments import published, record, sweep
from mwplan import planning
from mwplan.common import trees
from mwplan.common.sizes import show_bytes
from mwplan.compilers.compiling import temporaries
from mwplan.functions.fit_function import profile_pieces
from mwplan.functions.policy import Policy
from mwplan.plans.profiles import Profile
from mwplan.solvers import baselines
from mwplan.solvers.problem import Problem

PyTree = Any
#: Of `jax.checkpoint`: everything is recomputed; products are saved.
POLICIES = (None, jax.checkpoint_policies.dots_saveable)
#: As of `mw.fit_function`; steps of each program that are timed, the first a warm-up.
MAX_ERROR, ROUNDS = 1e-4, 16


@dataclass(frozen=True, kw_only=True)
class Config:
    """`models`, of `experiments.published`; `shares` of the way from the least budget to backpropagation;
    `target`, a device to compare functions with layers for, or none; `networks`, which."""

    models: tuple[str, ...] = tuple(published.MODELS)
    shares: tuple[float, ...] = (0.6, 0.4, 0.05)
    target: str = ""
    networks: tuple[str, ...] = ("lipschitz", "revnet")
    executor: str = "processes"
    workers: int = 1
    out: Path = record.RESULTS / "functions"


def measure(point: sweep.Point) -> dict[str, Any]:
    """One model: a point's `model` and `shares`."""
    jax.config.update("jax_enable_x64", True)
    make, _ = published.MODELS[point["model"]]
    case = make()
    inexact, back = _inexact(case)
    backpropagation, want = _backpropagation(case, inexact, back)
    found = mw.cut(case.loss, case.params, *case.args, has_aux=case.has_aux)
    found = found.checked(case.params, *case.args)
    profile = profile_pieces(found, case.params, *case.args, progress=False)
    least = mw.frontier(profile).points[0][0] - profile.fixed_bytes
    whole = [_compiled(case, inexact, back, _checkpoint(case.loss, policy)) for policy in POLICIES]
    return {
        "glue": published.glue(point["model"]),
        "operations": len(found.flow.steps),
        "pieces": len(found),
        "backpropagation": backpropagation,
        "checkpoint": min(map(temporaries, whole)),
        "blocks": _every_block(case, found, profile, inexact, back),
        "least": least,
        "fits": [
            _fit(case, profile, int(least + share * max(backpropagation - least, 0)), want)
            for share in point["shares"]
        ],
    }


def _inexact(case: published.Case) -> tuple[list[Any], Any]:
    """The parameters that have a gradient, and the loss of these."""
    leaves, treedef = jax.tree.flatten(case.params)
    where = [i for i, leaf in enumerate(leaves) if trees.is_inexact(leaf)]

    def back(inexact: list[Any]) -> PyTree:
        mine = dict(zip(where, inexact, strict=True))
        return jax.tree.unflatten(treedef, [mine.get(i, leaf) for i, leaf in enumerate(leaves)])

    return [leaves[i] for i in where], back


def _compiled(case: published.Case, inexact: list[Any], back: Any, loss: Any, jit: Any = mw.jit) -> Any:
    """The gradient step, by default with the option that `jax.checkpoint` needs on CPUs."""
    step = jax.value_and_grad(lambda p, *args: loss(back(p), *args), has_aux=case.has_aux)
    return jit(step).lower(inexact, *case.args).compile()


def _checkpoint(loss: Any, policy: Any) -> Any:
    """The loss in a checkpoint; what is no array among its parameters is part of it."""

    def checkpointed(params: PyTree, *args: Any) -> Any:
        leaves, treedef = jax.tree.flatten(params)
        where = [i for i, leaf in enumerate(leaves) if trees.is_array(leaf)]

        def of(arrays: list[Any], *args: Any) -> Any:
            mine = dict(zip(where, arrays, strict=True))
            return loss(
                jax.tree.unflatten(treedef, [mine.get(i, leaf) for i, leaf in enumerate(leaves)]), *args
            )

        return jax.checkpoint(of, policy=policy)([leaves[i] for i in where], *args)

    return checkpointed


def _backpropagation(case: published.Case, inexact: list[Any], back: Any) -> tuple[int, list[Any]]:
    """The compiled temporaries, and the gradients."""
    compiled = _compiled(case, inexact, back, case.loss, jax.jit)
    _, grads = compiled(inexact, *case.args)
    return temporaries(compiled), grads


def _every_block(
    case: published.Case, found: mw.Cut, profile: Profile, inexact: list[Any], back: Any
) -> dict[str, Any]:
    """`jax.checkpoint` around every piece: its compiled temporaries, and how long the plan fitted to these
    takes, relative to it, timed in turn."""
    each = baselines.recompute_each(Problem(profile=profile, max_error=MAX_ERROR))
    schedule = planning.scheduled(profile, each, MAX_ERROR)
    policy = Policy(cut=found, schedule=schedule, has_aux=case.has_aux)
    compiled = _compiled(case, inexact, back, policy)
    try:
        step = _fitted(case, profile, temporaries(compiled))
    except mw.InfeasibleError as error:
        return {"temporaries": temporaries(compiled), "infeasible": error.least_bytes}
    seconds: list[list[float]] = [[], []]
    for _ in range(ROUNDS):
        for samples, run, args in (
            (seconds[0], compiled, (inexact, *case.args)),
            (seconds[1], step.step, (case.params, *case.args)),
        ):
            start = time.perf_counter()
            jax.block_until_ready(run(*args))
            samples.append(time.perf_counter() - start)
    return {
        "temporaries": temporaries(compiled),
        "plan": step.temporary_bytes,
        "seconds": seconds,
        "ratio": statistics.median(b / a for a, b in list(zip(*seconds))[1:]),
    }


def _fitted(case: published.Case, profile: Profile, budget: int) -> mw.FittedFunction:
    """The step fitted to `budget` bytes of temporaries."""
    found = mw.fit_function(
        case.loss, case.params, *case.args,
        has_aux=case.has_aux, profile=profile, budget=profile.fixed_bytes + budget,
    )  # fmt: skip
    assert isinstance(found, mw.FittedFunction)
    return found


def _fit(case: published.Case, profile: Profile, budget: int, want: list[Any]) -> dict[str, Any]:
    """What the step fitted to `budget` bytes of temporaries takes, and what it computes."""
    asked = budget
    try:
        step = _fitted(case, profile, budget)
    except mw.InfeasibleError as error:
        budget = (error.least_bytes or 0) - profile.fixed_bytes
        step = _fitted(case, profile, budget)
    (_, report), grads = step.step(case.params, *case.args)
    same_tree: bool = jax.tree.structure(grads) == jax.tree.structure(  # type: ignore[operator]
        jax.tree.map(lambda leaf: leaf if trees.is_inexact(leaf) else None, case.params)
    )
    differences = [
        float(jnp.abs(a - b).max() / jnp.maximum(jnp.abs(b).max(), jnp.finfo(b.dtype).tiny))
        for a, b in zip(jax.tree.leaves(grads), want, strict=True)
        if b.size
    ]
    return {
        "asked": asked,
        "budget": budget,
        "compiled": step.temporary_bytes,
        "predicted": step.attempts[-1].predicted_bytes,
        "programs": len(step.attempts),
        "difference": max(differences),
        "discrepancy": float(report.worst),
        "same_tree": same_tree,
    }


def main(config: Config) -> None:
    """Measures what is not there yet, prints and saves."""
    console = record.console()
    if config.target:
        from experiments import function_layers

        function_layers.main(config.target, config.out, config.networks)
        return
    models = []
    for model in config.models:
        if lacking := published.missing(model):
            console.print(f"{model}: left out, not installed: {', '.join(lacking)}")
        else:
            models.append(model)
    rows = sweep.run(
        [{"model": model, "shares": [*config.shares]} for model in models],
        measure,
        config.out / "records.jsonl",
        executor=config.executor,
        workers=config.workers,
        title="models",
    )
    console.print(table(rows, config.shares))
    record.save(config.out / "functions.json", {"config": sweep.plain(config), "rows": rows})
    console.print(f"wrote {config.out}")


def table(rows: list[dict[str, Any]], shares: tuple[float, ...]) -> Table:
    """A line a model. Beside each plan's temporaries what was predicted; `*` where the budget had to be
    raised."""
    made = Table(title="temporaries of the compiled step", title_justify="left", box=rich.box.SIMPLE)
    made.add_column("model")
    for column in ("glue", "gradient", "backpropagation", "checkpoint", "every block", "plan's time"):
        made.add_column(column, justify="right")
    for share in shares:
        made.add_column(f"plan at {share:g}", justify="right")
        made.add_column("predicted", justify="right")
    for row in rows:
        fits = row["fits"]
        cells = [str(row["glue"]), f"{max(one['difference'] for one in fits):.0e}"]
        cells += [show_bytes(row[name]) for name in ("backpropagation", "checkpoint")]
        cells.append(show_bytes(row["blocks"]["temporaries"]))
        cells.append(f"{row['blocks']['ratio']:.2f}" if "ratio" in row["blocks"] else "none fits")
        for one in fits:
            raised = "*" if one["budget"] > one["asked"] else ""
            cells += [show_bytes(one["compiled"]) + raised, show_bytes(one["predicted"])]
        made.add_row(row["point"]["model"], *cells)
    errors = [abs(math.log(one["compiled"] / one["predicted"])) for row in rows for one in row["fits"]]
    if errors:
        made.caption = f"predicted within a factor of {math.exp(sum(errors) / len(errors)):.2f} in the mean"
    return made


if __name__ == "__main__":
    main(sweep.parse(Config, __doc__))
