"""Every error that mwplan raises on purpose. Each names the argument, the value got, why, and what to do."""

from __future__ import annotations


class MwplanError(Exception):
    """Base of all errors of this package.

    >>> try:
    ...     mw.Chain([])
    ... except mw.MwplanError as error:
    ...     print(type(error).__name__)
    ChainError
    """


class ArgumentError(MwplanError, ValueError):
    """An argument that cannot be used: the message names it, the value got and what to do.

    >>> mw.temporaries("no program")
    Traceback (most recent call last):
    mwplan.common.errors.ArgumentError: ...
    """


class ChainError(MwplanError, ValueError):
    """A chain that is empty, holds something that is not callable, or does not accept its input.

    >>> mw.Chain([3])
    Traceback (most recent call last):
    mwplan.common.errors.ChainError: `layers[0]` is 3, which is not callable...
    """


class ScheduleMismatchError(MwplanError, ValueError):
    """A schedule used with another chain, input or profile than the one it was made for.

    >>> store = mw.Run(kind=mw.RunKind.STORE, start=0, stop=1, options=("vjp",))
    >>> mw.apply(mw.Schedule(runs=(store,)), mw.Chain([jnp.sin, jnp.cos]), jnp.ones(3))
    Traceback (most recent call last):
    mwplan.common.errors.ScheduleMismatchError: the schedule covers 1 layers and the chain has 2...
    """


class NotSubmersiveError(MwplanError, ValueError):
    """A vijp was asked of a layer that has no rule for it, or whose weights do not allow it.

    >>> mw.vijp(mw.layers.ReLU(), jnp.ones(4))
    Traceback (most recent call last):
    mwplan.common.errors.NotSubmersiveError: `layer` (ReLU) has no vijp at this input...
    """


class SecondDerivativeError(MwplanError, NotImplementedError):
    """A planned function was differentiated twice (in forward mode JAX itself refuses, with a
    `TypeError`).

    >>> store = mw.Run(kind=mw.RunKind.STORE, start=0, stop=1, options=("vjp",))
    >>> sine = lambda x: mw.apply(mw.Schedule(runs=(store,)), mw.Chain([jnp.sin]), x)
    >>> jax.grad(jax.grad(sine))(1.0)
    Traceback (most recent call last):
    mwplan.common.errors.SecondDerivativeError: a planned step was differentiated twice...
    """


class FileFormatError(MwplanError, ValueError):
    """A saved profile, schedule or result that cannot be read as one.

    >>> mw.Schedule.from_json("{}")
    Traceback (most recent call last):
    mwplan.common.errors.FileFormatError: expected a saved schedule, got None
    """


class InfeasibleError(MwplanError):
    """No schedule fits the budget (or the side conditions).

    **Attributes:** `budget_bytes`, what was asked for; `least_bytes`, the least total that any schedule of
    this profile needs under the same side conditions, or `None` where none exists at any budget;
    `binding`, the event that needs it, in words.

    >>> profile = mw.estimate(mw.Chain([jnp.tanh] * 8), jnp.ones((256, 64)), device="h100")
    >>> try:
    ...     mw.plan(profile, budget="1KiB")
    ... except mw.InfeasibleError as error:
    ...     print(error.budget_bytes, error.least_bytes == mw.frontier(profile).least_bytes)
    1024 True
    """

    def __init__(
        self,
        message: str,
        *,
        budget_bytes: int | None = None,
        least_bytes: int | None = None,
        binding: str = "",
    ) -> None:
        super().__init__(message)
        self.budget_bytes = budget_bytes
        self.least_bytes = least_bytes
        self.binding = binding


class TargetError(MwplanError):
    """A program that cannot be compiled for the device asked for; the message says what the compiler said.

    >>> issubclass(mw.CompilerMissingError, mw.TargetError), issubclass(mw.TargetMemoryError, mw.TargetError)
    (True, True)
    """


class CompilerMissingError(TargetError, ImportError):
    """A device whose compiler is not installed here, or does not start: the message says what to install.

    >>> try:
    ...     place = mw.targets.target_of("v5e").place()
    ... except mw.CompilerMissingError as error:
    ...     assert "JAX_PLATFORMS=cpu" in str(error)
    """


class TargetMemoryError(TargetError):
    """A program that needs more memory than the device asked for has.

    **Attributes:** `needed_bytes`, as the compiler says: of the whole program, or of its temporaries where
    these alone are too many; None where it does not say.

    >>> mw.TargetMemoryError("it does not fit", needed_bytes=20 << 30).needed_bytes >> 30
    20
    """

    def __init__(self, message: str, *, needed_bytes: int | None = None) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes
