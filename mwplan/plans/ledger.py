"""Replays a schedule event by event and recomputes its memory, time and error.

The ledger shares no code with the solvers: it keeps a table of live buffers by name, allocates and frees them
as the sweeps do, and adds up what is alive at each event. What a solver claims holds only if this agrees.
docs/accounting.md defines every event.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from mwplan.common.errors import ScheduleMismatchError
from mwplan.plans.holdings import Holdings, Moment
from mwplan.plans.lifetimes import Lives, Name
from mwplan.plans.packing import Buffer
from mwplan.plans.profiles import InvertOption, MoonwalkOption, OffloadOption, Profile, StoreOption
from mwplan.plans.schedule import Run, RunKind, Strategy, allow_nesting, check_cover, nesting, reporting_runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One moment of the step: what is being done, to which layer, and the bytes alive while it is done.

    `sweep`: "forward", "turn", "backward" (of STORE, OFFLOAD and INVERT runs), "reverse" (R), "rebuild" and
    "advance" (M, the vijp and what follows it). `depth`: how many RECOMPUTE runs enclose it. `live_bytes` =
    arrays + `workspace_bytes` - `saving_bytes`.
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
    """What a schedule costs: temporaries' peak and where it stands, the most bytes in the host's memory,
    time, error, and every event. `report_scales`: as in `Schedule`.

    `time_ns`, of all events; `first_touch_ns`, of getting the memory (`Profile.first_touch_ns`).
    """

    peak_bytes: int
    time_ns: int
    first_touch_ns: int
    error: float
    binding: Event
    events: tuple[Event, ...]
    report_scales: tuple[tuple[float, float], ...] = ()
    host_bytes: int = 0


def replay(profile: Profile, runs: Sequence[Run]) -> Replay:
    """Recomputes the peak, time and error of `runs` on `profile`.

    Raises `ScheduleMismatchError` where `runs` do not cover the profile's chain, or name an option that a
    layer does not have. Cost: linear in the number of events.

    >>> profile = mw.estimate(mw.Chain([jnp.tanh] * 8), jnp.ones((256, 64)), device="h100")
    >>> schedule = mw.plan(profile, budget="400KiB")
    >>> mw.replay(profile, schedule.runs).time_ns == schedule.time_ns
    True
    """
    allow_nesting(nesting(runs))
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
        first_touch_ns=profile.first_touch_ns(binding.live_bytes),
        error=max(book.error, book.inverted),
        report_scales=tuple(
            book.scales.get((run.start, run.stop), (1.0, 0.0)) for run in reporting_runs(runs)
        ),
        binding=binding,
        events=tuple(book.events),
        host_bytes=book.most_host,
    )


def buffers(profile: Profile, runs: Sequence[Run]) -> tuple[Buffer, ...]:
    """Everything that is alive at some moment of `runs`, for `packing.pack`; what is alive at once is what
    `replay` says, but where a saving is of no buffer's size."""
    live = Lives(profile)
    _Ledger(profile, live).stretch(runs, depth=0, outer=None)
    return live.close()


def moments(profile: Profile, runs: Sequence[Run]) -> tuple[Moment, ...]:
    """What is alive at each event of `replay`, by kind, and at the peak one by one. Raises as `replay`."""
    live = Holdings()
    book = _Ledger(profile, live)
    book.stretch(runs, depth=0, outer=None)
    assert len(live.moments) == len(book.events)
    return tuple(live.moments)


class _Ledger:
    """Live buffers by name. An activation is a buffer with a count of who still wants it."""

    def __init__(self, profile: Profile, diary: Lives | Holdings | None = None) -> None:
        self.profile = profile
        self.live: dict[Name, int] = {} if diary is None else diary
        self.diary = diary
        self.claims: dict[int, int] = {}  # position -> how many want that activation
        self.host: dict[tuple[int, int], int] = {}  # (layer, depth) -> what it has in the host's memory
        self.most_host = 0
        self.events: list[Event] = []
        self.error = 0.0  # the largest of the MOONWALK runs'
        self.inverted = 0.0  # the INVERT runs' together
        self.scales: dict[tuple[int, int], tuple[float, float]] = {}  # of the INVERT runs

    # -- buffers
    # -------------------------------------------------------------------------------------------------

    def claim(self, position: int) -> None:
        """Somebody wants `x_position`; it is computed if nobody had it. The chain's input is never
        counted."""
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

    # -- stretches and runs
    # --------------------------------------------------------------------------------------

    def stretch(self, runs: Sequence[Run], *, depth: int, outer: Run | None) -> None:
        """Forward over `runs`, the turn if this is the whole chain, and backward over them.

        On entry the stretch's input is claimed once, by this call's right; that claim is passed to the first
        run, which releases it when it needs it no longer.
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
        """F sweep of one run. On entry one claim on `x_start` is ours; on exit one on `x_stop` is the next
        run's."""
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
            if run.kind is RunKind.OFFLOAD:
                self.host[layer, depth] = self.offload(run).host_bytes
                self.most_host = max(self.most_host, sum(self.host.values()))

    def _forward_cost(self, run: Run, layer: int) -> tuple[int, bool, bool, int, int]:
        if run.kind is RunKind.INVERT:
            back = self.invert(run, layer)
            return back.residual_bytes, False, False, back.forward_workspace_bytes, back.forward_ns
        if run.kind is RunKind.OFFLOAD:
            offloaded = self.offload(run)
            return 0, False, False, offloaded.forward_workspace_bytes, offloaded.forward_ns
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
            case RunKind.OFFLOAD:
                self._backward_offload(run, depth)

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

    def _backward_offload(self, run: Run, depth: int) -> None:
        o, layer, cotangents = self.offload(run), run.stop, self.profile.cotangent_bytes
        self.live["ct", layer, depth] = cotangents[layer]
        self.live["ct", layer - 1, depth] = cotangents[layer - 1]
        self.event("backward", layer, depth, o.backward_workspace_bytes, o.backward_ns)
        del self.live["ct", layer, depth], self.live["ct", layer - 1, depth]
        del self.host[layer, depth]

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
        p, before, error = self.profile, 0.0, 0.0
        # Squares of errors: what grows with that of the activations, and what with its root.
        linear = kinked = 0.0
        worst: tuple[float, float] = (0.0, 0.0)
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
            self.live.pop(("q", layer, depth), None)
            before, error = error, math.hypot(o.growth * error if error else 0.0, o.local_error)
            if error:  # a sensitivity of infinity times an error of 0 is no error
                kinked += o.kink * error
                # Products, as a power of a float raises where it is too large.
                gradient, passed = o.gradient_sensitivity * error, o.sensitivity * error
                gradient, linear = linear + gradient * gradient, linear + passed * passed
                worst = max(worst, (error * error, 0.0), (gradient, kinked), (linear, kinked), key=sum)
        # The report compares x_start, or x_{start+1} where the former is kept by the run to the left.
        compared = before if known and run.stop > run.start + 1 else error
        if 0 < compared < math.inf:
            self.scales[run.start, run.stop] = math.sqrt(worst[0]) / compared, worst[1] / compared
        self.inverted = math.hypot(self.inverted, math.sqrt(sum(worst)))
        self.release(run.start)
        del self.live["ct", run.start, depth]

    # -- options by name
    # -----------------------------------------------------------------------------------------

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

    def offload(self, run: Run) -> OffloadOption:
        """The option of an OFFLOAD run."""
        return _named(self.profile.layers[run.stop - 1].offload, run.options[0], run.stop, "offload")


Option = TypeVar("Option", StoreOption, MoonwalkOption, InvertOption, OffloadOption)


def _named(options: tuple[Option, ...], name: str, layer: int, kind: str) -> Option:
    for option in options:
        if option.name == name:
            return option
    raise ScheduleMismatchError(
        f"layer {layer} has no {kind} option {name!r} in this profile (it has {[o.name for o in options]}): "
        "plan again with this profile"
    )


def strategies(profile: Profile, runs: Sequence[Run]) -> tuple[Strategy, ...]:
    """The outermost strategy of each layer, from the input on: a layer inside a RECOMPUTE run is
    RECOMPUTE."""
    out: list[Strategy] = []
    for run in runs:
        if run.kind is not RunKind.MOONWALK:
            out += [Strategy[run.kind.name]] * (run.stop - run.start)
            continue
        for layer, name in enumerate(run.options, start=run.start):
            option = _named(profile.layers[layer].moonwalk, name, layer + 1, "moonwalk")
            out.append(Strategy.FRAGMENT if option.fragment_bytes else Strategy.VIJP)
    return tuple(out)
