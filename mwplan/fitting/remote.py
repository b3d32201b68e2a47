"""A budget kept on a device that is not here: plans compiled for it, and the one of least modelled time that
fits."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jax

from mwplan import planning
from mwplan.common import serial, trees
from mwplan.common.errors import InfeasibleError, ScheduleMismatchError, TargetError, TargetMemoryError
from mwplan.common.sizes import parse_bytes, show_bytes, show_ns
from mwplan.compilers import compiling
from mwplan.compilers.step import Step
from mwplan.execution import execute
from mwplan.fitting.fitted import show_fixed
from mwplan.fitting.plain import backpropagation
from mwplan.fitting.search import Plans
from mwplan.network.chain import Chain, fingerprint
from mwplan.plans.profiles import Profile
from mwplan.plans.schedule import Schedule, Strategy, kept
from mwplan.profiling.estimating import estimate
from mwplan.report.content import CompiledPeak
from mwplan.targets import program
from mwplan.targets.devices import Device
from mwplan.targets.program import Compiled
from mwplan.targets.target import Target, attached, target_of

PyTree = Any
SCHEMA = 1
NAMES = ("chain", "x", "args")  # of what a step of `mw.fit` takes


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteAttempt:
    """One program that was compiled for the device: predicted and compiled temporaries, modelled time, and
    seconds of compilation. `arrangement`, as in `mw.value_and_grad`; `strategies`, that the plan was made
    of."""

    arrangement: int
    strategies: tuple[Strategy, ...]
    predicted_bytes: int
    compiled_bytes: int
    predicted_ns: int
    modelled_ns: int
    compile_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFit:
    """A plan that keeps its budget on a device that is not here, by the word of that device's compiler.

    **Attributes:** `target`; `compiler`, the versions that said so; `schedule` and `arrangement`, for
    `mw.value_and_grad`; `fixed_bytes`, its arguments and results, and the optimizer's state,
    `optimizer_bytes`, where one was given; `temporary_bytes`, compiled;
    `modelled_ns`, of the compiled step's kernels; `bounds`, what bounds it: pairs of "arithmetic", "traffic",
    "cycles", "launches" and nanoseconds; `plain_bytes`, `plain_ns`, the same of plain backpropagation (None
    where it does not fit the device); `attempts`, everything that was compiled.

    On the device, `fit.compile(loss, chain, x, *args)` gives the step. `to_json`, `from_json` carry the plan
    there.

    >>> try:
    ...     net, x = mw.Chain([jnp.tanh] * 8), jnp.ones((256, 64))
    ...     fit = mw.fit(jnp.sum, net, x, budget="450KiB", device="h200")
    ...     assert mw.RemoteFit.from_json(fit.to_json()) == fit
    ... except mw.CompilerMissingError as missing:
    ...     assert "pip install" in str(missing)
    """

    target: str
    compiler: str
    schedule: Schedule
    arrangement: int
    fixed_bytes: int
    temporary_bytes: int
    modelled_ns: int
    bounds: tuple[tuple[str, float], ...]
    plain_bytes: int | None
    plain_ns: int | None
    attempts: tuple[RemoteAttempt, ...]
    optimizer_bytes: int = 0

    def step(self, *args: Any) -> NoReturn:
        """Raises `TargetError`: the step was compiled for another device."""
        raise TargetError(
            f"this step was compiled for {self.target}, which is not attached here. Save the plan "
            "(`fit.to_json()`), load it there (`mw.RemoteFit.from_json(text)`) and call "
            "`fit.compile(loss, chain, x, *args)`"
        )

    def compile(
        self,
        loss: Callable[..., Any],
        chain: Chain,
        x: PyTree,
        *args: Any,
        has_aux: bool = False,
        wrt_input: bool = False,
    ) -> Any:
        """The step, compiled on the device that it was planned for: `step(chain, x, *args) -> ((value,
        report), grads)`.

        **Raises:** `TargetError` where another device is attached, or another JAX installed than the one that
        said that the plan keeps its budget; `ScheduleMismatchError` for another chain or input;
        `TargetMemoryError` where the program takes more than the budget after all (what libraries need beside
        is known there alone)."""
        self.check_device()
        execute.check_match(self.schedule, chain)
        if 0 < self.schedule.input_bytes != trees.nbytes(x):
            raise ScheduleMismatchError(
                f"the plan is for an input of {show_bytes(self.schedule.input_bytes)} and `x` has "
                f"{show_bytes(trees.nbytes(x))}: fit again at this input"
            )
        gradient = functools.partial(execute.value_and_grad, loss, has_aux=has_aux, wrt_input=wrt_input)
        return self.compiled(gradient, (chain, x, *args), NAMES)

    def check_device(self) -> None:
        """Raises `TargetError` where another device is attached, or another JAX installed."""
        here = attached()
        name = here.device.name if here.device is not None else here.name
        if name != self.target:
            raise TargetError(
                f"the plan was made for {self.target} and {here.name} is attached: fit again, without "
                "`device`, to measure here"
            )
        if (version := f"jax {jax.__version__},") not in f"{self.compiler},":
            raise TargetError(
                f"the plan was made with {self.compiler} and this is {version.rstrip(chr(44))}, which may "
                "compile it otherwise: install that version, or fit again"
            )

    def compiled(
        self, gradient: Callable[..., Callable[..., Any]], args: tuple[Any, ...], names: tuple[str, ...]
    ) -> Step:
        """The step that `gradient(schedule, arrangement=...)` makes, compiled here for `args`. Raises
        `TargetMemoryError` where it takes more than the budget."""
        made = gradient(self.schedule, arrangement=self.arrangement)
        step = Step(compiling.jit(made).lower(*args).compile(), args, names)
        needs, budget = compiling.temporaries(step) + self.schedule.fixed_bytes, self.schedule.budget_bytes
        if budget is not None and needs > budget:
            raise TargetMemoryError(
                f"compiled here the step needs {show_bytes(needs)}, more than its budget of "
                f"{show_bytes(budget)}: fit again here, without `device`",
                needed_bytes=needs,
            )
        return step

    def report(self, to: str | Path, profile: Profile, *, plans: int = 24, title: str = "") -> Path:
        """Writes a page to look at, as `Frontier.report`, with what the step takes by the device's compiler.
        `profile`: the one that it was planned by, or `mw.estimate(chain, x, device=...)`, which gives it
        again. Raises `ScheduleMismatchError` for another chain's; else as there."""
        compiled = CompiledPeak(
            temporary_bytes=self.temporary_bytes,
            by=f"by the word of the compiler for {self.target}: {self.compiler}",
        )
        known = planning.frontier_for(profile, self.schedule)
        return known.report(to, self.schedule, plans=plans, title=title, compiled=compiled)

    def to_json(self) -> str:
        """This fit as JSON with a schema number."""
        return serial.dump(self, kind="fit for a device", schema=SCHEMA)

    @classmethod
    def from_json(cls, text: str) -> RemoteFit:
        """Reads what `to_json` wrote. Raises `FileFormatError` on anything else."""
        return serial.load(text, cls, kind="fit for a device", schema=SCHEMA)

    def __str__(self) -> str:
        plan = self.schedule
        total = self.fixed_bytes + self.temporary_bytes
        used = ", ".join(f"{s.value} {count}" for s, count in plan.counts.items())
        time_ns = sum(value for _, value in self.bounds) or 1
        bounds = ", ".join(
            f"{name} {value / time_ns:.0%}" for name, value in sorted(self.bounds, key=lambda p: -p[1])
        )
        plain = (
            f"backpropagation: {show_bytes(self.plain_bytes)} temporaries, {show_ns(self.plain_ns or 0)}"
            if self.plain_bytes is not None
            else "backpropagation does not fit the device"
        )
        budget = "" if plan.budget_bytes is None else f", of a budget of {show_bytes(plan.budget_bytes)}"
        return "\n".join(
            (
                f"step of {len(plan)} layers ({used}) compiled for {self.target}, which is not attached",
                f"  stored ones keep: {kept(plan) or 'nothing is stored'}",
                f"  {show_bytes(total)} = {show_fixed(self)}"
                f" + {show_bytes(self.temporary_bytes)} temporaries{budget}",
                f"  modelled {show_ns(self.modelled_ns)} ({bounds}); {plain}",
                f"  predicted {show_bytes(plan.peak_bytes)}, {show_ns(plan.time_ns)}; "
                f"{len(self.attempts)} compiled ({self.compiler})",
            )
        )


def fit(
    loss: Callable[..., Any],
    chain: Chain,
    x: PyTree,
    args: tuple[Any, ...],
    *,
    device: str | Device,
    budget: int | str,
    profile: Profile | None,
    max_error: float,
    allowed: frozenset[Strategy],
    has_aux: bool,
    wrt_input: bool,
    max_attempts: int,
    thin: float | None,
    regular: float,
    say: Callable[[str], None],
    states_bytes: int,
) -> RemoteFit:
    """The plan of least modelled time whose step, compiled for `device`, keeps the budget; arguments as those
    of `mw.fit`."""
    target_of(device).place()
    profile = estimate(chain, x, device=device) if profile is None else profile
    if profile.fingerprint and profile.fingerprint != fingerprint(chain):
        raise ScheduleMismatchError("`profile` is of another chain: leave it out, or estimate this one")
    gradient = functools.partial(execute.value_and_grad, loss, has_aux=has_aux, wrt_input=wrt_input)
    return fit_step(
        gradient,
        backpropagation(loss, has_aux, wrt_input),
        (chain, x, *args),
        profile.with_optimizer(states_bytes),
        device=device, budget=budget, max_error=max_error, allowed=allowed, max_attempts=max_attempts,
        thin=thin, regular=regular, say=say,
    )  # fmt: skip


def fit_step(
    gradient: Callable[..., Callable[..., Any]],
    plain: Callable[..., Any],
    args: tuple[Any, ...],
    profile: Profile,
    *,
    device: str | Device,
    budget: int | str,
    max_error: float = 1e-4,
    allowed: frozenset[Strategy] = planning.EVERY_STRATEGY,
    max_attempts: int = 18,
    thin: float | None = None,
    regular: float = planning.TUNING.regular_loss,
    say: Callable[[str], None] = lambda text: None,
) -> RemoteFit:
    """As `fit`, of any step: `gradient(schedule, arrangement=...)` makes a function of `args` that executes a
    schedule for `profile`; `plain` is backpropagation, of the same arguments."""
    target = target_of(device)
    search = _Search(target, gradient, args, profile, parse_bytes(budget), say)
    plans = functools.cache(lambda some: Plans.of(profile, max_error, some, thin, regular))
    for schedule, arrangement in search.candidates(plans, allowed, max_attempts):
        search.compile(schedule, arrangement)
    if search.best is None:
        least = min(one.compiled_bytes for one in search.attempts)
        raise InfeasibleError(
            f"`budget={budget!r}` ({search.budget_bytes:_} bytes): of the {len(search.attempts)} programs "
            f"that were compiled for {target.name} none keeps it. The smallest needs {least:_} bytes "
            f"({show_bytes(least)}): raise the budget to that",
            budget_bytes=search.budget_bytes,
            least_bytes=least,
        )
    return search.found(plain)


class _Search:
    """Compiles plans for one budget, and keeps the fastest that fits."""

    def __init__(
        self,
        target: Target,
        gradient: Callable[..., Callable[..., Any]],
        args: tuple[Any, ...],
        profile: Profile,
        budget_bytes: int,
        say: Callable[[str], None],
    ) -> None:
        self.target, self.gradient, self.args, self.profile = target, gradient, args, profile
        self.budget_bytes, self.say = budget_bytes, say
        self.attempts: list[RemoteAttempt] = []
        self.best: tuple[Schedule, int, Compiled] | None = None

    def candidates(
        self, plans: Callable[[frozenset[Strategy]], Plans], allowed: frozenset[Strategy], most: int
    ) -> Iterator[tuple[Schedule, int]]:
        """Of all strategies and of fewer, the fastest for the budget, tied, loose and untied; where a plan's
        tied step does not fit, those for less memory, by as much as was missing, and its loose and untied
        ones, which mostly need no less, at last."""
        asked = dict.fromkeys(
            some for some in (allowed, *(allowed & other for other in planning.NARROWER)) if some
        )
        known: set[Any] = set()
        late: list[tuple[Schedule, int]] = []
        for some in asked:
            total = self.budget_bytes
            while len(self.attempts) < most:
                least = plans(some).bare.least_bytes
                if least is None or total < least:
                    if not self.attempts:  # of the strategies asked for none fits by what is alive at once
                        plans(some).fastest(self.budget_bytes)
                    break
                schedule = plans(some).fastest(total)
                if schedule.runs in known:
                    break
                known.add(schedule.runs)
                yield schedule, 0
                others = [(schedule, arrangement) for arrangement in (execute.LOOSE, execute.UNTIED)]
                needs = self.attempts[-1].compiled_bytes
                if needs <= self.budget_bytes:
                    yield from others[: most - len(self.attempts)]
                    break
                late += others
                total = schedule.total_bytes - max(1, needs - self.budget_bytes)
        yield from late[: max(0, most - len(self.attempts))]

    def compile(self, schedule: Schedule, arrangement: int) -> None:
        """Compiles one program, or reads what is known of it, and keeps it if it is the fastest that fits."""
        start = time.perf_counter()
        made: Compiled | None = None
        try:
            one = program.compile(
                self.gradient(schedule, arrangement=arrangement), *self.args, target=self.target
            )
        except TargetMemoryError as error:
            most = 0 if self.target.device is None else self.target.device.memory_bytes
            needs, time_ns = max(error.needed_bytes or 0, most, self.budget_bytes + 1), 0
        else:
            made, time_ns = one, one.modelled_ns
            needs = one.total_bytes + self.profile.optimizer_bytes
        self.attempts.append(
            RemoteAttempt(
                arrangement=arrangement,
                strategies=tuple(dict.fromkeys(schedule.strategies)),
                predicted_bytes=schedule.peak_bytes,
                compiled_bytes=needs,
                predicted_ns=schedule.time_ns,
                modelled_ns=time_ns,
                compile_seconds=time.perf_counter() - start,
            )
        )
        fits = made is not None and needs <= self.budget_bytes
        above = "fits" if fits else f"{show_bytes(needs - self.budget_bytes)} above the budget"
        self.say(
            f"a schedule of {show_bytes(schedule.total_bytes)}, {show_ns(schedule.time_ns)} needs "
            f"{show_bytes(needs)}, {show_ns(time_ns)} compiled: {above}"
        )
        if made is not None and fits and (self.best is None or time_ns < self.best[2].modelled_ns):
            self.best = (schedule, arrangement, made)

    def found(self, plain: Callable[..., Any]) -> RemoteFit:
        """The best, beside backpropagation."""
        assert self.best is not None
        schedule, arrangement, made = self.best
        try:
            beside: Compiled | None = program.compile(plain, *self.args, target=self.target)
        except TargetMemoryError:
            beside = None
        return RemoteFit(
            target=self.target.name,
            compiler=made.compiler,
            schedule=dataclasses.replace(schedule, budget_bytes=self.budget_bytes),
            arrangement=arrangement,
            fixed_bytes=made.total_bytes - made.temporary_bytes + self.profile.optimizer_bytes,
            optimizer_bytes=self.profile.optimizer_bytes,
            temporary_bytes=made.temporary_bytes,
            modelled_ns=made.modelled_ns,
            bounds=tuple(made.shares_ns.items()),
            plain_bytes=None if beside is None else beside.temporary_bytes,
            plain_ns=None if beside is None else beside.modelled_ns,
            attempts=tuple(self.attempts),
        )
