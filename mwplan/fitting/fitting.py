"""From a budget to a compiled step that keeps it: plan, compile, measure; where the compiler needs more,
arrange the program otherwise, or plan with less."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from mwplan import planning
from mwplan.common import trees
from mwplan.common.errors import ArgumentError, InfeasibleError, ScheduleMismatchError
from mwplan.common.sizes import parse_bytes, show_bytes, show_ns
from mwplan.compilers.compiling import jit, temporaries
from mwplan.execution import execute, heap
from mwplan.execution.execute import Arrangement
from mwplan.network import sharding
from mwplan.network.chain import Chain, boundaries, check_chain, fingerprint
from mwplan.plans.profiles import Profile
from mwplan.plans.schedule import Choice, Run, Schedule, Status, Strategy, check_allowed
from mwplan.profiling import measure

PyTree = Any
WORTHWHILE = 0.02  # the share of its time by which another plan must be faster to be compiled
QUICKER = 6  # programs of each set of strategies that are compiled in search of such a plan
LESS = (0.5, 0.25)  # shares of the room for temporaries whose plans are timed when tuning


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One program that was compiled: predicted and measured temporaries, and seconds of compilation;
    `arrangement`, as in `mw.value_and_grad`."""

    arrangement: Arrangement = 0
    predicted_bytes: int
    measured_bytes: int
    compile_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A compiled gradient step within its budget.

    `step(chain, x, *args) -> ((value, report), grads)`, as `mw.value_and_grad`, for the shapes it was
    compiled for. `schedule`, its plan, with the budget that it was made for: that asked for or, tuned, less;
    `temporary_bytes`, what the compiled program needs beside arguments and results; `attempts`, everything
    that was compiled, the chosen one last.
    """

    step: Any
    schedule: Schedule
    profile: Profile
    temporary_bytes: int
    attempts: tuple[Attempt, ...]

    @property
    def arrangement(self) -> Arrangement:
        """That of the step, for `mw.value_and_grad` where it is to be part of a larger program."""
        return self.attempts[-1].arrangement

    def __str__(self) -> str:
        total, plan = self.profile.fixed_bytes + self.temporary_bytes, self.schedule
        used = ", ".join(f"{s.value} {plan.strategies.count(s)}" for s in Strategy if s in plan.strategies)
        budget = "" if plan.budget_bytes is None else f", of a budget of {show_bytes(plan.budget_bytes)}"
        return "\n".join(
            (
                f"compiled step of {len(plan)} layers ({used}) on {self.profile.device}",
                f"  measured {show_bytes(total)} = {show_bytes(self.profile.fixed_bytes)} fixed"
                f" + {show_bytes(self.temporary_bytes)} temporaries{budget}",
                f"  predicted {show_ns(plan.time_ns)}, error {plan.error:.1e}; {len(self.attempts)} compiled",
                "  call `(value, report), grads = fitted.step(chain, x, *args)`; `print(fitted.schedule)` "
                "shows the plan",
            )
        )


def fit(
    loss: Callable[..., Any],
    chain: Chain,
    x: PyTree,
    *args: Any,
    budget: int | str,
    profile: Profile | None = None,
    max_error: float = 1e-4,
    allowed: Choice = planning.EVERY_STRATEGY,
    has_aux: bool = False,
    wrt_input: bool = False,
    max_attempts: int = 18,
    thin: float | None = None,
    regular: float = planning.TUNING.regular_loss,
    tune: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> Fitted:
    """The fastest schedule whose *compiled* step fits the budget.

    A schedule's peak is what is alive at once. The compiler's allocator may need more, where buffers of
    different lifetimes leave holes between them, and not all of these are foreseen; then the same step is
    compiled with detours that close them (`mwplan.execution.heap`; not where a parameter is larger than 4
    MiB), and if that does not help either, leaner schedules, until one fits. Where that costs time, or
    nothing fits, it also looks among plans of fewer strategies (`planning.NARROWER`), whose buffers may lie
    closer.

    **Arguments:** `loss(y, *args)`, as `mw.value_and_grad`, with `has_aux` and `wrt_input`; `chain`, `x`;
    `budget`, bytes of the whole step or a text such as "2GiB"; `profile` (measured if None); `max_error`,
    `allowed`, as `mw.plan`; `thin`, `regular`, as `mw.plan`; `max_attempts`, compilations of each plan;
    `tune`, rounds in which plans of fewer strategies (no vijps; no inverses; recomputation alone), for less
    memory (a half, a quarter), what one would do by hand (plain backpropagation, inversion or moonwalk runs
    wherever they are possible) and each of these untied and loose (`mw.UNTIED`, `mw.LOOSE`) are timed in turn
    with the predicted fastest, those that fit, and the fastest kept: a profile's times are estimates of
    operations on their own; 0, the predicted fastest is taken; `say`, told of each.
    **Returns:** a `Fitted`.
    **Raises:** `InfeasibleError` where no schedule fits, or none of those compiled; `ScheduleMismatchError`
    for a profile of another chain or input; as `mw.plan` and `mw.value_and_grad`, what concerns the loss
    before anything is measured.
    **Cost:** a profile, a plan, and one compilation of the step or a few; with `tune` up to fifteen times
    that, and some steps.
    """
    if max_attempts < 1:
        raise ArgumentError(f"`max_attempts={max_attempts}` must be at least 1")
    if tune < 0:
        raise ArgumentError(f"`tune={tune}` must be 0 or a number of rounds")
    budget_bytes, chosen = parse_bytes(budget), check_allowed(allowed)
    execute.check_losses_shape(loss, boundaries(check_chain(chain), x)[-1], args, has_aux)
    profile = measure.profile(chain, x) if profile is None else profile
    _check_profile(profile, chain, x)

    compiler = _Compiler(
        functools.partial(execute.value_and_grad, loss, has_aux=has_aux, wrt_input=wrt_input),
        (chain, x, *args),
        profile,
    )
    plans = functools.cache(lambda allowed: _Plans.of(profile, max_error, allowed, thin, regular))

    def fitted(allowed: frozenset[Strategy], total: int, *others: frozenset[Strategy]) -> Fitted:
        """The fastest of `allowed` that fits `total` bytes. Where holes make it slow, or nothing fits, also
        what else would be faster: of `allowed`, and of the `others` among them."""
        search, of_all = _Search(compiler, total, say), plans(allowed)
        fastest = of_all.bare.at(budget if total == budget_bytes else total, regular=regular)
        found = search.first(of_all.foreseen(total, fastest, search), max_attempts)
        for some in filter(None, dict.fromkeys((allowed, *(allowed & other for other in others)))):
            limit_ns = math.inf if found is None else (1 - WORTHWHILE) * found.schedule.time_ns
            if limit_ns > fastest.time_ns:
                quicker = plans(some).quicker(total, search, limit_ns)
                found = search.first(quicker, min(max_attempts, QUICKER)) or found
        if found is None:
            raise search.failed(budget)
        return search.told(found, fastest)

    if not tune:
        return fitted(chosen, budget_bytes, *planning.NARROWER)
    less = [profile.fixed_bytes + int(share * (budget_bytes - profile.fixed_bytes)) for share in LESS]
    asked = [(chosen & some, budget_bytes) for some in (planning.EVERY_STRATEGY, *planning.NARROWER)]
    found, failed = [], []
    for some, room in dict.fromkeys([*(one for one in asked if one[0]), *((chosen, room) for room in less)]):
        try:
            found.append(fitted(some, room))
        except InfeasibleError as error:
            failed.append(error)
    found = list({one.schedule.runs: one for one in reversed(found)}.values())[::-1]
    known = {one.schedule.runs for one in found}
    by_hand = planning.baseline_schedules(profile, max_error=max_error, allowed=chosen)
    tries = [(one, 0) for one in by_hand if one.runs not in known]
    schedules = [*(one.schedule for one in found), *(one for one, _ in tries)]
    tries += [(one, way) for way in (execute.UNTIED, execute.LOOSE) for one in schedules]
    made = [compiler(schedule, arrangement, budget_bytes) for schedule, arrangement in tries]
    found += [one for one in made if one.temporary_bytes <= budget_bytes - profile.fixed_bytes]
    if not found:
        raise failed[0]
    return _fastest(found, (chain, x, *args), tune, say) if len(found) > 1 else found[0]


def _check_profile(profile: Profile, chain: Chain, x: PyTree) -> None:
    """Raises `ScheduleMismatchError` where `profile` is of another chain or input. What lies on several
    devices is not looked at: the profile is of one of them."""
    if not isinstance(profile, Profile):
        raise ArgumentError(f"`profile` is a {type(profile).__name__}: make one with `mw.profile(chain, x)`")
    got = fingerprint(chain)
    if profile.fingerprint and profile.fingerprint != got:
        raise ScheduleMismatchError(
            f"`profile` is of another chain (fingerprint {profile.fingerprint}, this one has {got}): profile "
            "this one"
        )
    here, there = trees.nbytes(x), profile.activation_bytes[0]
    if profile.fingerprint and here != there and not sharding.may_be_spread():
        raise ScheduleMismatchError(
            f"`profile` is of an input of {show_bytes(there)} and `x` has {show_bytes(here)}: profile "
            "`chain` at this input, `mw.profile(chain, x)`"
        )


def _fastest(found: list[Fitted], args: tuple[Any, ...], rounds: int, say: Callable[[str], None]) -> Fitted:
    """The one of least median time over `rounds` interleaved steps each, after a warm-up."""
    seconds: list[list[float]] = [[] for _ in found]
    for at in range(rounds + 1):
        for one, samples in zip(found, seconds):
            start = time.perf_counter()
            jax.block_until_ready(one.step(*args))
            if at:
                samples.append(time.perf_counter() - start)
    medians = [statistics.median(samples) for samples in seconds]
    best = found[quickest(seconds)]
    text = ", ".join(
        f"{one.schedule.time_ns / 1e6:.1f} ms predicted, {m * 1e3:.1f} measured"
        for one, m in zip(found, medians)
    )
    say(f"{len(found)} plans timed: {text}")
    return best


def quickest(seconds: Sequence[Sequence[float]]) -> int:
    """Which program is the fastest, from interleaved samples of each: every round's times over that round's
    mean, so that a slow moment counts for all alike, and the least median of these."""
    means = [statistics.fmean(samples) for samples in zip(*seconds)]
    shares = [statistics.median(a / b for a, b in zip(samples, means)) for samples in seconds]
    return shares.index(min(shares))


@dataclass(frozen=True)
class _Compiler:
    """Makes a compiled step of `gradient(schedule, arrangement=...)` for `args`."""

    gradient: Callable[..., Callable[..., Any]]
    args: tuple[Any, ...]
    profile: Profile

    def __call__(self, schedule: Schedule, arrangement: Arrangement, budget_bytes: int) -> Fitted:
        """The step, whether it fits or not; of attempts it has its own."""
        start = time.perf_counter()
        step = self.lowered(schedule, arrangement).compile()
        return self.fitted(step, schedule, arrangement, budget_bytes, time.perf_counter() - start)

    def lowered(self, schedule: Schedule, arrangement: Arrangement) -> Any:
        """The step, to be compiled."""
        return jit(self.gradient(schedule, arrangement=arrangement)).lower(*self.args)

    def fitted(
        self, step: Any, schedule: Schedule, arrangement: Arrangement, budget_bytes: int,
        seconds: float,
    ) -> Fitted:  # fmt: skip
        """What was compiled in so many seconds."""
        attempt = Attempt(
            arrangement=arrangement,
            predicted_bytes=schedule.peak_bytes,
            measured_bytes=temporaries(step),
            compile_seconds=seconds,
        )
        return Fitted(
            step=step,
            schedule=dataclasses.replace(schedule, budget_bytes=budget_bytes),
            profile=self.profile,
            temporary_bytes=attempt.measured_bytes,
            attempts=(attempt,),
        )


class _Search:
    """Compiles schedules for one budget, one after another, and remembers what each needed."""

    def __init__(self, compiler: _Compiler, budget_bytes: int, say: Callable[[str], None]):
        self.compiler, self.budget_bytes, self.say = compiler, budget_bytes, say
        self.room = budget_bytes - compiler.profile.fixed_bytes
        self.attempts: list[Attempt] = []
        self._least: dict[tuple[Run, ...], int] = {}

    def knows(self, schedule: Schedule) -> bool:
        """Whether it has been compiled."""
        return schedule.runs in self._least

    def leaner(self, schedule: Schedule) -> int:
        """The total bytes for which to plan next: as much less than this one's as the best of its programs
        was above the budget."""
        return schedule.total_bytes - max(1, self._least[schedule.runs] - self.room)

    def first(self, schedules: Iterable[Schedule], most: int) -> Fitted | None:
        """The first program that fits, of at most so many."""
        for made, last in itertools.islice(self._programs(schedules), most):
            needs, runs = made.temporary_bytes, made.schedule.runs
            self.attempts.append(made.attempts[-1])
            self._least[runs] = min(needs, self._least.get(runs, needs))
            if needs > self.room:
                self.say(
                    f"a schedule of {show_bytes(made.schedule.peak_bytes)} needs {show_bytes(needs)} "
                    "compiled, "
                    f"{show_bytes(needs - self.room)} above the budget: trying another arrangement, or a "
                    "leaner one"
                )
            elif last:
                return made
        return None

    def _programs(self, schedules: Iterable[Schedule]) -> Iterator[tuple[Fitted, bool]]:
        """Every schedule as it is, and with detours (`heap.arrangements`); with each whether to keep it if it
        fits."""
        compiler, budget_bytes = self.compiler, self.budget_bytes
        for schedule in schedules:
            yield compiler(schedule, 0, budget_bytes), True
            if not execute.can_be_arranged(compiler.args[0]):
                continue
            start = time.perf_counter()
            for way, step, last in heap.arrangements(
                functools.partial(compiler.lowered, schedule), self.room
            ):
                yield compiler.fitted(step, schedule, way, budget_bytes, time.perf_counter() - start), last
                start = time.perf_counter()

    def told(self, found: Fitted, fastest: Schedule) -> Fitted:
        """`found`, with everything that was compiled, itself last, and with what is known of it among all
        schedules for the budget, of which `fastest` is the fastest."""
        plan, (own,) = found.schedule, found.attempts
        if plan.time_ns > fastest.time_ns:
            saved = plan.time_ns - fastest.time_ns
            above = self._least.get(fastest.runs, 0) - self.room
            gain = (
                f"a schedule faster by {show_ns(saved)} ({saved / plan.time_ns:.1%}) was compiled: "
                f"for holes between buffers it needs {show_bytes(above)} more than the budget"
            )
            plan = dataclasses.replace(
                plan,
                bound_ns=fastest.bound_ns,
                status=Status.FEASIBLE,
                next_gain=gain if above > 0 else plan.next_gain,
            )
        others = (one for one in self.attempts if one is not own)
        return dataclasses.replace(found, schedule=plan, attempts=(*others, own))

    def failed(self, budget: int | str) -> InfeasibleError:
        """That nothing fits; `budget`, as it was asked for."""
        least = min(one.measured_bytes for one in self.attempts) + self.compiler.profile.fixed_bytes
        return InfeasibleError(
            f"`budget={budget!r}` ({self.budget_bytes:_} bytes): schedules fit by what is alive at once, but "
            f"of the {len(self.attempts)} that were compiled none does: "
            f"the allocator leaves holes between buffers. The leanest compiled needs {least:_} bytes "
            f"({show_bytes(least)}): raise the "
            "budget to that",
            budget_bytes=self.budget_bytes,
            least_bytes=least,
        )


@dataclass(frozen=True)
class _Plans:
    """The schedules of some strategies; `bare`, without the holes that are foreseen, which are not always
    there."""

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
    ) -> _Plans:
        thin = planning.default_thin(profile) if thin is None else thin
        frontier = planning.frontier(profile, max_error=max_error, allowed=allowed, thin=thin)
        bare = dataclasses.replace(frontier, profile=dataclasses.replace(profile, workspaces=()))
        return cls(frontier, bare, regular)

    def foreseen(self, budget: int, fastest: Schedule, search: _Search) -> Iterator[Schedule]:
        """The `fastest` for the budget, foreseen holes or not; where holes are foreseen, the plan without;
        then leaner ones (`_Search.leaner`); then those between, the fastest first."""
        frontier = self.frontier
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
            target = search.leaner(schedule)
            if frontier.least_bytes is None or target < frontier.least_bytes:
                break
            schedule = frontier.at(target, regular=self.regular)
        for total, _ in reversed(self.bare.points):
            if total <= budget and not search.knows(schedule := self.bare.at(total, regular=self.regular)):
                yield schedule

    def quicker(self, budget: int, search: _Search, limit_ns: float) -> Iterator[Schedule]:
        """The fastest for the budget, then leaner ones (`_Search.leaner`), as long as they take less than
        `limit_ns`."""
        least, target = self.bare.least_bytes, budget
        while least is not None and target >= least:
            schedule = self.bare.at(target, regular=self.regular)
            if schedule.time_ns >= limit_ns:
                break
            if not search.knows(schedule):
                yield schedule
            target = search.leaner(schedule)
