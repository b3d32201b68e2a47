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
    Candidate,
    NotApplicableError,
    Problem,
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
    """Compiler options under which every candidate without a schedule of ours is compiled; the program of
    least memory counts."""
    own = mw.compiler_options()
    if jax.default_backend() != "cpu":
        return {"default": own}
    return {"default": own, "sequential": own | {"xla_cpu_enable_concurrency_optimized_scheduler": False}}


class Bench:
    """Candidates for one gradient, compiled; equal programs are compiled, run and checked once."""

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

    def compile(self, candidate: Candidate) -> Compiled:
        """The candidate's program, under the setting of least memory; schedules of ours have one setting."""
        if candidate.key not in self.programs:
            ours = candidate.schedule is not None and candidate.key[0] == candidate.schedule.runs
            made = [
                self._compiled(candidate, name, options)
                for name, options in self.settings.items()
                if name == "default" or not ours
            ]
            self.programs[candidate.key] = min(made, key=lambda one: one.temporary_bytes)
        return self.programs[candidate.key]

    def _compiled(self, candidate: Candidate, setting: str, options: dict[str, Any]) -> Compiled:
        args = (candidate.chain, self.problem.x, self.problem.labels)
        start = time.perf_counter()
        executable = (
            mw.jit(candidate.step(self.problem.loss), compiler_options=options).lower(*args).compile()
        )
        seconds = time.perf_counter() - start
        return Compiled(candidate, executable, args, temporaries(executable), seconds, setting)

    def add(self, name: str, budget: int | None) -> Compiled | None:
        """Compiles a method so that the step fits the budget, and adds a row for it.

        While the compiled step exceeds the budget, the method plans again with less. Returns None where it
        does not apply or nothing fits: the row has the reason.
        """
        row: dict[str, Any] = {"method": name, "budget_bytes": budget}
        made = self._fitted(row, METHODS[name], budget)
        self.rows.append((row, made))
        if name == "plan" and budget is not None:
            self.plans[len(self.rows) - 1] = self._plans(made, budget)
        return made

    def _plans(self, made: Compiled | None, budget: int) -> list[Compiled]:
        """The programs that `mw.fit(tune=...)` would choose among at a budget, that of all strategies first.

        They are of the chain as it is and, where its blocks repeat, of the stacked one. Plans for less of the
        budget are missing: they are the plans of other rows.
        """
        problem = self.problem

        def fits(one: Compiled) -> bool:
            return one.temporary_bytes + problem.fixed_bytes <= budget

        fewer = [functools.partial(plan, allowed=some) for some in planning.NARROWER]
        found = [made, *(self._fitted({}, method, budget) for method in fewer)]
        kept = [one for one in found if one is not None]
        schedules = [one.candidate.schedule for one in kept if one.candidate.schedule is not None]
        candidates = [applied(problem, one) for one in problem.baselines]
        candidates += [
            applied(problem, one, arrangement)
            for arrangement in (mw.UNTIED, mw.LOOSE)
            for one in (*schedules, *problem.baselines)
        ]
        if problem.most_loops == math.inf and any(
            isinstance(part, mw.Stack) for part in problem.stacked.parts
        ):
            for one, arrangement in itertools.product((*schedules, *problem.baselines), (0, mw.LOOSE)):
                with contextlib.suppress(NotApplicableError):
                    candidates.append(applied(problem, one, arrangement, stacked=True))
        for candidate in candidates:
            made = self.compile(candidate)
            kept.append(made)
            if not fits(made) and not any(candidate.schedule is schedule for schedule in problem.baselines):
                del self.programs[candidate.key]  # a process can hold some hundred programs
        return [one for one in dict.fromkeys(kept) if fits(one)]

    def tune_plans(self) -> None:
        """Takes for each `plan` the fastest of what was planned for its budget or less, as `mw.fit(tune=...)`
        does for the chain and for `mw.stack` of it.

        Candidates are the plans of all strategies, without vijps, without inverses, and of recomputation
        alone, and the baseline schedules; each with and without barriers, unrolled and stacked. They are
        timed in a trial of its own, whose samples are not kept.
        """
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
        """More rounds for the plans, and for the programs that tie at a budget with the fastest that fits."""
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
        """The method's program that fits, or None; attempts and reasons are noted in `row`."""
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
        """The programs of the rows, each once."""
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
                if one.candidate.schedule is not None:
                    out |= predictions(one.candidate.schedule)
                    for name, arrangement in (("untied", mw.UNTIED), ("loose", mw.LOOSE)):
                        out[name] = one.candidate.key[:2] == (one.candidate.schedule.runs, arrangement)
                    out["stacked"] = one.candidate.chain is self.problem.stacked
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
