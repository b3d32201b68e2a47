"""What repeats in a schedule over a stack: found here, and walked by loops (`scans`, `taped`)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from mwplan.execution.view import View
from mwplan.network.chain import repeats
from mwplan.plans.schedule import Run, RunKind, shifted

#: Fewer repetitions than this are written out: a scan frees what it stacks only as a whole.
LEAST_REPETITIONS = 4
#: The longest block of runs, or of layers, that is looked for as a repetition.
LONGEST_BLOCK = 16


@dataclass(frozen=True)
class Repeat:
    """`count` times the same: the `span` layers from `start` on, and, between the runs of a schedule, the
    `runs` that cover them (from 0)."""

    start: int
    span: int
    count: int
    runs: tuple[Run, ...] = ()

    @property
    def stop(self) -> int:
        """The last of its layers."""
        return self.start + self.span * self.count

    @property
    def once(self) -> Repeat:
        """One repetition, as a walker within sees it."""
        return Repeat(0, self.span, 1)


@dataclass(frozen=True)
class Part:
    """Some layers of a run."""

    kind: RunKind
    start: int
    stop: int
    options: tuple[str, ...]

    @classmethod
    def of(cls, run: Run, piece: Repeat, *, shift: bool = True) -> Part:
        """One repetition of `piece`; with `shift` from 0, as a walker within sees it."""
        at = piece.start - run.start
        base = 0 if shift else piece.start
        return cls(run.kind, base, base + piece.span, run.options[at : at + piece.span])


def segments(view: View, runs: Sequence[Run]) -> list[Run | Repeat]:
    """`runs`, with those that repeat over a stack taken together."""
    keys: list[Hashable] = []
    for run in runs:
        within = view.place(run.stop).part == view.place(run.start + 1).part
        # What a loop stacks is on the device.
        within = within and run.kind is not RunKind.OFFLOAD
        keys.append((shifted(run, -run.start), view.tag(run.start + 1)) if within else run)
    out: list[Run | Repeat] = []
    for at, period, count in repeats(keys, LONGEST_BLOCK):
        if count < LEAST_REPETITIONS or not view.stacked(runs[at].start + 1):
            out += runs[at : at + period * count]
            continue
        start = runs[at].start
        block = tuple(shifted(run, -start) for run in runs[at : at + period])
        out.append(Repeat(start, block[-1].stop, count, block))
    return out


def pieces(view: View, run: Run) -> list[Repeat]:
    """The layers of one run, with those that repeat over a stack taken together."""
    each = run.options if run.kind in (RunKind.MOONWALK, RunKind.INVERT) else [""] * (run.stop - run.start)
    keys = [(view.tag(run.start + 1 + i), option) for i, option in enumerate(each)]
    out = []
    for at, period, count in repeats(keys, LONGEST_BLOCK):
        start = run.start + at
        if count < LEAST_REPETITIONS or not view.stacked(start + 1):
            out += [Repeat(start + i, 1, 1) for i in range(period * count)]
        else:
            out.append(Repeat(start, period, count))
    return out
