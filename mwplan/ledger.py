"""Replays a schedule event by event and recomputes its memory, time and error.

The ledger shares no code with the solvers: it keeps a table of live buffers by name, allocates and frees them as the sweeps
do, and adds up what is alive at each event. What a solver claims holds only if this agrees. docs/accounting.md
defines every event.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from mwplan.errors import ScheduleMismatchError
from mwplan.packing import Buffer
from mwplan.profiles import InvertOption, MoonwalkOption, Profile, StoreOption
from mwplan.schedule import Run, RunKind, Strategy, check_cover, reporting_runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One moment of the step: what is being done, to which layer, and the bytes alive while it is done.

    `sweep`: "forward", "turn", "backward" (of STORE and INVERT runs), "reverse" (R), "rebuild" and "advance" (M, the vijp and what follows it). `depth`: how many
    RECOMPUTE runs enclose it. `live_bytes` = arrays + `workspace_bytes` -
    `saving_bytes`.
    """

    sweep: str
    layer: int
    depth: int
    live_bytes: int
    workspace_bytes: int
    saving_bytes: int
    time_ns: int

    def __str__(self) -> str:
        where = (
            "the turn at the loss"
            if self.sweep == "turn"
            else f"the {self.sweep} sweep of layer {self.layer}"
        )
        return where + (f" (recomputed, level {self.depth})" if self.depth else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What a schedule costs: temporaries' peak and where it stands, time, error, and every event. `report_scales`: as in `Schedule`.

    `time_ns`, of all events; `fresh_ns`, of getting the memory (`Profile.fresh_ns`).
    """

    peak_bytes: int
    time_ns: int
    fresh_ns: int
    error: float
    binding: Event
    events: tuple[Event, ...]
    report_scales: tuple[float, ...] = ()


def replay(profile: Profile, runs: Sequence[Run]) -> Replay:
    """Recomputes the peak, time and error of `runs` on `profile`.

    Raises `ScheduleMismatchError` where `runs` do not cover the profile's chain, or name an option that a layer does not
    have. Cost: linear in the number of events.
    """
    book = _Ledger(profile)
    try:
        check_cover(runs, 0, len(profile))
    except ValueError as error:
        raise ScheduleMismatchError(f"`runs` do not fit a chain of {len(profile)} layers: {error}") from error
    book.stretch(runs, depth=0, outer=None)
    binding = max(book.events, key=lambda event: event.live_bytes)
    return Replay(
        peak_bytes=binding.live_bytes,
        time_ns=sum(event.time_ns for event in book.events),
        fresh_ns=profile.fresh_ns(binding.live_bytes),
        error=max(book.error, book.inverted),
        report_scales=tuple(book.scales.get((run.start, run.stop), 1.0) for run in reporting_runs(runs)),
        binding=binding,
        events=tuple(book.events),
    )


def buffers(profile: Profile, runs: Sequence[Run]) -> tuple[Buffer, ...]:
    """Everything that is alive at some moment of `runs`, for `packing.pack`.

    An operation allocates its workspace, then what it makes; then what is left of the workspace goes, and what nobody wants any more. What is alive at once is
    what `replay` says, but where a saving is of no buffer's size. Cost: as `replay`.
    """
    live = _Lives(profile)
    _Ledger(profile, live).stretch(runs, depth=0, outer=None)
    return live.close()


Name = tuple[str, int, int]  # what, position, depth; of activations depth 0


@dataclass(slots=True, eq=False)
class _Life:
    """One buffer, under whatever names."""

    kind: str
    position: int
    size: int
    start: int = 0


class _Lives(dict[Name, int]):
    """Bytes of what is alive, as `_Ledger` keeps it, and a diary of it.

    A cotangent that changes its name between two events stays one buffer. So do an input and what is made in its place, where an operation saves as much.
    """

    def __init__(self, profile: Profile) -> None:
        super().__init__()
        self._workspaces = {one.total_bytes: one.buffers for one in profile.workspaces}
        self._buffers: list[Buffer] = []
        self._named: dict[Name, _Life] = {}
        self._came: list[_Life] = []  # since the last event
        self._went: list[_Life] = []
        self._last: tuple[list[_Life], int, int] = (
            [],
            0,
            0,
        )  # what the last event made, its workspace and saving
        self._clock = 0

    def __setitem__(self, name: Name, size: int) -> None:
        if name not in self:
            kind = "ct" if name[0] in ("sweep", "fragment", "rebuilt") else name[0]
            alike = (one for one in self._went if (one.kind, one.position, one.size) == (kind, name[1], size))
            life = next(alike, None)
            if life is None:
                life = _Life(kind, name[1], size)
                self._came.append(life)
            else:
                self._went.remove(life)
            self._named[name] = life
        super().__setitem__(name, size)

    def __delitem__(self, name: Name) -> None:
        super().__delitem__(name)
        life = self._named.pop(name)
        if life in self._came:  # no event has seen it
            self._came.remove(life)
            return
        for other, new in self._named.items():
            if new in self._came and (new.kind, new.position, new.size) == (
                life.kind,
                life.position,
                life.size,
            ):
                self._came.remove(new)
                self._named[other] = life
                return
        self._went.append(life)

    def pop(self, name: Name, *default: Any) -> Any:
        """As that of a `dict`."""
        size = self.get(name, *default)
        if name in self:
            del self[name]
        return size

    def event(self, workspace: int, saving: int) -> None:
        """What came since the last event is made by this one; what went was released by the last."""
        self._finish()
        self._last, self._came = (self._came, workspace, saving), []

    def close(self) -> tuple[Buffer, ...]:
        """All buffers, once nothing is alive any more."""
        self._finish()
        return tuple(self._buffers)

    def _finish(self) -> None:
        """The last event's allocations and releases."""
        made, workspace, saving = self._last
        into: dict[_Life, _Life] = {}
        for life in made:
            for old in self._went:
                if old not in made and old not in into and old.size == life.size <= saving * _NEARLY:
                    into[old] = life
                    saving = max(0, saving - life.size)
                    break
        parts = self._parts(workspace, saving)
        last = max((part.stop for part, _ in parts), default=0)
        for moment in range(last + 1):
            for part, life in parts:
                if part.start == moment:
                    life.start = self._tick()
            if moment == last:
                for life in made:
                    if life not in into.values():
                        life.start = self._tick()
            for part, life in parts:
                if part.stop == moment:
                    self._gone(life)
        for old in self._went:
            if old in into:
                into[old].start = old.start
            else:
                self._gone(old)
        self._went = []

    def _parts(self, workspace: int, saving: int) -> list[tuple[Buffer, _Life]]:
        """The buffers of a workspace, less what is saved of it: the largest that the saving holds go first."""
        known = self._workspaces.get(workspace)
        if known is None:
            known = (Buffer(max(0, workspace - saving), 0, 0),)
            saving = 0
        parts = list(known)
        for part in sorted(known, key=lambda part: -part.size_bytes):
            if part.size_bytes <= saving * _NEARLY:
                parts.remove(part)
                saving = max(0, saving - part.size_bytes)
        return [(part, _Life("workspace", 0, part.size_bytes)) for part in parts]

    def _gone(self, life: _Life) -> None:
        if life.size:
            self._buffers.append(Buffer(life.size, life.start, self._tick()))

    def _tick(self) -> int:
        self._clock += 1
        return self._clock


_NEARLY = 1.02  # what is measured as saved lacks some bytes of alignment


class _Ledger:
    """Live buffers by name. An activation is a buffer with a count of who still wants it."""

    def __init__(self, profile: Profile, diary: _Lives | None = None) -> None:
        self.profile = profile
        self.live: dict[Name, int] = {} if diary is None else diary
        self.diary = diary
        self.claims: dict[int, int] = {}  # position -> how many want that activation
        self.events: list[Event] = []
        self.error = 0.0  # the largest of the MOONWALK runs'
        self.inverted = 0.0  # the INVERT runs' together
        self.scales: dict[tuple[int, int], float] = {}  # of the INVERT runs

    # -- buffers -------------------------------------------------------------------------------------------------

    def claim(self, position: int) -> None:
        """Somebody wants `x_position`; it is computed if nobody had it. The chain's input is never counted."""
        self.claims[position] = self.claims.get(position, 0) + 1
        if position > 0:
            self.live["x", position, 0] = self.profile.activation_bytes[position]

    def release(self, position: int) -> None:
        """One who wanted `x_position` does not any more; the last one frees it."""
        self.claims[position] -= 1
        if self.claims[position] == 0:
            self.live.pop(("x", position, 0), None)

    def event(self, sweep: str, layer: int, depth: int, workspace: int, time: int, saving: int = 0) -> None:
        """Notes what is alive now."""
        live = sum(self.live.values()) + workspace - saving
        self.events.append(
            Event(
                sweep=sweep,
                layer=layer,
                depth=depth,
                live_bytes=live,
                workspace_bytes=workspace,
                saving_bytes=saving,
                time_ns=time,
            )
        )
        if self.diary is not None:
            self.diary.event(workspace, saving)

    # -- stretches and runs --------------------------------------------------------------------------------------

    def stretch(self, runs: Sequence[Run], *, depth: int, outer: Run | None) -> None:
        """Forward over `runs`, the turn if this is the whole chain, and backward over them.

        On entry the stretch's input is claimed once, by this call's right; that claim is passed to the first run, which
        releases it when it needs it no longer.
        """
        p = self.profile
        start, stop = runs[0].start, runs[-1].stop
        if outer is None:
            self.claim(start)
        else:
            self.live["ct", stop, depth] = p.cotangent_bytes[
                stop
            ]  # it waits while the inner schedule runs forward
        for run in runs:
            self.forward(run, depth)
        if outer is None:
            self.live["ct", stop, 0] = p.cotangent_bytes[stop]
            self.event("turn", stop, depth, 0, 0)
        self.release(stop)
        for run in reversed(runs):
            del self.live["ct", run.stop, depth]
            self.backward(run, depth)
            self.live["ct", run.start, depth] = p.cotangent_bytes[run.start]
        del self.live["ct", start, depth]

    def forward(self, run: Run, depth: int) -> None:
        """F sweep of one run. On entry one claim on `x_start` is ours; on exit one on `x_stop` is the next run's."""
        for layer in range(run.start + 1, run.stop + 1):
            residual, keeps_input, keeps_output, workspace, time = self._forward_cost(run, layer)
            self.claim(layer)
            if residual:
                self.live["q", layer, depth] = residual
            self.event("forward", layer, depth, workspace, time)
            if keeps_output:
                self.claim(layer)
            # A moonwalk run and a recomputed one keep their start besides what their first layer keeps.
            if layer == run.start + 1 and run.kind in (RunKind.MOONWALK, RunKind.RECOMPUTE):
                self.claim(run.start)
            if not keeps_input:
                self.release(layer - 1)
            if layer == run.stop and run.kind is RunKind.INVERT:
                self.claim(layer)

    def _forward_cost(self, run: Run, layer: int) -> tuple[int, bool, bool, int, int]:
        if run.kind in (RunKind.STORE, RunKind.MOONWALK):
            o = self.store(run) if run.kind is RunKind.STORE else self.moonwalk(run, layer)
            return o.residual_bytes, o.keeps_input, o.keeps_output, o.forward_workspace_bytes, o.forward_ns
        plain = self.profile.layers[layer - 1]
        return 0, False, False, plain.forward_workspace_bytes, plain.forward_ns

    def backward(self, run: Run, depth: int) -> None:
        """Backward of one run: on exit nothing of it is alive, and `ct_start` is the caller's to count."""
        match run.kind:
            case RunKind.STORE:
                self._backward_store(run, depth)
            case RunKind.MOONWALK:
                self._backward_moonwalk(run, depth)
            case RunKind.RECOMPUTE:
                self.stretch(run.inner, depth=depth + 1, outer=run)
            case RunKind.INVERT:
                self._backward_invert(run, depth)

    def _backward_store(self, run: Run, depth: int) -> None:
        o, layer, p = self.store(run), run.stop, self.profile
        self.live["ct", layer, depth] = p.cotangent_bytes[layer]
        self.live["ct", layer - 1, depth] = p.cotangent_bytes[layer - 1]
        shared = o.keeps_input and (layer == 1 or self.claims[layer - 1] > 1)
        saving = 0 if shared else o.backward_saving_bytes
        self.event("backward", layer, depth, o.backward_workspace_bytes, o.backward_ns, saving)
        del self.live["ct", layer, depth], self.live["ct", layer - 1, depth]
        self.live.pop(("q", layer, depth), None)
        if o.keeps_output:
            self.release(layer)
        if o.keeps_input:
            self.release(layer - 1)

    def _backward_moonwalk(self, run: Run, depth: int) -> None:
        p, layers = self.profile, range(run.start + 1, run.stop + 1)
        self.live["sweep", run.stop, depth] = p.sweep_cotangent_bytes[run.stop]
        for layer in reversed(layers):  # R
            o = self.moonwalk(run, layer)
            self.live["sweep", layer - 1, depth] = p.sweep_cotangent_bytes[layer - 1]
            if not o.fragment_is_cotangent:
                self.live["fragment", layer, depth] = o.fragment_bytes
            self.event(
                "reverse", layer, depth, o.reverse_workspace_bytes, o.reverse_ns, o.reverse_saving_bytes
            )
            self.live["fragment", layer, depth] = o.fragment_bytes
            del self.live["sweep", layer, depth]
            self.live.pop(("q", layer, depth), None)
            if o.keeps_output:
                self.release(layer)
            if o.keeps_input:
                self.release(layer - 1)
        error = 0.0
        for layer in layers:  # M
            o = self.moonwalk(run, layer)
            if o.fragment_is_cotangent:
                del self.live["fragment", layer, depth]
            self.live["rebuilt", layer, depth] = p.sweep_cotangent_bytes[layer]
            saving = (
                o.rebuild_saving_bytes if layer - 1 > run.start else 0
            )  # ct_start stays: it is the result
            self.event("rebuild", layer, depth, o.rebuild_workspace_bytes, o.rebuild_ns, saving)
            self.live.pop(("rebuilt", layer - 1, depth), None)
            self.live.pop(("fragment", layer, depth), None)
            if layer < run.stop:
                self.claim(layer)
            forward_ns = p.layers[layer - 1].forward_ns if layer < run.stop else 0
            workspace = o.advance_workspace_bytes if layer < run.stop else o.last_workspace_bytes
            alone = 1 < layer < run.stop and self.claims[layer - 1] == 1
            saving = o.advance_saving_bytes if alone else 0
            self.event("advance", layer, depth, workspace, forward_ns, saving)
            self.release(layer - 1)
            # A growth of infinity times an error of 0 is no error; times any other it is infinite.
            grown = o.growth * error if error else 0.0
            error = math.hypot(grown, o.local_error)
            self.error = max(self.error, error)
        del self.live["rebuilt", run.stop, depth], self.live["sweep", run.start, depth]

    def _backward_invert(self, run: Run, depth: int) -> None:
        p, before, error, left, worst = self.profile, 0.0, 0.0, 0.0, 0.0
        self.live["ct", run.stop, depth] = p.cotangent_bytes[run.stop]
        for layer in range(run.stop, run.start, -1):
            o = self.invert(run, layer)
            known = layer == 1 or bool(self.claims.get(layer - 1))
            saving = 0 if known else o.backward_saving_bytes
            self.claim(layer - 1)
            self.live["ct", layer - 1, depth] = p.cotangent_bytes[layer - 1]
            self.event("backward", layer, depth, o.backward_workspace_bytes, o.backward_ns, saving)
            self.release(layer)
            del self.live["ct", layer, depth]
            before, error = error, math.hypot(o.growth * error if error else 0.0, o.local_error)
            if error:  # a sensitivity of infinity times an error of 0 is no error
                kink = math.sqrt(o.kink * error)
                worst = max(worst, error, math.hypot(left, o.gradient_sensitivity * error, kink))
                left = math.hypot(left, o.sensitivity * error, kink)
                worst = max(worst, left)
        # The report compares x_start, or x_{start+1} where the former is kept by the run to the left.
        compared = before if known and run.stop > run.start + 1 else error
        self.scales[run.start, run.stop] = worst / compared if compared else 1.0
        self.inverted = math.hypot(self.inverted, worst)
        self.release(run.start)
        del self.live["ct", run.start, depth]

    # -- options by name -----------------------------------------------------------------------------------------

    def store(self, run: Run) -> StoreOption:
        """The option of a STORE run."""
        return _named(self.profile.layers[run.stop - 1].store, run.options[0], run.stop, "store")

    def moonwalk(self, run: Run, layer: int) -> MoonwalkOption:
        """The option of one layer of a MOONWALK run."""
        name = run.options[layer - run.start - 1]
        return _named(self.profile.layers[layer - 1].moonwalk, name, layer, "moonwalk")

    def invert(self, run: Run, layer: int) -> InvertOption:
        """The option of one layer of an INVERT run."""
        name = run.options[layer - run.start - 1]
        return _named(self.profile.layers[layer - 1].invert, name, layer, "invert")


Option = TypeVar("Option", StoreOption, MoonwalkOption, InvertOption)


def _named(options: tuple[Option, ...], name: str, layer: int, kind: str) -> Option:
    for option in options:
        if option.name == name:
            return option
    raise ScheduleMismatchError(
        f"layer {layer} has no {kind} option {name!r} in this profile (it has {[o.name for o in options]}): "
        "plan again with this profile"
    )


def strategies(profile: Profile, runs: Sequence[Run]) -> tuple[Strategy, ...]:
    """The outermost strategy of each layer, from the input on: a layer inside a RECOMPUTE run is RECOMPUTE."""
    out: list[Strategy] = []
    for run in runs:
        if run.kind is not RunKind.MOONWALK:
            out += [Strategy[run.kind.name]] * (run.stop - run.start)
            continue
        for layer, name in enumerate(run.options, start=run.start):
            option = _named(profile.layers[layer].moonwalk, name, layer + 1, "moonwalk")
            out.append(Strategy.FRAGMENT if option.fragment_bytes else Strategy.VIJP)
    return tuple(out)
