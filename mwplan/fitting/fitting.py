"""From a budget to a compiled step that keeps it: plan, compile, measure; where the compiler needs more,
plan with less."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from mwplan import planning
from mwplan.common import trees
from mwplan.common.errors import ArgumentError, InfeasibleError, ScheduleMismatchError
from mwplan.common.sizes import parse_bytes, show_bytes
from mwplan.execution import execute
from mwplan.execution.execute import Arrangement
from mwplan.execution.updates import Optimizer, state_bytes
from mwplan.fitting import remote, tuning
from mwplan.fitting.fitted import Fitted
from mwplan.fitting.losses import with_loss
from mwplan.fitting.plain import Plain, backpropagation
from mwplan.fitting.remote import RemoteFit
from mwplan.fitting.search import WORTHWHILE, Compiler, Plans, Search
from mwplan.network import sharding
from mwplan.network.chain import Chain, boundaries, check_chain, fingerprint
from mwplan.plans.profiles import Profile
from mwplan.plans.schedule import Choice, Schedule, Strategy, check_allowed
from mwplan.profiling import measure
from mwplan.solvers import baselines
from mwplan.solvers.problem import Problem
from mwplan.targets.devices import Device

PyTree = Any
QUICKER = 6  # programs of each set of strategies that are compiled in search of such a plan
LESS = (0.5, 0.25)  # shares of the room for temporaries whose plans are timed when tuning


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
    device: str | Device | None = None,
    optimizer: Optimizer | None = None,
) -> Fitted | RemoteFit:
    """The fastest schedule whose *compiled* step fits the budget.

    A schedule's peak is what is alive at once. The compiler's allocator may need more, where buffers of
    different lifetimes leave room between them that nothing fits into (fragmentation), which is predicted but
    not always; then smaller schedules follow, until one fits. Where that costs time, or nothing fits, it also
    looks among plans of fewer strategies (`planning.NARROWER`), whose buffers may lie closer. Before nothing
    is found to fit, plain backpropagation, the recomputation of every layer (`jax.checkpoint`) and the
    smallest schedules are compiled too, whatever was predicted; where a step needs less than was, faster
    schedules are. A loss with memory of its own is planned for.

    **Arguments:** `loss(y, *args)`, as `mw.value_and_grad`, with `has_aux` and `wrt_input`; `chain`, `x`;
    `budget`, bytes of the whole step or a text such as "2GiB"; `profile` (measured if None); `max_error`,
    `allowed`, as `mw.plan`; `thin`, `regular`, as `mw.plan`; `max_attempts`, compilations of each plan;
    `tune`, rounds in which plans of fewer strategies (no vijps; no inverses; recomputation alone), for less
    memory (a half, a quarter), what one would do by hand (plain backpropagation, inversion or moonwalk runs
    wherever they are possible) and each of these with fewer barriers (`mw.UNTIED`, `mw.LOOSE`) are timed in
    turn with the predicted fastest, those that fit, and the fastest kept: a profile's times are estimates of
    operations on their own; 0, the predicted fastest is taken; `say`, called with a line on each; `device`,
    another than the attached one (`mw.targets`): `chain`, `x` and `args` may be shapes, the profile is
    `mw.estimate`'s, steps are compiled for it, and of those that fit (plans of all and of fewer strategies,
    tied, loose and untied) the one of least modelled time is kept; `optimizer`, of optax: the budget holds
    its state too, of `optimizer.init(parameters)`, not what an update needs beside (`mw.value_and_update`
    plans updates within the step).
    **Returns:** a `Fitted`; for another `device` a `RemoteFit`, whose step runs there alone.
    **Raises:** `InfeasibleError` where nothing that was compiled fits, with a budget that is enough for what
    was; `ScheduleMismatchError` for a profile of another chain or input; as `mw.plan` and
    `mw.value_and_grad`, what concerns the loss before anything is measured.
    **Cost:** a profile, a plan, and one compilation of the step or a few; with `tune` up to fifteen times
    that, and some steps.

    >>> net, x = mw.Chain([jnp.tanh] * 8), jnp.ones((256, 64))
    >>> fit = mw.fit(jnp.sum, net, x, budget="450KiB", profile=mw.estimate(net, x, device="h100"))
    >>> (value, report), grads = fit.step(net, x)
    >>> bool(jnp.allclose(value, jnp.sum(net(x))))
    True
    """
    _check_counts(max_attempts, tune)
    chosen = check_allowed(allowed)
    parse_bytes(budget)
    y = boundaries(check_chain(chain), x)[-1]
    execute.check_losses_shape(loss, y, args, has_aux)
    states_bytes = 0 if optimizer is None else state_bytes(optimizer, chain)
    if device is not None:
        check_untimed(tune, device)
        return remote.fit(
            loss, chain, x, args, device=device, budget=budget, profile=profile, max_error=max_error,
            allowed=chosen, has_aux=has_aux, wrt_input=wrt_input, max_attempts=max_attempts, thin=thin,
            regular=regular, say=say, states_bytes=states_bytes,
        )  # fmt: skip
    profile = measure.profile(chain, x, wrt_input=wrt_input) if profile is None else profile
    _check_profile(profile, chain, x)
    profile = with_loss(profile, loss, y, args, has_aux).with_optimizer(states_bytes)
    return fit_step(
        functools.partial(execute.value_and_grad, loss, has_aux=has_aux, wrt_input=wrt_input),
        (chain, x, *args),
        profile, budget=budget, max_error=max_error, allowed=chosen, max_attempts=max_attempts, thin=thin,
        regular=regular, tune=tune, say=say, names=remote.NAMES,
        plain=backpropagation(loss, has_aux, wrt_input),
    )  # fmt: skip


def fit_step(
    gradient: Callable[..., Callable[..., Any]],
    args: tuple[Any, ...],
    profile: Profile,
    *,
    budget: int | str,
    max_error: float = 1e-4,
    allowed: Choice = planning.EVERY_STRATEGY,
    max_attempts: int = 18,
    thin: float | None = None,
    regular: float = planning.TUNING.regular_loss,
    tune: int = 0,
    say: Callable[[str], None] = lambda text: None,
    names: tuple[str, ...] = ("args",),
    plain: Callable[..., Any] | None = None,
) -> Fitted:
    """As `fit`, of any step: `gradient(schedule, arrangement=...)` makes a function of `args` that executes a
    schedule for `profile`; the first of `args` holds the parameters; `names`, of `args`, as `Step` has them;
    `plain`, backpropagation, of the same arguments. Raises and costs: as `fit`, beside the profile."""
    _check_counts(max_attempts, tune)
    budget_bytes, chosen = parse_bytes(budget), check_allowed(allowed)
    fitter = _Fitter(
        compiler=Compiler(gradient, args, profile, names, plain and Plain(plain, args)),
        plans=functools.cache(lambda allowed: Plans.of(profile, max_error, allowed, thin, regular)),
        budget=budget,
        max_error=max_error,
        max_attempts=max_attempts,
        say=say,
    )
    if tune:
        return fitter.tuned(chosen, budget_bytes, tune)
    return fitter.fitted(chosen, budget_bytes, *planning.NARROWER)


@dataclass(frozen=True, kw_only=True)
class _Fitter:
    """What one call of `fit` works with: `plans(allowed)`; `budget`, as it was asked for."""

    compiler: Compiler
    plans: Callable[[frozenset[Strategy]], Plans]
    budget: int | str
    max_error: float
    max_attempts: int
    say: Callable[[str], None]

    def fitted(
        self,
        allowed: frozenset[Strategy],
        total: int,
        *others: frozenset[Strategy],
        last_resort: bool = True,
    ) -> Fitted:
        """The fastest of `allowed` that fits `total` bytes. Where fragmentation makes it slow, or nothing
        fits, also what else would be faster: of `allowed`, and of the `others` among them. With
        `last_resort`, also what is compiled whatever was predicted."""
        search, of_all = Search(self.compiler, total, self.say), self.plans(allowed)
        sets = tuple(filter(None, dict.fromkeys((allowed, *(allowed & other for other in others)))))
        found = fastest = None
        if of_all.bare.least_bytes is not None and of_all.bare.least_bytes <= total:
            fastest = of_all.fastest(self.budget if total == parse_bytes(self.budget) else total)
            found = search.first(of_all.smaller(total, search), self.max_attempts)
            for some in sets:
                limit_ns = math.inf if found is None else (1 - WORTHWHILE) * found.schedule.time_ns
                if limit_ns > fastest.time_ns:
                    quicker = self.plans(some).quicker(total, search, limit_ns)
                    found = search.first(quicker, min(self.max_attempts, QUICKER)) or found
        if found is None and not last_resort:
            raise InfeasibleError(
                f"of the {len(search.attempts)} programs that were compiled none fits {show_bytes(total)}",
                budget_bytes=total,
            )
        if found is None:
            candidates = tuple(self.baselines(sets))
            if not candidates:  # of these strategies there is no schedule at all
                of_all.fastest(total)
            found = search.baselines(candidates, self.budget)
        larger = of_all.larger(total, search, found)
        found = search.first(larger, min(self.max_attempts, QUICKER)) or found
        return search.with_attempts(found, fastest)

    def baselines(self, sets: Iterable[frozenset[Strategy]]) -> Iterator[tuple[Schedule, Arrangement]]:
        """What stands among the candidates whatever the budget: plain backpropagation, every layer recomputed
        by itself, each also as JAX would do it; the smallest schedules of the `sets` of strategies."""
        profile = self.compiler.profile
        asked = Problem(profile=profile, max_error=self.max_error)
        known = set()
        for make in (baselines.store_all, baselines.recompute_each):
            schedule = planning.scheduled(profile, make(asked), self.max_error)
            if any(one.issuperset(schedule.strategies) for one in sets):
                known.add(schedule.runs)
                yield schedule, execute.PLAIN
                yield schedule, 0
        for some in sets:
            frontier = self.plans(some).bare
            if frontier.least_bytes is None:
                continue
            schedule = frontier.at(frontier.least_bytes)
            if schedule.runs not in known:
                known.add(schedule.runs)
                yield schedule, 0

    def tuned(self, chosen: frozenset[Strategy], budget_bytes: int, rounds: int) -> Fitted:
        """The fastest, timed, of many that fit: see `tune` of `fit`."""
        compiler, profile = self.compiler, self.compiler.profile
        less = [profile.fixed_bytes + int(share * (budget_bytes - profile.fixed_bytes)) for share in LESS]
        asked = [(chosen & some, budget_bytes) for some in (planning.EVERY_STRATEGY, *planning.NARROWER)]
        asked = [*(one for one in asked if one[0]), *((chosen, room) for room in less)]
        found, failed = [], []
        for some, room in dict.fromkeys(asked):
            try:
                whole = (some, room) == (chosen, budget_bytes)
                found.append(self.fitted(some, room, last_resort=whole))
            except InfeasibleError as error:
                failed.append(error)
        found = list({one.schedule.runs: one for one in reversed(found)}.values())[::-1]
        known = {one.schedule.runs for one in found}
        by_hand = planning.baseline_schedules(profile, max_error=self.max_error, allowed=chosen)
        candidates = [(one, 0) for one in by_hand if one.runs not in known]
        schedules = [*(one.schedule for one in found), *(one for one, _ in candidates)]
        candidates += [(one, way) for way in (execute.UNTIED, execute.LOOSE) for one in schedules]
        made = [compiler(schedule, arrangement, budget_bytes) for schedule, arrangement in candidates]
        found += [one for one in made if one.temporary_bytes <= budget_bytes - profile.fixed_bytes]
        if not found:
            raise failed[0]
        return tuning.fastest(found, compiler.args, rounds, self.say) if len(found) > 1 else found[0]


def check_untimed(tune: int, device: str | Device) -> None:
    """Raises `ArgumentError` where steps for another device are to be timed."""
    if tune:
        raise ArgumentError(
            f"`tune={tune}`: steps for `device={device!r}` cannot be timed here; leave it out"
        )


def _check_counts(max_attempts: int, tune: int) -> None:
    if max_attempts < 1:
        raise ArgumentError(f"`max_attempts={max_attempts}` must be at least 1")
    if tune < 0:
        raise ArgumentError(f"`tune={tune}` must be 0 or a number of rounds")


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
