"""Methods compiled to fit their budgets, the plans chosen by a trial, and what is recorded of them."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import time
from typing import Any

import jax

import mwplan as mw
from experiments.alternatives.methods import METHODS, Method
from experiments.alternatives.problem import (
    NotApplicableError,
    Problem,
    Way,
)
from experiments.alternatives.scheduled import applied, plan
from experiments.alternatives.timing import CLOSE, TIE, Compiled, interleave, ties
from experiments.alternatives.truth import float64_gradients, innermost
from mwplan import planning
from mwplan.app.side_by_side import relative_error
from mwplan.common.errors import InfeasibleError
from mwplan.compilers.compiling import temporaries
from mwplan.fitting import tuning
from mwplan.plans.schedule import Schedule, Strategy

#: Seconds after which each part of the trial that chooses among plans ends, and rounds of its first part,
#: that of all plans.
TRIAL, FIRST = 90.0, 3


def settings() -> dict[str, dict[str, Any]]:
    """Compiler options under which every way without a schedule of ours is compiled; the leanest result
    counts."""
    own = mw.compiler_options()
    if jax.default_backend() != "cpu":
        return {"default": own}
    return {"default": own, "sequential": own | {"xla_cpu_enable_concurrency_optimized_scheduler": False}}


class Bench:
    """Ways to take one gradient, compiled; equal programs are compiled, run and checked once."""

    def __init__(
        self, problem: Problem, *, try_settings: bool = True, attempts: int = 4, tune: int = 12
    ) -> None:
        self.problem = problem
        self.settings = settings() if try_settings else {"default": mw.compiler_options()}
        self.attempts = attempts
        self.tune = tune
        self.programs: dict[Any, Compiled] = {}
        self.rows: list[tuple[dict[str, Any], Compiled | None]] = []
        self.plans: dict[int, list[Compiled]] = {}
        self.idle: int | None = None

    def compile(self, way: Way) -> Compiled:
        """The way's program, under the leanest setting; schedules of ours have one setting."""
        if way.key not in self.programs:
            ours = way.schedule is not None and way.key[0] == way.schedule.runs
            made = [
                self._compiled(way, name, options)
                for name, options in self.settings.items()
                if name == "default" or not ours
            ]
            self.programs[way.key] = min(made, key=lambda one: one.temporary_bytes)
        return self.programs[way.key]

    def _compiled(self, way: Way, setting: str, options: dict[str, Any]) -> Compiled:
        args = (way.chain, self.problem.x, self.problem.labels)
        start = time.perf_counter()
        executable = mw.jit(way.step(self.problem.loss), compiler_options=options).lower(*args).compile()
        seconds = time.perf_counter() - start
        return Compiled(way, executable, args, temporaries(executable), seconds, setting)

    def add(self, name: str, budget: int | None) -> Compiled | None:
        """Compiles a method so that the step fits the budget, planning again with less while it does not;
        notes a row for it.

        None where it does not apply or nothing fits: the row says why.
        """
        row: dict[str, Any] = {"method": name, "budget_bytes": budget}
        made = self._fitted(row, METHODS[name], budget)
        self.rows.append((row, made))
        if name == "plan" and budget is not None:
            self.plans[len(self.rows) - 1] = self._plans(made, budget)
        return made

    def _plans(self, made: Compiled | None, budget: int) -> list[Compiled]:
        """The programs that `mw.fit(tune=...)` would choose among at a budget, that of all strategies first,
        of the chain as it is and, where its blocks repeat, stacked: but those for less of the budget, which
        are the plans of other rows."""
        problem = self.problem

        def fits(one: Compiled) -> bool:
            return one.temporary_bytes + problem.fixed_bytes <= budget

        fewer = [functools.partial(plan, allowed=some) for some in planning.NARROWER]
        found = [made, *(self._fitted({}, method, budget) for method in fewer)]
        kept = [one for one in found if one is not None]
        schedules = [one.way.schedule for one in kept if one.way.schedule is not None]
        ways = [applied(problem, one) for one in problem.by_hand]
        ways += [
            applied(problem, one, way)
            for way in (mw.UNTIED, mw.LOOSE)
            for one in (*schedules, *problem.by_hand)
        ]
        if problem.most_loops == math.inf and any(
            isinstance(part, mw.Stack) for part in problem.stacked.parts
        ):
            for one, way in itertools.product((*schedules, *problem.by_hand), (0, mw.LOOSE)):
                with contextlib.suppress(NotApplicableError):
                    ways.append(applied(problem, one, way, stacked=True))
        for some in ways:
            made = self.compile(some)
            kept.append(made)
            if not fits(made) and not any(some.schedule is schedule for schedule in problem.by_hand):
                del self.programs[some.key]  # a process can hold some hundred programs
        return [one for one in dict.fromkeys(kept) if fits(one)]

    def tune_plans(self) -> None:
        """Takes for each `plan` the fastest, in a trial of its own whose samples are not kept, of what was
        planned for its budget or less: by all strategies, without vijps, without inverses, by recomputation
        alone, by hand, tied, untied, loose and stacked. As `mw.fit(tune=...)` of the chain and of `mw.stack`
        of it."""
        every = list(dict.fromkeys(one for several in self.plans.values() for one in several))
        interleave(every, FIRST, TRIAL)
        within = {
            at: [one for k, more in self.plans.items() if self._budget(k) <= self._budget(at) for one in more]
            for at in self.plans
        }
        for limit in (TIE, CLOSE):
            interleave(ties(within.values(), limit), self.tune, TRIAL, again=True)
        for at, choice in within.items():
            if choice:
                tied = ties([choice])
                self.rows[at] = self.rows[at][0], tied[tuning.quickest([one.seconds for one in tied])]
                self.rows[at][0]["timed_plans"] = len(set(choice))
                self.rows[at][0].pop("reason", None)
        for one in every:
            one.seconds = []

    def _budget(self, at: int) -> Any:
        """What row `at` was asked for."""
        return self.rows[at][0]["budget_bytes"]

    def settle(self, rounds: int, seconds: float) -> None:
        """More rounds for the plans, and for what ties at a budget with the fastest that fits it."""
        fixed, at_all = self.problem.fixed_bytes, self.run_at_all()
        asked = {self._budget(k) for k in self.plans}
        fits = ([one for one in at_all if one.temporary_bytes + fixed <= budget] for budget in sorted(asked))
        plans = [self.rows[k][1] for k in self.plans]
        tied = list(
            dict.fromkeys([*ties(fits), *(one for one in plans if one is not None and one in at_all)])
        )
        if len(tied) > 1:
            interleave(tied, rounds, seconds, again=True)

    def _fitted(self, row: dict[str, Any], method: Method, budget: int | None) -> Compiled | None:
        """The method's program that fits, or None; the row is told how it went."""
        asked = budget
        made: Compiled | None = None
        try:
            for attempt in range(1, self.attempts + 1):
                row["attempts"] = attempt
                made = self.compile(method(self.problem, asked))
                if asked is None or budget is None:
                    break
                excess = made.temporary_bytes + self.problem.fixed_bytes - budget
                if excess <= 0:
                    break
                made, asked = None, asked - excess
                if asked <= 0:
                    break
            if made is None:
                row["reason"] = f"above the budget when compiled, {row['attempts']} times"
        except NotApplicableError as error:
            row["reason"] = str(error)
        except InfeasibleError as error:
            row |= {"reason": str(error), "least_bytes": error.least_bytes}
        return made

    def check(self) -> None:
        """Gradient errors of the programs in use against float64 backpropagation."""
        truth = float64_gradients(self.problem)
        for one in self.run_at_all():
            found, one.found = one.found or one.run(), None
            one.error, one.worst_error = relative_error(innermost(found[1]), truth)

    def run_at_all(self) -> list[Compiled]:
        """Those of `used` that need no more than `idle` bytes."""
        most = math.inf if self.idle is None else self.idle - self.problem.fixed_bytes
        return [one for one in self.used() if one.temporary_bytes <= most]

    def used(self) -> list[Compiled]:
        """The programs that rows stand on, each once."""
        return list(dict.fromkeys(one for _, one in self.rows if one is not None))

    def records(self) -> list[dict[str, Any]]:
        """One record a row, plain values: bytes, seconds, errors, and what the solver said."""
        fixed = self.problem.fixed_bytes
        programs = self.used()
        made = []
        for row, one in self.rows:
            out = {"fixed_bytes": fixed, "layers": len(self.problem.chain), **row}
            if one is not None:
                out |= {
                    "program": programs.index(one),
                    "temporary_bytes": one.temporary_bytes,
                    "total_bytes": fixed + one.temporary_bytes,
                    "compile_seconds": one.compile_seconds,
                    "setting": one.setting,
                    "seconds": one.seconds,
                    "error": one.error,
                    "worst_error": one.worst_error,
                }
                if one.way.schedule is not None:
                    out |= predictions(one.way.schedule)
                    for name, way in (("untied", mw.UNTIED), ("loose", mw.LOOSE)):
                        out[name] = one.way.key[:2] == (one.way.schedule.runs, way)
                    out["stacked"] = one.way.chain is self.problem.stacked
            made.append(out)
        return made


def predictions(schedule: Schedule) -> dict[str, Any]:
    """What a schedule predicts and what was proved of it."""
    return {
        "predicted_temporary_bytes": schedule.peak_bytes,
        "predicted_seconds": schedule.time_ns / 1e9,
        "predicted_error": schedule.error,
        "max_error": schedule.max_error,
        "solver": schedule.solver,
        "status": schedule.status.value,
        "gap": schedule.gap if schedule.bound_ns else None,
        "strategies": {s.value: schedule.strategies.count(s) for s in Strategy},
        "runs": len(schedule.runs),
    }
