"""How an operation of a step is compiled: between which barriers, and in which layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax

from mwplan.common import platforms, trees
from mwplan.network.canonical import canonical
from mwplan.network.constants import tied
from mwplan.network.residuals import Residuals


@runtime_checkable
class Performer(Protocol):
    """Executes one operation. `sweep`, `layer`, `depth` as in `ledger.Event`."""

    def __call__(self, sweep: str, layer: int, depth: int, operation: Callable[..., Any], *args: Any) -> Any:
        """Returns `operation(*args)`."""


def compiled(sweep: str, layer: int, depth: int, operation: Callable[..., Any], *args: Any) -> Any:
    """The performer of a compiled step.

    Inputs are tied so that no part of an operation (a factorisation of the weights, say, or an array of zeros
    that it writes to) starts before its turn, outputs so that all of it is done before the next begins.
    """
    with named(sweep, layer):
        return trees.tie(tied(operation)(*args))


def named(sweep: str, layer: int) -> Any:
    """The scope of an operation's instructions in a compiled program, by which `mw.explain_peak` and
    profilers name it; the layers of a loop's body count from its own first."""
    return jax.named_scope(f"{sweep} {layer}")


def loose(sweep: str, layer: int, depth: int, operation: Callable[..., Any], *args: Any) -> Any:
    """As `compiled`, but residuals are not tied: XLA may compute them where they are used, from what is there
    anyway, instead of keeping them."""
    with named(sweep, layer):
        return trees.tie(tied(operation, Residuals)(*args), Residuals)


def looped(sweep: str, layer: int, depth: int, operation: Callable[..., Any], *args: Any) -> Any:
    """The performer of a compiled step inside a loop."""
    return compiled(sweep, layer, depth, canonical(operation), *args)


def looped_loose(sweep: str, layer: int, depth: int, operation: Callable[..., Any], *args: Any) -> Any:
    """As `loose`, where `looped` is needed."""
    return loose(sweep, layer, depth, canonical(operation), *args)


def alone(sweep: str, layer: int, depth: int, operation: Callable[..., Any], *args: Any) -> Any:
    """The performer without barriers: of an untied step, and of a loop's body that is one operation, whose
    turns follow one another anyway. Barriers would keep XLA from fusing the operation with what it reads and
    writes."""
    with named(sweep, layer):
        return operation(*args)


def looped_alone(sweep: str, layer: int, depth: int, operation: Callable[..., Any], *args: Any) -> Any:
    """As `alone`, where `looped` is needed."""
    with named(sweep, layer):
        return canonical(operation)(*args)


def in_loop(perform: Performer, *, single: bool) -> Performer:
    """What takes the place of `perform` in the body of a loop; `single`: where that is one operation."""
    if platforms.platform() == "cpu":
        perform = {compiled: looped, alone: looped_alone, loose: looped_loose}.get(perform, perform)
    if single:
        bare = {compiled: alone, looped: looped_alone, loose: alone, looped_loose: looped_alone}
        perform = bare.get(perform, perform)
    return perform
