"""What a command is about: a saved profile, or what MODULE:NAME gives, a chain or a loss."""

from __future__ import annotations

import importlib
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mwplan.app.waiting import phases, waiting
from mwplan.common.errors import ArgumentError

if TYPE_CHECKING:
    from mwplan.functions.cut import Cut
    from mwplan.network.chain import Chain
    from mwplan.plans.profiles import Profile

CODE = "MODULE:NAME, a function without arguments that returns (chain, x), or (loss, params, ...)"


@dataclass(frozen=True, kw_only=True)
class ChainSource:
    """A chain of layers and its input."""

    chain: Chain
    x: Any


@dataclass(frozen=True, kw_only=True)
class LossSource:
    """A loss, cut into pieces, and its arguments, parameters first."""

    cut: Cut
    args: tuple[Any, ...]


def network(source: str) -> ChainSource | LossSource:
    """What MODULE:NAME returns. Raises `ArgumentError`, as `mw.cut` too."""
    module, _, name = source.partition(":")
    if not name:
        raise ArgumentError(f"`{source}` is neither a .json file nor {CODE}")
    sys.path.insert(0, "")
    try:
        made = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ArgumentError(f"`{source}` cannot be imported: {error}") from error
    if callable(made):
        try:
            inspect.signature(made).bind()
        except TypeError as error:
            raise ArgumentError(
                f"`{source}` cannot be called without arguments ({error}): it must be {CODE}"
            ) from error
        made = made()
    from mwplan.network.chain import Chain

    if not isinstance(made, tuple) or len(made) < 2:
        what = f"a tuple of {len(made)}" if isinstance(made, tuple) else f"a {type(made).__name__}"
        raise ArgumentError(
            f"`{source}` returned {what}: it must return a pair (chain, x), or (loss, params, ...) with all "
            "that the loss takes"
        )
    first, *rest = made
    if isinstance(first, Chain):
        if len(rest) != 1:
            raise ArgumentError(
                f"`{source}` returned a chain and {len(rest)} more: it must return (chain, x)"
            )
        return ChainSource(chain=first, x=rest[0])
    if not callable(first):
        raise ArgumentError(
            f"`{source}` returned ({type(first).__name__}, ...): the first must be a chain, "
            "`mw.Chain([...])`, or a loss that is called with the rest"
        )
    from mwplan.functions.cut import cut

    with waiting("cutting the loss into pieces"):
        return LossSource(cut=cut(first, *rest), args=tuple(rest))


def profile(source: str, device: str | None = None) -> Profile:
    """A saved profile, or that of what MODULE:NAME gives, measured or estimated for `device`."""
    from mwplan.plans.profiles import Profile

    if source.endswith(".json") or Path(source).is_file():
        if not Path(source).is_file():
            raise ArgumentError(f"`{source}` does not exist: save a profile there with `mwplan profile`")
        if device is not None:
            raise ArgumentError(f"`{source}` is a saved profile already: leave `--device {device}` out")
        return Profile.from_json(Path(source).read_text())
    from mwplan.functions.fit_function import profile_pieces
    from mwplan.profiling import estimating, measure

    found = network(source)
    with phases() as advance:

        def tell(done: int, total: int, what: str) -> None:
            advance(what if device is None else "estimating layers", done, total)

        if isinstance(found, LossSource):
            return profile_pieces(found.cut, *found.args, device=device, progress=tell)
        if device is not None:
            return estimating.estimate(found.chain, found.x, device=device, progress=tell)
        return measure.profile(found.chain, found.x, progress=tell)
