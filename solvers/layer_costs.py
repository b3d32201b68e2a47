"""A chain's bytes, times and usable options as arrays: what candidate runs are made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mwplan.plans.profiles import InvertOption
from mwplan.plans.schedule import Strategy
from mwplan.solvers.pareto import Ints
from mwplan.solvers.predictions import moonwalk_strategy
from mwplan.solvers.problem import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """How labels are compared: times that differ by less than a factor `1 + loss` count as equally fast;
    `optimistic`: they are then rounded down, for a bound. `by_strategy`: labels of other strategies, layer by
    layer, are not compared."""

    loss: float = 0.0
    optimistic: bool = False
    by_strategy: bool = False

    def compared(self, time: Ints) -> tuple[Any, Ints]:
        """What labels of these times are compared by, and the times that they go on with."""
        if not self.loss:
            return time, time
        step = np.log1p(self.loss)
        steps = np.floor(np.log(np.maximum(time, 1)) / step)
        if self.optimistic:
            time = np.minimum(time, np.exp(steps * step).astype(np.int64))
        return steps, time


class LayerCosts:
    """The layers of a problem's chain.

    Arrays by position, 0 to L: `activation`, `cotangent`, `sweep`, bytes; `forward_sum`: `[j] - [s]` is the
    time of one forward of the layers `s+1..j`. By layer, index 0 being layer 1: `forward_ns`; `workspace` of
    the forward; `allowed`, the strategies; `moonwalk` and `invert`, the options that may be used. `whole`:
    how many layers the chain has of which the profile is a part.
    """

    def __init__(self, problem: Problem, whole: int | None = None) -> None:
        profile = problem.profile
        self.problem, self.profile, self.size = problem, profile, len(profile)
        self.max_error, self.tuning = problem.max_error, problem.tuning
        self.whole = whole or self.size
        narrower = problem.layer_strategies
        self.allowed = [narrower.get(at + 1, problem.strategies) for at in range(self.size)]
        self.activation = np.array(profile.activation_bytes, dtype=np.int64)
        self.cotangent = np.array(profile.cotangent_bytes, dtype=np.int64)
        self.sweep = np.array(profile.sweep_cotangent_bytes, dtype=np.int64)
        self.forward_ns = np.array([layer.forward_ns for layer in profile.layers], dtype=np.int64)
        self.forward_sum = np.concatenate([[0], np.cumsum(self.forward_ns)]).astype(np.int64)
        self.workspace = np.array([x.forward_workspace_bytes for x in profile.layers], dtype=np.int64)
        self.moonwalk = [self._usable(at, layer.moonwalk) for at, layer in enumerate(profile.layers)]
        self.invert = [self._usable(at, layer.invert) for at, layer in enumerate(profile.layers)]

    def _usable(self, at: int, options: Iterable[Any]) -> list[Any]:
        """Those of a layer's MOONWALK or INVERT options that may be used at all."""
        out = []
        for o in options:
            strategy = Strategy.INVERT if isinstance(o, InvertOption) else moonwalk_strategy(o)
            errors = [o.growth, o.local_error]
            if isinstance(o, InvertOption):
                errors += [o.sensitivity, o.gradient_sensitivity, o.kink]
            if strategy in self.allowed[at] and np.isfinite(errors).all():
                out.append(o)
        return [o for o in out if not self.max_error < o.local_error]

    def classes(self) -> list[int]:
        """`classes[l]`, equal for positions whose layer and boundary cost the same; `classes[0]` is the
        input's."""
        seen: dict[Any, int] = {}
        p = self.profile
        out = []
        for at in range(self.size + 1):
            layer = p.layers[at - 1].costs() if at else None
            key = (layer, p.activation_bytes[at], p.cotangent_bytes[at], p.sweep_cotangent_bytes[at])
            out.append(seen.setdefault(key, len(seen)))
        return out
