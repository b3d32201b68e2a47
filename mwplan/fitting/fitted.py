"""What `mw.fit` returns: a compiled step, its plan, and all that was compiled on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mwplan import planning
from mwplan.common.sizes import show_bytes, show_ns
from mwplan.execution.execute import Arrangement
from mwplan.fitting.plain import Plain
from mwplan.plans.profiles import Profile
from mwplan.plans.schedule import Schedule, kept
from mwplan.report.content import CompiledPeak
from mwplan.targets.peak import explain_peak


def show_fixed(one: Any) -> str:
    """The fixed part of a `Profile` or a `RemoteFit`, for people."""
    state = one.optimizer_bytes
    of_it = f" ({show_bytes(state)} of it the optimizer's state)" if state else ""
    return f"{show_bytes(one.fixed_bytes)} fixed{of_it}"


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
    compiled for; `ArgumentError` says which argument has another. `schedule`, its plan, with the budget that
    it was made for: that asked for or, tuned, less; `temporary_bytes`, what the compiled program needs beside
    arguments and results; `attempts`, everything that was compiled, the chosen one last.

    >>> net, x = mw.Chain([jnp.tanh] * 8), jnp.ones((256, 64))
    >>> fit = mw.fit(jnp.sum, net, x, budget="450KiB", profile=mw.estimate(net, x, device="h100"))
    >>> (value, report), grads = fit.step(net, x)
    >>> fit.temporary_bytes + fit.schedule.fixed_bytes <= 450 * 1024
    True
    """

    step: Any
    schedule: Schedule
    profile: Profile
    temporary_bytes: int
    attempts: tuple[Attempt, ...]
    plain: Plain | None = field(default=None, compare=False, repr=False)

    @property
    def plain_bytes(self) -> int | None:
        """Temporaries of plain backpropagation, as it is compiled here; None for arrays on several devices,
        and where it does not compile. **Cost:** a compilation, when it is first asked for; on CPUs, where it
        is a fast one, printing asks too."""
        return None if self.plain is None else self.plain.temporary_bytes()

    @property
    def arrangement(self) -> Arrangement:
        """That of the step, for `mw.value_and_grad` where it is to be part of a larger program."""
        return self.attempts[-1].arrangement

    def report(
        self,
        to: str | Path,
        *,
        frontier: planning.Frontier | None = None,
        plans: int = 24,
        title: str = "",
        measured: Sequence[Sequence[str]] = (),
    ) -> Path:
        """Writes a page to look at, as `Frontier.report`: this plan beside those for other budgets, with what
        its compiled step takes.

        **Arguments:** as there; `frontier`, what `mw.frontier(fitted.profile, ...)` returned, where it is
        there already or strategies were left out. Returns and raises as there. **Cost:** also a frontier, and
        reading the compiled program.

        >>> import tempfile
        >>> net, x = mw.Chain([jnp.tanh] * 8), jnp.ones((256, 64))
        >>> fit = mw.fit(jnp.sum, net, x, budget="450KiB", profile=mw.estimate(net, x, device="h100"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     try:
        ...         page = fit.report(f"{folder}/plan.html")
        ...     except mw.MwplanError as missing:
        ...         assert "mwplan[report]" in str(missing)
        """
        peak = explain_peak(self)
        compiled = CompiledPeak(
            temporary_bytes=self.temporary_bytes,
            by=f"measured from the program compiled for {self.profile.device or 'this device'}",
            alive=tuple(peak.by_role().items()),
        )
        known = planning.frontier_for(self.profile, self.schedule) if frontier is None else frontier
        return known.report(to, self.schedule, plans=plans, title=title, compiled=compiled, measured=measured)

    def _beside(self, plain_bytes: int) -> str:
        """What plain backpropagation takes, in words, and whether the budget has room for it."""
        fits = self.profile.fixed_bytes + plain_bytes <= (self.schedule.budget_bytes or 0)
        also = ": the budget has room for it, no plan is needed" if fits else ""
        return f"  plain `jax.grad` takes {show_bytes(plain_bytes)} temporaries{also}"

    def __str__(self) -> str:
        total, plan = self.profile.fixed_bytes + self.temporary_bytes, self.schedule
        plain = None if self.plain is None else self.plain.known_bytes()
        used = ", ".join(f"{s.value} {count}" for s, count in plan.counts.items())
        budget = "" if plan.budget_bytes is None else f", of a budget of {show_bytes(plan.budget_bytes)}"
        programs = "1 program" if len(self.attempts) == 1 else f"{len(self.attempts)} programs"
        return "\n".join(
            (
                f"compiled step of {len(plan)} layers ({used}) on {self.profile.device}",
                f"  measured {show_bytes(total)} = {show_fixed(self.profile)}"
                f" + {show_bytes(self.temporary_bytes)} temporaries{budget}",
                f"  predicted {show_bytes(plan.peak_bytes)} temporaries, {show_ns(plan.time_ns)}, error "
                f"{plan.error:.1e}; {programs} compiled",
                *([] if plain is None else [self._beside(plain)]),
                f"  stored ones keep: {kept(plan) or 'nothing is stored'}",
                "  call `(value, report), grads = fitted.step(chain, x, *args)`; `print(fitted.schedule)` "
                "shows the plan",
            )
        )
