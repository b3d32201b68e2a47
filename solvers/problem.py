"""What every solver is asked: one frozen `Problem` in, one `mwplan.plans.schedule.Solution` out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np

from mwplan.common.errors import ArgumentError
from mwplan.plans.profiles import Profile
from mwplan.plans.schedule import Choice, Strategy, as_strategies, check_allowed
from mwplan.solvers.tuning import TUNING, Tuning

EVERY_STRATEGY = frozenset(Strategy)
_INT64 = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A profile, what schedules of it must keep to, and how long to look for one.

    **What is planned:** `profile`.
    **What must be kept:** `budget_bytes`, of temporaries on the device, None where every budget is asked for
    at once; `limit_ns`, of time, where the least bytes are asked for instead; `max_error`, the largest
    predicted relative error of any rebuilt cotangent or gradient; `allowed`, the strategies that may be used,
    at any depth, by themselves or by name (a frozen set once the problem is made);
    `max_recompute_depth`, how deep RECOMPUTE runs may stand inside one another: 0 for none, None for any.
    **Side conditions**, which only the integer program and `mwplan.solvers.brute_force` know: `pins` and
    `forbid`, for layers 1 to L the strategy or strategies they must or must not have in the outermost runs (a
    layer inside a RECOMPUTE run is RECOMPUTE, as in `mwplan.plans.ledger.strategies`); `host_bytes`, of the
    host's memory that OFFLOAD runs may use (`Profile.offloading` gives layers such runs; outermost ones
    alone); `max_distinct_runs`, a limit on different outermost runs: runs are the same when they do the same
    to equal layers and enter them alike.
    **How long to look:** `thin`, the relative loss of time aimed at where tables are thinned, 0 for exact;
    `time_limit_s`, `seed` and `workers`, of the integer program; `tuning`.
    **Raises:** `ArgumentError` on what cannot be used, pins that contradict `forbid` or `allowed` among it.

    ```python
    problem = Problem(profile=profile, budget_bytes=2**30, pins={1: "store"})
    solution = integer_program.solve(problem)
    ```
    """

    profile: Profile
    budget_bytes: int | None = None
    limit_ns: int | None = None
    max_error: float = 1e-4
    allowed: Choice = EVERY_STRATEGY
    max_recompute_depth: int | None = None
    pins: Mapping[int, Choice] = field(default_factory=dict, hash=False)
    forbid: Mapping[int, Choice] = field(default_factory=dict, hash=False)
    host_bytes: int = 0
    max_distinct_runs: int | None = None
    thin: float = 0.0
    time_limit_s: float = 30.0
    seed: int = 0
    workers: int = 2
    tuning: Tuning = TUNING

    def __post_init__(self) -> None:
        if not isinstance(self.profile, Profile):
            raise ArgumentError(f"`profile` must be a `Profile`, got {type(self.profile).__name__}")
        if self.budget_bytes is not None:
            check_integer("budget_bytes", self.budget_bytes, 1)
        if self.limit_ns is not None:
            check_integer("limit_ns", self.limit_ns, 0)
        _check_real("max_error", self.max_error, 0, "a number, at least 0")
        object.__setattr__(self, "max_error", float(self.max_error))
        object.__setattr__(self, "allowed", check_allowed(self.allowed))
        if self.max_recompute_depth is not None:
            check_integer("max_recompute_depth", self.max_recompute_depth, 0)
        check_integer("host_bytes", self.host_bytes, 0)
        if self.max_distinct_runs is not None:
            check_integer("max_distinct_runs", self.max_distinct_runs, 1)
        _check_real("thin", self.thin, 0, "a number from 0 up to 1: the relative loss of time allowed")
        if self.thin >= 1:
            raise ArgumentError(f"`thin={self.thin!r}` must be below 1: the relative loss of time allowed")
        _check_real("time_limit_s", self.time_limit_s, math.ulp(0.0), "a number of seconds above 0")
        check_integer("seed", self.seed, 0, 2**31 - 1)
        check_integer("workers", self.workers, 1)
        self._check_layers()

    def _check_layers(self) -> None:
        for name, choices in (("pins", self.pins), ("forbid", self.forbid)):
            if not isinstance(choices, Mapping):
                raise ArgumentError(f'`{name}={choices!r}` must say what layers are to have: {{1: "store"}}')
            for layer in choices:
                if isinstance(layer, bool) or not isinstance(layer, int):
                    raise ArgumentError(f"`{name}` names layer {layer!r}: layers are integers")
                if not 1 <= layer <= len(self.profile):
                    raise ArgumentError(
                        f"`{name}` names layer {layer!r}: layers count from 1 to {len(self.profile)}"
                    )
        for layer, left in self.layer_strategies.items():
            if not left:
                raise ArgumentError(
                    f"layer {layer} is left without a strategy: `pins`, `forbid` and `allowed` contradict "
                    "each other there"
                )

    @property
    def strategies(self) -> frozenset[Strategy]:
        """`allowed`, as the set that it is once the problem is made."""
        return cast("frozenset[Strategy]", self.allowed)

    @property
    def layer_strategies(self) -> dict[int, frozenset[Strategy]]:
        """What the layers that `pins` or `forbid` name may have outermost."""
        out: dict[int, frozenset[Strategy]] = {}
        for layer, choice in self.pins.items():
            out[layer] = self.strategies & as_strategies(choice, f"pins[{layer}]")
        for layer, choice in self.forbid.items():
            out[layer] = out.get(layer, self.strategies) - as_strategies(choice, f"forbid[{layer}]")
        return out

    @property
    def budget(self) -> int:
        """`budget_bytes`. Raises `ArgumentError` where there is none."""
        if self.budget_bytes is None:
            raise ArgumentError("`budget_bytes` is not given, and this solver plans for one budget")
        return int(self.budget_bytes)

    @property
    def offloads(self) -> bool:
        """Whether OFFLOAD runs may be used, and there are any."""
        may = self.host_bytes > 0 and Strategy.OFFLOAD in self.strategies
        return may and any(layer.offload for layer in self.profile.layers)

    @property
    def has_conditions(self) -> bool:
        """Whether there are side conditions."""
        return bool(self.pins or self.forbid or self.max_distinct_runs is not None or self.offloads)

    def within(self, budget_bytes: int | None) -> Problem:
        """The same with another budget."""
        return replace(self, budget_bytes=budget_bytes)

    def unconditional(self) -> Problem:
        """The same without side conditions, budget and limit of time: what a frontier is made of."""
        return replace(
            self, budget_bytes=None, limit_ns=None, pins={}, forbid={}, host_bytes=0, max_distinct_runs=None
        )

    def of(self, profile: Profile) -> Problem:
        """The same for another profile, such as a part of this one's; without side conditions."""
        return replace(self.unconditional(), profile=profile)


def check_integer(name: str, value: Any, least: int, most: int = _INT64) -> None:
    """Raises `ArgumentError` unless `value` is an integer from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not least <= value <= most:
        high = "2^63 - 1" if most == _INT64 else str(most)
        raise ArgumentError(f"`{name}={value!r}` must be an integer from {least} to {high}")


def _check_real(name: str, value: Any, least: float, what: str) -> None:
    """Raises `ArgumentError` unless `value` is a number, at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= least:
        raise ArgumentError(f"`{name}={value!r}` must be {what}")
