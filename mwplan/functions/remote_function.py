"""A function's plan for a device that is not here: what `mw.fit_function(..., device=...)` returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from mwplan.common import serial
from mwplan.common.errors import TargetError
from mwplan.execution import execute
from mwplan.fitting.remote import RemoteFit
from mwplan.functions import cut as cutting
from mwplan.functions.flat import Gradient, split
from mwplan.plans.schedule import Schedule

PyTree = Any
SCHEMA = 1
NAMES = ("params", "args", "captured")


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFunction:
    """A plan of a function's pieces that keeps its budget on a device that is not here, by the word of that
    device's compiler.

    **Attributes:** `fit`, the plan and what was compiled, as `mw.fit` describes it; `has_aux`,
    `keep_checkpoints`, `most`, as the function was cut; `looped`, whether pieces that repeat are loops.

    On the device, `fitted.compile(loss, params, *args)` gives the step. `to_json`, `from_json` carry the plan
    there.

    >>> loss = lambda params, x: jnp.mean(jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]) ** 2)
    >>> shape = jax.ShapeDtypeStruct((64, 64), jnp.float32)  # shapes are enough
    >>> try:
    ...     fitted = mw.fit_function(loss, {"a": shape, "b": shape}, shape, budget="1MiB", device="h200")
    ...     assert mw.RemoteFunction.from_json(fitted.to_json()) == fitted
    ... except mw.CompilerMissingError as missing:
    ...     assert "pip install" in str(missing)
    """

    fit: RemoteFit
    has_aux: bool
    keep_checkpoints: bool
    most: int
    looped: bool

    @property
    def schedule(self) -> Schedule:
        """The plan of the pieces."""
        return self.fit.schedule

    @property
    def temporary_bytes(self) -> int:
        """What the compiled program needs beside arguments and results."""
        return self.fit.temporary_bytes

    def step(self, *args: Any) -> NoReturn:
        """Raises `TargetError`: the step was compiled for another device."""
        raise TargetError(
            f"this step was compiled for {self.fit.target}, which is not attached here. Save the plan "
            "(`fitted.to_json()`), load it there (`mw.RemoteFunction.from_json(text)`) and call "
            "`fitted.compile(loss, params, *args)`"
        )

    def compile(
        self, loss: Callable[..., Any], params: PyTree, *args: Any
    ) -> Callable[..., tuple[tuple[Any, execute.Report], PyTree]]:
        """The step, compiled on the device that it was planned for: `step(params, *args) -> ((value, report),
        grads)`, as `FittedFunction.step`.

        **Raises:** as `RemoteFit.compile`; `ScheduleMismatchError` where the function's pieces are others
        than those that were planned."""
        self.fit.check_device()
        cut = cutting.cut(
            loss, params, *args,
            has_aux=self.has_aux, keep_checkpoints=self.keep_checkpoints, most=self.most,
        ).checked(params, *args)  # fmt: skip
        cut = cut.looped() if self.looped else cut
        flat = split(cut, params, args)
        execute.check_match(self.schedule, cut.build_flat(*flat)[0])
        made = self.fit.compiled(Gradient(cut, self.has_aux), flat, NAMES)

        def step(params: PyTree, *args: Any) -> tuple[tuple[Any, execute.Report], PyTree]:
            out: tuple[tuple[Any, execute.Report], PyTree] = made(*split(cut, params, args))
            return out

        return step

    def to_json(self) -> str:
        """This plan as JSON with a schema number."""
        return serial.dump(self, kind="function's fit for a device", schema=SCHEMA)

    @classmethod
    def from_json(cls, text: str) -> RemoteFunction:
        """Reads what `to_json` wrote. Raises `FileFormatError` on anything else."""
        return serial.load(text, cls, kind="function's fit for a device", schema=SCHEMA)

    def __str__(self) -> str:
        return str(self.fit).replace(" layers ", " pieces ", 1)
