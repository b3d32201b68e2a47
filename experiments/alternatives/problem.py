"""A network to differentiate, and a candidate: one function that does."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

import mwplan as mw
from experiments import zoo
from mwplan import planning
from mwplan.common import trees
from mwplan.common.errors import MwplanError
from mwplan.network.canonical import canonical
from mwplan.plans.profiles import Profile
from mwplan.plans.schedule import Schedule, Strategy
from mwplan.solvers import problem as solvers

PyTree = Any
Step = Callable[[mw.Chain, Any, Any], tuple[Any, Any]]
Network = Callable[[mw.Chain, Any], Any]
RECOMPUTATION = frozenset({Strategy.STORE, Strategy.RECOMPUTE})
#: Schedules of stacked chains with more different loops than these are not compiled.
MOST_LOOPS = 150


class NotApplicableError(MwplanError):
    """A method does not apply to a chain; the message says why."""


@dataclass(frozen=True)
class Problem:
    """One network with what planning needs: `max_error` for rebuilt cotangents, `thin` as in `mw.frontier`,
    timed runs of each operation of the profile.

    Schedules of chains with more than `unroll` innermost layers are run stacked.
    """

    chain: mw.Chain
    x: Any
    labels: Any
    loss: Callable[[Any, Any], Any]
    max_error: float = 1e-4
    thin: float = 0.0
    repeats: int = 5
    unroll: int = zoo.UNROLL

    @functools.cached_property
    def profile(self) -> Profile:
        """Measured on this device when first asked for."""
        return mw.profile(self.chain, self.x, repeats=self.repeats)

    @property
    def fixed_bytes(self) -> int:
        """Parameters, gradients and input."""
        return 2 * trees.nbytes(trees.parameters(self.chain)) + trees.nbytes(self.x)

    @property
    def most_loops(self) -> float:
        """How many different loops a schedule may have: infinite for chains that are run unrolled."""
        return math.inf if len(flat(self.chain)) <= self.unroll else MOST_LOOPS

    @functools.cached_property
    def stacked(self) -> mw.Chain:
        """The chain with repeated layers stacked."""
        return mw.stack(self.chain, self.x)

    @functools.cached_property
    def flat(self) -> mw.Chain:
        """The innermost layers, with repeated blocks stacked."""
        return mw.stack(mw.Chain(flat(self.chain)), self.x)

    def frontier(self, allowed: Iterable[Strategy] = frozenset(Strategy)) -> mw.Frontier:
        """The frontier, solved once for each set of strategies; that of a long chain thinned even where
        `thin` is 0, or it would take hours."""
        return cached_frontier(self.profile, self.max_error, frozenset(allowed), self._thin)

    @property
    def asked(self) -> solvers.Problem:
        """What baselines are asked."""
        return solvers.Problem(profile=self.profile, max_error=self.max_error)

    @functools.cached_property
    def baselines(self) -> list[Schedule]:
        """The schedules of `planning.baseline_schedules`, the same at every budget."""
        return planning.baseline_schedules(
            self.profile, max_error=self.max_error, allowed=planning.EVERY_STRATEGY
        )

    @functools.cached_property
    def _thin(self) -> float:
        return max(self.thin, planning.default_thin(self.profile))


@functools.lru_cache(maxsize=64)
def cached_frontier(
    profile: Profile, max_error: float, allowed: frozenset[Strategy], thin: float
) -> mw.Frontier:
    return mw.frontier(profile, max_error=max_error, allowed=allowed, thin=thin)


@dataclass(frozen=True)
class Candidate:
    """A method made for one chain and budget: the network to differentiate, and its schedule if it has one.

    `chain`: the problem's chain, or the stacked one; the network takes its parameters. Two candidates with
    equal `key` are the same program. `loops`: whether the network is a loop. Its convolutions then need
    another layout on CPUs than JAX gives them, the one that schedules of ours use.
    """

    network: Network
    chain: mw.Chain
    schedule: Schedule | None
    key: Any
    loops: bool = False

    def step(self, loss: Callable[[Any, Any], Any]) -> Step:
        """`(chain, x, labels) -> (loss, gradients)`."""

        def step(chain: mw.Chain, x: Any, labels: Any) -> tuple[Any, Any]:
            return jax.value_and_grad(lambda net: loss(self.network(net, x), labels))(chain)

        return canonical(step) if self.loops and jax.default_backend() == "cpu" else step


def flat(layers: Iterable[Any]) -> tuple[Any, ...]:
    """The layers, `Sequential`s taken apart."""
    return tuple(
        part for one in layers for part in (one.layers if isinstance(one, mw.layers.Sequential) else (one,))
    )


def through(layers: Sequence[Any], x: Any) -> Any:
    return functools.reduce(lambda value, one: one(value), layers, x)
