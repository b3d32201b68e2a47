"""A search among schedules for one whose *compiled* step keeps a budget."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from mwplan import planning
from mwplan.common.errors import InfeasibleError
from mwplan.common.sizes import show_bytes, show_ns
from mwplan.compilers.compiling import jit, temporaries
from mwplan.compilers.step import Step
from mwplan.execution.execute import PLAIN, Arrangement
from mwplan.fitting.fitted import Attempt, Fitted
from mwplan.fitting.plain import Plain
from mwplan.plans.profiles import Profile
from mwplan.plans.schedule import Run, Schedule, Status, Strategy

WORTHWHILE = 0.02  # a share: of time by which another plan must be faster, of memory by which one is off


@dataclass(frozen=True)
class Compiler:
    """Makes a compiled step of `gradient(schedule, arrangement=...)` for `args`; each is made once. `names`,
    of the arguments, as `Step` has them; `plain`, backpropagation."""

    gradient: Callable[..., Callable[..., Any]]
    args: tuple[Any, ...]
    profile: Profile
    names: tuple[str, ...] = ("args",)
    plain: Plain | None = None
    made: dict[tuple[tuple[Run, ...], Arrangement], Fitted] = field(default_factory=dict)

    def __call__(self, schedule: Schedule, arrangement: Arrangement, budget_bytes: int) -> Fitted:
        """The step, whether it fits or not; of attempts it has its own."""
        key = schedule.runs, arrangement
        if key not in self.made:
            self.made[key] = self._made(schedule, arrangement)
        found = self.made[key]
        return dataclasses.replace(found, schedule=dataclasses.replace(schedule, budget_bytes=budget_bytes))

    def _made(self, schedule: Schedule, arrangement: Arrangement) -> Fitted:
        start = time.perf_counter()
        step = jit(self.gradient(schedule, arrangement=arrangement)).lower(*self.args).compile()
        attempt = Attempt(
            arrangement=arrangement,
            predicted_bytes=schedule.peak_bytes,
            measured_bytes=temporaries(step),
            compile_seconds=time.perf_counter() - start,
        )
        return Fitted(
            step=Step(step, self.args, self.names),
            schedule=schedule,
            profile=self.profile,
            temporary_bytes=attempt.measured_bytes,
            attempts=(attempt,),
            plain=self.plain,
        )


def _in_words(schedule: Schedule, arrangement: Arrangement) -> str:
    """A program's plan for people."""
    if arrangement == PLAIN:
        recomputed = Strategy.RECOMPUTE in schedule.strategies
        return "`jax.checkpoint` on every layer" if recomputed else "plain backpropagation"
    used = ", ".join(f"{one.value} {count}" for one, count in schedule.counts.items())
    return f"a plan ({used}), predicted {show_bytes(schedule.peak_bytes)}"


class Search:
    """Compiles schedules for one budget, one after another, and remembers what each needed.

    `room`: the bytes for temporaries.
    """

    def __init__(self, compiler: Compiler, budget_bytes: int, say: Callable[[str], None]):
        self.compiler, self.budget_bytes, self.say = compiler, budget_bytes, say
        self.room = budget_bytes - compiler.profile.fixed_bytes
        self.attempts: list[Attempt] = []
        self._needs: dict[tuple[Run, ...], int] = {}

    def knows(self, schedule: Schedule) -> bool:
        """Whether it has been compiled."""
        return schedule.runs in self._needs

    def smaller(self, schedule: Schedule) -> int:
        """The total bytes for which to plan next: as much less than this one's as its program was above the
        budget."""
        return schedule.total_bytes - max(1, self._needs[schedule.runs] - self.room)

    def first(self, schedules: Iterable[Schedule], most: int) -> Fitted | None:
        """The first program that fits, of at most so many."""
        for schedule in itertools.islice(schedules, most):
            if (found := self.tried(schedule)) is not None:
                return found
        return None

    def tried(self, schedule: Schedule, arrangement: Arrangement = 0) -> Fitted | None:
        """Its program, if that fits; says how much it takes."""
        made = self.compiler(schedule, arrangement, self.budget_bytes)
        needs = made.temporary_bytes
        self.attempts.append(made.attempts[-1])
        if not arrangement:
            self._needs[schedule.runs] = needs
        fits = needs <= self.room
        above = "within" if fits else f"{show_bytes(needs - self.room)} above"
        self.say(
            f"{_in_words(schedule, arrangement)}: compiled, {show_bytes(needs)} of temporaries, {above} the "
            f"{show_bytes(max(0, self.room))} that the budget leaves for them"
        )
        return made if fits else None

    def baselines(self, candidates: Iterable[tuple[Schedule, Arrangement]], budget: int | str) -> Fitted:
        """The first of these that fits: what is compiled whatever the budget, when nothing else fits.

        **Raises:** `InfeasibleError` if none does. It names what the smallest needs, a budget that another
        search would keep: this is among its candidates too. `budget`, as it was asked for.
        """
        needs = []
        for schedule, arrangement in candidates:
            if (found := self.tried(schedule, arrangement)) is not None:
                return found
            needs.append(self.attempts[-1].measured_bytes)
        fixed, plain = self.compiler.profile.fixed_bytes, self.compiler.plain
        least, whole = min(needs) + fixed, None if plain is None else plain.known_bytes()
        beside = "" if whole is None else f". Plain `jax.grad` needs {show_bytes(whole + fixed)}"
        raise InfeasibleError(
            f"`budget={budget!r}` ({self.budget_bytes:_} bytes): of the {len(self.attempts)} programs that "
            "were compiled none fits, nor do plain backpropagation and the recomputation of every layer. The "
            f"smallest needs {least:_} bytes ({show_bytes(least)}): raise the budget to that{beside}",
            budget_bytes=self.budget_bytes,
            least_bytes=least,
        )

    def with_attempts(self, found: Fitted, fastest: Schedule | None) -> Fitted:
        """`found`, with everything that was compiled, itself last, and with what is known of it among all
        schedules for the budget, of which `fastest` is the fastest (None: none was predicted to fit)."""
        plan, (own,) = found.schedule, found.attempts
        if fastest is None:
            plan = dataclasses.replace(plan, bound_ns=0, status=Status.FEASIBLE)
        elif plan.time_ns > fastest.time_ns:
            saved = plan.time_ns - fastest.time_ns
            above = self._needs.get(fastest.runs, 0) - self.room
            gain = (
                f"a schedule faster by {show_ns(saved)} ({saved / plan.time_ns:.1%}) was compiled: "
                f"for fragmentation it needs {show_bytes(above)} more than the budget"
            )
            plan = dataclasses.replace(
                plan,
                bound_ns=fastest.bound_ns,
                status=Status.FEASIBLE,
                next_gain=gain if above > 0 else plan.next_gain,
            )
        others = (one for one in self.attempts if one is not own)
        return dataclasses.replace(found, schedule=plan, attempts=(*others, own))


@dataclass(frozen=True)
class Plans:
    """The schedules of some strategies; `bare`, without the fragmentation that is predicted, which is not
    always there."""

    frontier: planning.Frontier
    bare: planning.Frontier
    regular: float

    @classmethod
    def of(
        cls,
        profile: Profile,
        max_error: float,
        allowed: frozenset[Strategy],
        thin: float | None,
        regular: float,
    ) -> Plans:
        """Those of `allowed`; the rest as in `mw.plan`."""
        thin = planning.default_thin(profile) if thin is None else thin
        frontier = planning.frontier(profile, max_error=max_error, allowed=allowed, thin=thin)
        bare = dataclasses.replace(frontier, profile=dataclasses.replace(profile, workspaces=()))
        return cls(frontier, bare, regular)

    def fastest(self, budget: int | str) -> Schedule:
        """The fastest for the budget, without predicted fragmentation."""
        return self.bare.at(budget, regular=self.regular)

    def smaller(self, budget: int, search: Search) -> Iterator[Schedule]:
        """The fastest for the budget, with predicted fragmentation or not; where some is predicted, the plan
        without; then smaller ones (`Search.smaller`); then those between, the fastest first."""
        frontier, fastest = self.frontier, self.fastest(budget)
        schedule = planning.plan(
            frontier.profile,
            budget,
            max_error=frontier.max_error,
            allowed=frontier.solved.problem.strategies,
            regular=self.regular,
            frontier=frontier,
        )
        if fastest.runs != schedule.runs:
            yield fastest
        while True:
            yield schedule
            target = search.smaller(schedule)
            if frontier.least_bytes is None or target < frontier.least_bytes:
                break
            schedule = frontier.at(target, regular=self.regular)
        for total, _ in reversed(self.bare.points):
            if total <= budget and not search.knows(schedule := self.fastest(total)):
                yield schedule

    def quicker(self, budget: int, search: Search, limit_ns: float) -> Iterator[Schedule]:
        """The fastest for the budget, then smaller ones (`Search.smaller`), as long as they take less than
        `limit_ns`."""
        least, target = self.bare.least_bytes, budget
        while least is not None and target >= least:
            schedule = self.fastest(target)
            if schedule.time_ns >= limit_ns:
                break
            if not search.knows(schedule):
                yield schedule
            target = search.smaller(schedule)

    def larger(self, budget: int, search: Search, found: Fitted) -> Iterator[Schedule]:
        """Faster ones than `found`, where that needs less than was predicted, as where gradients are larger
        than activations: until they are written, XLA uses their memory. The fastest predicted to be as much
        above the budget as that one is below it, then half as much, and so on."""
        more = found.schedule.peak_bytes - found.temporary_bytes
        limit_ns = (1 - WORTHWHILE) * found.schedule.time_ns
        while more > WORTHWHILE * search.room:
            target = max(budget, found.schedule.total_bytes) + more
            if self.bare.least_bytes is not None and target >= self.bare.least_bytes:
                schedule = self.fastest(target)
                if schedule.time_ns <= limit_ns and not search.knows(schedule):
                    yield schedule
            more //= 2
