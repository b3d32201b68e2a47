"""What is alive at the peak of a compiled step, and where it comes from."""

from __future__ import annotations

import collections
import re
from dataclasses import dataclass
from typing import Any

from mwplan.common.errors import ArgumentError
from mwplan.common.sizes import show_bytes
from mwplan.plans.schedule import Schedule
from mwplan.targets import program, reports
from mwplan.targets.devices import Device
from mwplan.targets.hlo import Computation, Instruction, Module
from mwplan.targets.reports import Buffer, Lives
from mwplan.targets.target import Target, target_of

#: Bytes over elements from which padding is named.
PADDED = 1.2
#: The share of a program's moments that a buffer waits for its first reader from which that is named.
WAITS = 0.1
_MOVES = {"copy", "transpose", "reshape", "bitcast", "bitcast-convert"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Alive:
    """A buffer that is alive at the peak.

    **Attributes:** `nbytes`; `type`, such as "f32[8,512]"; `instruction` that wrote it; `scope`, the
    operation of the source, with the scopes around it; `sweep`: "forward", "backward", or one of mwplan's
    with its layer, such as "advance 3"; `role`: "kept for the backward pass", "cotangent", "workspace of a
    library", "copy in another layout", "other"; `surprises`, in words."""

    nbytes: int
    type: str
    instruction: str
    scope: str
    sweep: str
    role: str
    surprises: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The peak of a compiled program's temporaries.

    **Attributes:** `target`; `temporary_bytes`, what the program takes beside arguments and results;
    `alive_bytes`, of what is alive at the peak; `at` and `scope`, the instruction that runs then; `buffers`,
    the largest first; `exact`, whether by the compiler's reports (else by the order of its text);
    `expected_bytes` and `binding`, the ledger's word, where a schedule was given.

    >>> peak = mw.explain_peak(lambda x: jnp.sort(x) @ x.T, jnp.ones((256, 256)))
    >>> peak.alive_bytes >= 256 * 256 * 4, peak.exact
    (True, True)
    """

    target: str
    temporary_bytes: int
    alive_bytes: int
    at: str
    scope: str
    buffers: tuple[Alive, ...]
    exact: bool
    expected_bytes: int | None = None
    binding: str = ""

    @property
    def fragmentation_bytes(self) -> int:
        """What the allocator takes more than is alive; 0 where lives are guessed."""
        return max(0, self.temporary_bytes - self.alive_bytes) if self.exact else 0

    def by_role(self) -> dict[str, int]:
        """Bytes of each role, the largest first."""
        found: collections.Counter[str] = collections.Counter()
        for one in self.buffers:
            found[one.role] += one.nbytes
        return dict(found.most_common())

    @property
    def surprises(self) -> tuple[Alive, ...]:
        """The buffers of which something is worth a word."""
        return tuple(one for one in self.buffers if one.surprises)

    def __str__(self) -> str:
        return described(self)


def explain_peak(
    function: Any,
    *args: Any,
    target: str | Device | Target | None = None,
    schedule: Schedule | None = None,
    least_bytes: int = 1 << 10,
) -> Peak:
    """What is alive at the peak of a step, largest first, with the layer, sweep and operation that it comes
    from.

    **Arguments:** `function` and `args`, a function or what `jax.jit` made of one, with arrays or shapes: it
    is compiled for `target`, the attached device by default; plain `jax.value_and_grad` programs, steps of
    `mw.value_and_grad`, anything. Or, with no `args`, a compiled program: what
    `jax.jit(f).lower(...).compile()` gives, a `mw.targets.Compiled`, or what `mw.fit` gives. `schedule`, the
    step's, for what the ledger expects beside it; `least_bytes`: smaller buffers are left out.
    **Returns:** a `Peak`; print it. Of a function it is exact: the compiler's own assignment of buffers. Of a
    compiled program, whose assignment is no longer known, lives are read from the order of its instructions,
    and places are not known. Where the program needs more memory than the target has, and its compiler says
    so (TPUs), the peak says for what.
    **Raises:** `ArgumentError` for what is neither; as `mw.targets.compile`.
    **Cost:** a compilation.

    >>> def loss(weights, x):
    ...     for w in weights:
    ...         x = jnp.tanh(x @ w)
    ...     return jnp.sum(x)
    >>> weights, x = [jax.ShapeDtypeStruct((64, 64), jnp.float32)] * 4, jnp.ones((512, 64))
    >>> peak = mw.explain_peak(jax.value_and_grad(loss), weights, x)
    >>> list(peak.by_role())[0]
    'kept for the backward pass'
    """
    one = target_of(target)
    known = getattr(function, "schedule", None)
    schedule = known if schedule is None and isinstance(known, Schedule) else schedule
    if args:
        lowered = program.lower(function, args, one)
        compiled, lives = reports.compiled_with_reports(
            lambda more: program.built(lowered, {**one.compiler_options, **more}, one)
        )
        name = one.name
    else:
        compiled, lives, name = _compiled(function), None, one.name
        name = (
            getattr(function, "target", name) if isinstance(getattr(function, "target", name), str) else name
        )
    if lives is None:
        stats = compiled.memory_analysis()
        lives = reports.from_text(compiled.as_text(), int(stats.temp_size_in_bytes))
    return _peak(lives, name, schedule, least_bytes)


def _compiled(given: Any) -> Any:
    """JAX's compiled program in what was given."""
    for one in (given, getattr(given, "executable", None), getattr(given, "step", None)):
        if hasattr(one, "memory_analysis") and hasattr(one, "as_text"):
            return one
    what = (
        "it was read from the cache: compile it with `cached=False`"
        if hasattr(given, "executable")
        else ("give a function and its arguments, or a compiled program")
    )
    raise ArgumentError(
        f"`function` is a {type(given).__name__}, and there is no compiled program in it: {what}"
    )


def _peak(lives: Lives, target: str, schedule: Schedule | None, least_bytes: int) -> Peak:
    moment, alive = lives.at_peak()
    found = _Instructions(lives)
    at = lives.order[moment] if moment < len(lives.order) else ""
    return Peak(
        target=target,
        temporary_bytes=lives.total_bytes,
        alive_bytes=sum(one.nbytes for one in alive),
        at=at,
        scope=found.scope(at),
        buffers=tuple(found.described(one) for one in alive if one.nbytes >= least_bytes),
        exact=lives.exact,
        expected_bytes=None if schedule is None else schedule.peak_bytes,
        binding="" if schedule is None else schedule.binding,
    )


class _Instructions:
    """The instructions of a program by name, with those that read each."""

    def __init__(self, lives: Lives) -> None:
        self.module: Module = lives.module
        self.moments = {name: at for at, name in enumerate(lives.order)}
        self.by_name: dict[str, tuple[Instruction, Computation]] = {}
        for computation in self.module.computations.values():
            for one in computation:
                self.by_name.setdefault(one.name, (one, computation))
        self.readers: dict[str, list[Instruction]] = {}
        for computation in self.module.computations.values():
            for name, users in computation.users().items():
                self.readers.setdefault(name, []).extend(users)

    def scope(self, name: str) -> str:
        """The operation of the source that an instruction comes from; of a copy without one, that of what it
        copies."""
        for _ in range(8):
            one, _ = self.by_name.get(name, (None, None))
            if one is None or one.scope or not one.operands:
                return one.scope if one is not None else ""
            name = one.operands[0]
        return ""

    def described(self, buffer: Buffer) -> Alive:
        """A buffer in words."""
        one, around = self.by_name.get(buffer.name, (None, None))
        scope = self.scope(buffer.name)
        readers = self._readers(buffer.name)
        role = self._role(one, around, buffer, scope, readers)
        return Alive(
            nbytes=buffer.nbytes,
            type=str(buffer.array),
            instruction=buffer.name,
            scope=scope,
            sweep=sweep_of(scope),
            role=role,
            surprises=tuple(self._surprises(buffer, role, readers)),
        )

    def _readers(self, name: str) -> list[Instruction]:
        """Those that read it, also through views."""
        found, todo = [], [name]
        while todo:
            for user in self.readers.get(todo.pop(), ()):
                view = user.opcode in ("bitcast", "get-tuple-element", "opt-barrier", "copy-done")
                todo += [user.name] if view else []
                found += [] if view else [user]
        return found

    def _role(
        self,
        one: Instruction | None,
        around: Computation | None,
        buffer: Buffer,
        scope: str,
        readers: list[Instruction],
    ) -> str:
        if (
            one is not None
            and one.opcode == "custom-call"
            and buffer.array.dtype in ("u8", "s8")
            and len(one.arrays) > 1
        ):
            return "workspace of a library"
        if one is not None and around is not None and self._copies(one, around):
            return "copy in another layout"
        backward = _is_backward(scope)
        if not backward and any(_is_backward(self.scope(user.name)) for user in readers):
            return "kept for the backward pass"
        return "cotangent" if backward else "other"

    def _copies(self, one: Instruction, around: Computation) -> bool:
        """Whether an instruction only moves what is there already."""
        if one.opcode in ("copy", "transpose"):
            return True
        inner = (
            self.module.computations.get(one.computation("calls") or "") if one.opcode == "fusion" else None
        )
        if inner is None:
            return False
        opcodes = {part.opcode for part in inner} - {"parameter", "constant", "tuple"}
        sizes = {
            around.instructions[name].arrays[0].size
            for name in one.operands
            if name in around.instructions and around.instructions[name].arrays
        }
        return bool(opcodes & {"copy", "transpose"}) and opcodes <= _MOVES and sizes == {one.arrays[0].size}

    def _surprises(self, buffer: Buffer, role: str, readers: list[Instruction]) -> list[str]:
        found = []
        plain = buffer.array.size * buffer.array.bits // 8
        if plain and buffer.nbytes > PADDED * plain:
            found.append(f"padded from {show_bytes(plain)}: its last axes are rounded up to tiles")
        if role in ("copy in another layout", "workspace of a library"):
            found.append(f"a {role}")
        moments = [self.moments[user.name] for user in readers if user.name in self.moments]
        wait = (min(moments) - buffer.start) if moments else 0
        if role not in ("kept for the backward pass",) and wait > WAITS * len(self.moments):
            found.append(f"waits for its first reader while {wait} of {len(self.moments)} instructions run")
        return found


_SWEEPS = re.compile(r"\b(forward|backward|reverse|rebuild|advance)[ :](\d+)\b")


def sweep_of(scope: str) -> str:
    """The sweep that a scope names, mwplan's with its layer where there is one."""
    found = _SWEEPS.findall(scope)
    if found:
        return " ".join(found[-1])
    if not scope:
        return ""
    return "backward" if _is_backward(scope) else "forward"


def _is_backward(scope: str) -> bool:
    found = _SWEEPS.findall(scope)
    return found[-1][0] != "forward" if found else "transpose(" in scope


def described(peak: Peak, most: int = 16) -> str:
    """A peak as text, its `most` largest buffers one a line, equal ones together."""
    where = f"{peak.at} ({peak.scope})" if peak.scope else peak.at
    lines = [f"peak of {peak.target}: {show_bytes(peak.alive_bytes)} of temporaries alive at {where}"]
    takes = f"  the program takes {show_bytes(peak.temporary_bytes)} beside arguments and results"
    if peak.exact:
        lines.append(f"{takes}, {show_bytes(peak.fragmentation_bytes)} of it fragmentation")
    else:
        lines.append(f"{takes}; what is alive is read from the order of its instructions")
    if peak.expected_bytes is not None:
        lines.append(
            f"  the ledger expects {show_bytes(peak.expected_bytes)} at {peak.binding or 'its peak'}"
        )
    total = max(1, peak.alive_bytes)
    lines += [
        f"  {show_bytes(size):>12} {size / total:4.0%}  {role}" for role, size in peak.by_role().items()
    ]
    alike: dict[tuple[Any, ...], list[Alive]] = {}
    for one in peak.buffers:
        alike.setdefault((one.type, one.role, re.sub(r"\d+", "", one.scope), one.surprises), []).append(one)
    groups = sorted(alike.values(), key=lambda some: -sum(one.nbytes for one in some))
    for some in groups[:most]:
        one, size = some[0], sum(one.nbytes for one in some)
        many = f"{len(some)} x " if len(some) > 1 else ""
        words = f": {'; '.join(one.surprises)}" if one.surprises else ""
        lines.append(
            f"  {show_bytes(size):>12} {size / total:4.0%}  {many}{one.type}, {one.role},"
            f" {_short(one.scope) or one.instruction}{words}"
        )
    if len(groups) > most:
        lines.append(f"  and {sum(map(len, groups[most:]))} smaller ones")
    return "\n".join(lines)


def _short(scope: str, most: int = 70) -> str:
    return scope if len(scope) <= most else "..." + scope[-most:]
