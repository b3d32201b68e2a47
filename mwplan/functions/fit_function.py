"""`mw.fit_function`: from a function and a budget to a compiled gradient step that keeps it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from mwplan import planning
from mwplan.common import trees
from mwplan.common.errors import ArgumentError, InfeasibleError
from mwplan.common.sizes import parse_bytes, show_bytes
from mwplan.execution import execute
from mwplan.execution.updates import Optimizer, state_bytes
from mwplan.fitting import remote
from mwplan.fitting.fitted import Attempt, Fitted
from mwplan.fitting.fitting import check_untimed, fit_step
from mwplan.functions import cut as cutting
from mwplan.functions.cut import Cut
from mwplan.functions.flat import Gradient, copied_bytes, fixed_bytes, plain, split
from mwplan.functions.policy import Policy
from mwplan.functions.remote_function import RemoteFunction
from mwplan.network import sharding
from mwplan.network.chain import fingerprint
from mwplan.network.kept import PREFIX as KEPT
from mwplan.plans.profiles import Profile
from mwplan.plans.schedule import Choice, Schedule, check_allowed
from mwplan.profiling import measure
from mwplan.profiling.estimating import estimate
from mwplan.profiling.progress import Progress
from mwplan.targets.devices import Device
from mwplan.targets.target import target_of

PyTree = Any
#: The share of the budget that copies of stacked parameters may take, if not asked for.
COPIED = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedFunction:
    """A compiled gradient step of a function, within its budget.

    **Attributes:** `cut`, the function's pieces; `fitted`, the step as `mw.fit` describes it, of the flat
    arguments; `has_aux`.

    >>> loss = lambda params, x: jnp.mean(jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]) ** 2)
    >>> params, x = {"a": jnp.eye(64), "b": jnp.eye(64)}, jnp.ones((256, 64))
    >>> fitted = mw.fit_function(loss, params, x, budget="1MiB")
    >>> fitted.temporary_bytes < 1 << 20
    True
    """

    cut: Cut
    fitted: Fitted
    has_aux: bool

    @property
    def schedule(self) -> Schedule:
        """The plan of the pieces."""
        return self.fitted.schedule

    @property
    def profile(self) -> Profile:
        """What the pieces cost."""
        return self.fitted.profile

    @property
    def temporary_bytes(self) -> int:
        """What the compiled program needs beside arguments and results."""
        return self.fitted.temporary_bytes

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """Everything that was compiled, the chosen one last."""
        return self.fitted.attempts

    def step(self, params: PyTree, *args: Any) -> tuple[tuple[Any, execute.Report], PyTree]:
        """`((value, report), grads)`: what the function returned, the runs' error report, and gradients like
        `params` (None for what is no array of floating-point numbers). Raises `ArgumentError` for arguments
        of other shapes than those it was compiled for, and within `jax.jit`, `jax.vmap` or a loop, where
        `value_and_grad` belongs."""
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((params, args))):
            raise ArgumentError(
                "`fitted.step` is a compiled program, and was called with arrays that JAX is tracing (within "
                "`jax.jit`, `jax.grad`, `jax.vmap`, `jax.lax.scan`): use `fitted.value_and_grad` there, and "
                "compile the whole with `mw.jit`"
            )
        out: tuple[tuple[Any, execute.Report], PyTree] = self.fitted.step(*split(self.cut, params, args))
        return out

    def value_and_grad(self, params: PyTree, *args: Any) -> tuple[tuple[Any, execute.Report], PyTree]:
        """As `step`, not compiled: to be part of a larger function, which is compiled with `mw.jit`."""
        gradient = Gradient(self.cut, self.has_aux)
        step = gradient(self.schedule, arrangement=self.fitted.arrangement)
        out: tuple[tuple[Any, execute.Report], PyTree] = step(*split(self.cut, params, args))
        return out

    def report(self, to: str | Path, *, plans: int = 24, title: str = "") -> Path:
        """Writes a page to look at: `Fitted.report`, of the pieces."""
        return self.fitted.report(to, plans=plans, title=title or f"Memory plan of {len(self.cut)} pieces")

    def policy(self) -> Policy:
        """The plan in `jax.checkpoint`'s words: printed, what is recomputed and saved; called, the function
        with these checkpoints, to be differentiated, scanned over and sharded like any other."""
        return Policy(cut=self.cut, schedule=self.schedule, has_aux=self.has_aux)

    def __str__(self) -> str:
        first, *rest = str(self.fitted).splitlines()[:-1]
        call = "call `(value, report), grads = fitted.step(params, *args)`"
        last = f"  {call}; `print(fitted.cut)` shows the pieces"
        return "\n".join([first.replace(" layers ", " pieces "), *rest, last])


def fit_function(
    loss: Callable[..., Any],
    params: PyTree,
    *args: Any,
    budget: int | str,
    has_aux: bool = False,
    keep_checkpoints: bool = False,
    most: int = cutting.MOST,
    loops: bool | None = None,
    profile: Profile | None = None,
    max_error: float = 1e-4,
    allowed: Choice = planning.EVERY_STRATEGY,
    max_attempts: int = 18,
    tune: int = 0,
    say: Callable[[str], None] = lambda text: None,
    device: str | Device | None = None,
    optimizer: Optimizer | None = None,
) -> FittedFunction | RemoteFunction:
    """The gradient step of a function as it is, compiled within a budget.

    The function is traced and cut into pieces where little is alive (`mw.cut`); the pieces are profiled,
    planned and compiled as the layers of a chain (`mw.fit`). Pieces that compute what layers of
    `mwplan.layers` compute have their vijps, fragments and inverses (`docs/functions.md`; `mw.recognises`
    teaches more).

    **Arguments:** `loss(params, *args)`, as for `jax.value_and_grad`: a real scalar, with `has_aux` a pair of
    it and anything; `params`, a pytree: the gradient is taken of its floating-point arrays that the loss
    depends on; of the others it is zeros, and costs no time; integers, keys and what is no array have none.
    `args`, arrays that the step will be given; what is no array among them is part of the program. Arrays may
    lie on several devices (`NamedSharding`): the budget is that of one of them, and what is profiled is its
    share of `args`, with whole parameters. `budget`, bytes of the whole step or a text such as "2GiB";
    `keep_checkpoints`, `most`, as `mw.cut`; `loops`, whether pieces that repeat are compiled once, as a loop
    over stacked parameters (a copy of them and of their gradients in the step; if None, where that is at most
    a twentieth of the budget; loops of the function itself need no copy); `profile`, of the chain of pieces
    (measured if None); the rest as `mw.fit`, `device` too: for another than the attached one, `params` and
    `args` may be shapes.
    **Returns:** a `FittedFunction`; for another `device` a `RemoteFunction`, whose step runs there alone.
    **Raises:** as `mw.cut`; `InfeasibleError` where no schedule fits the budget; as `mw.fit`.

    >>> loss = lambda params, x: jnp.mean(jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]) ** 2)
    >>> params, x = {"a": jnp.eye(64), "b": jnp.eye(64)}, jnp.ones((256, 64))
    >>> fitted = mw.fit_function(loss, params, x, budget="1MiB")
    >>> (value, report), grads = fitted.step(params, x)
    >>> bool(jnp.allclose(value, loss(params, x))), grads["a"].shape
    (True, (64, 64))
    """
    found = cutting.cut(loss, params, *args, has_aux=has_aux, keep_checkpoints=keep_checkpoints, most=most)
    _check_concrete(params, args, shapes=device is not None)
    if device is not None:
        check_untimed(tune, device)
        target_of(device).place()
    shard, here = _of_one_device(found, loss, params, args, has_aux, keep_checkpoints, most)
    shard = shard if trees.only_shapes(here) else shard.checked(*here)
    found = found.cut_like(shard)
    looped = found.looped()
    copies = 2 * looped.plan.copied_bytes(found.flow.traced.avals)
    loops = copies <= COPIED * parse_bytes(budget) if loops is None else loops
    if loops:
        found, shard = looped, shard.looped()
    flat = split(found, params, args)
    say(f"cut into {len(found)} pieces of {len({one.program for one in found.plan.pieces})} kinds")
    if profile is None:
        profile = _for_all(profile_pieces(shard, *here, device=device), shard, found, flat)
    gradient = Gradient(found, has_aux)
    profile = dataclasses.replace(profile, fixed_bytes=fixed_bytes(found, flat), optimizer_bytes=0)
    profile = profile.with_optimizer(0 if optimizer is None else state_bytes(optimizer, params))
    asked: dict[str, Any] = {"budget": budget, "max_error": max_error, "allowed": check_allowed(allowed)}
    asked |= {"max_attempts": max_attempts, "say": say}
    backpropagation = plain(found, loss, has_aux)
    with _naming_pieces(found):
        if device is not None:
            fit = remote.fit_step(gradient, backpropagation, flat, profile, device=device, **asked)
            return RemoteFunction(
                fit=fit, has_aux=has_aux, keep_checkpoints=keep_checkpoints, most=most, looped=loops
            )
        fitted = fit_step(gradient, flat, profile, tune=tune, plain=backpropagation, **asked)
    return FittedFunction(cut=found, fitted=fitted, has_aux=has_aux)


def profile_pieces(
    found: Cut,
    params: PyTree,
    *args: Any,
    device: str | Device | None = None,
    progress: Progress | bool | None = None,
) -> Profile:
    """What the pieces of a function cost, at the arguments that it was cut for: measured here, or estimated
    for a `device`. Raises and costs: as `mw.profile` and `mw.estimate`; `ArgumentError` for shapes, which are
    enough for a `device`."""
    _check_concrete(params, args, shapes=device is not None)
    flat = split(found, params, args)
    chain, x, _ = found.build_flat(*flat)
    shares = found.plan.shares
    if device is None:
        profile = measure.profile(chain, x, wrt_input=shares, progress=progress)
    else:
        profile = estimate(chain, x, device=device, wrt_input=shares, progress=progress)
    return dataclasses.replace(
        profile,
        fixed_bytes=fixed_bytes(found, flat),
        carried_bytes=profile.carried_bytes + copied_bytes(found, flat),
    )


def _of_one_device(
    found: Cut,
    loss: Callable[..., Any],
    params: PyTree,
    args: tuple[Any, ...],
    has_aux: bool,
    keep_checkpoints: bool,
    most: int,
) -> tuple[Cut, tuple[Any, ...]]:
    """The function cut for what one device has of the arguments, and these: whole parameters and its share
    of the others. As it is where all are on one device."""
    if not any(map(sharding.spread, jax.tree.leaves((params, args)))):
        return found, (params, *args)
    params, args = sharding.gathered(params), sharding.local(args)
    try:
        found = cutting.cut(
            loss, params, *args, has_aux=has_aux, keep_checkpoints=keep_checkpoints, most=most
        )
    except (TypeError, ValueError) as error:
        shapes = ", ".join(str(trees.struct(leaf)) for leaf in jax.tree.leaves(args))
        raise ArgumentError(
            f"`args` lie on several devices, and `loss` does not take one device's share of them ({shapes}), "
            f"which must be profiled: {error}\nSpread all arrays of the batch alike, or fit the loss of one "
            "device's share and call `fitted.value_and_grad` within `jax.shard_map`"
        ) from error
    return found, (params, *args)


def _for_all(profile: Profile, shard: Cut, found: Cut, flat: Any) -> Profile:
    """The profile of one device's share as that of the chain for the whole arguments. Without sets of kept
    values, whose names speak of shapes."""
    if shard.flow is found.flow:
        return profile
    layers = tuple(
        dataclasses.replace(one, store=tuple(way for way in one.store if not way.name.startswith(KEPT)))
        for one in profile.layers
    )
    return dataclasses.replace(profile, layers=layers, fingerprint=fingerprint(found.build_flat(*flat)[0]))


def _check_concrete(params: PyTree, args: tuple[Any, ...], *, shapes: bool = False) -> None:
    """Raises `ArgumentError` for traced arrays; for `shapes` too, unless they are enough."""
    wrong = jax.core.Tracer if shapes else (jax.core.Tracer, jax.ShapeDtypeStruct)
    if any(isinstance(leaf, wrong) for leaf in jax.tree.leaves((params, args))):
        raise ArgumentError(
            "`params` and `args` must be concrete arrays, to be measured: not shapes (which are enough with "
            "`device=`), nor traced by `jax.jit`"
        )


@contextlib.contextmanager
def _naming_pieces(cut: Cut) -> Iterator[None]:
    """A context in which an `InfeasibleError` also says where the pieces need most."""
    try:
        yield
    except InfeasibleError as error:
        raise InfeasibleError(
            f"{error}\n{_narrowest(cut)}",
            budget_bytes=error.budget_bytes,
            least_bytes=error.least_bytes,
            binding=error.binding,
        ) from None


def _narrowest(cut: Cut) -> str:
    """Where the pieces need most, in words."""
    pieces = cut.plan.pieces
    piece = max(pieces, key=lambda one: one.made_bytes)
    alive = cut.flow.alive_bytes(piece.start, piece.stop)
    at = int(alive.argmax())
    step = cut.flow.steps[piece.start + max(at - 1, 0)]
    within = f"`{step.primitive.name}`" + (f" in {step.scope}" if step.scope else "")
    most = f"{show_bytes(int(alive[at]))} are alive within it after {within}, the most"
    if len(pieces) == 1:
        return (
            "The function could not be cut: nowhere is less alive than both sides make, or there is but one "
            "operation; "
            f"{most}. What can be planned is what is kept of it"
        )
    return (
        f"The function was cut into {len(cut)} pieces; number {pieces.index(piece) + 1} ({piece.label}) "
        "makes most, "
        f"{show_bytes(piece.made_bytes)}; {most}: `print(mw.cut(loss, params, *args))` shows all"
    )
