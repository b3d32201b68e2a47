"""Walks the runs of a schedule over a chain, forward and backward, and hands each operation to a *performer*.

In a compiled step the performer puts `lax.optimization_barrier` around the operation, so that XLA neither
postpones what it should free nor merges a recomputation with what it recomputes; `mwplan.execution.tracing`
uses one that dispatches every operation by itself and looks at what is alive. Where runs, or the layers
within one, repeat over a stack, one repetition is walked inside a loop (`scans`, `taped`), by an interpreter
of its own whose layers are a window on the stack.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

from mwplan.execution import barriers, inversion, moonwalk, repeats, scans, taped
from mwplan.execution.repeats import Part, Repeat
from mwplan.execution.taped import Taped
from mwplan.execution.walker import Walker
from mwplan.network.chain import Stack
from mwplan.plans import tape
from mwplan.plans.schedule import Run, RunKind

PyTree = Any


class Interpreter(Walker):
    """Walks the runs of a schedule over a chain. Arguments and attributes: those of a `Walker`."""

    def segments(self, runs: Sequence[Run]) -> list[Run | Repeat | Taped]:
        """`runs`, with those that repeat over a stack taken together, and those that are better executed by a
        tape."""
        out: list[Run | Repeat | Taped] = []
        rest: list[Run] = []
        for alike, group in itertools.groupby(runs, key=self._alike):
            some = tuple(group)
            found = self._taped(some, alike[1]) if alike else None
            if found:
                out += [*repeats.segments(self.view, rest), found]
                rest = []
            else:
                rest += some
        return out + repeats.segments(self.view, rest)

    def _alike(self, run: Run) -> tuple[int, str] | None:
        """What STORE and RECOMPUTE runs have in common that one tape may hold: a stack whose block is one
        layer, and an option; else None."""
        first, last = self.view.place(run.start + 1), self.view.place(run.stop)
        part = self.view.chain.parts[first.part]
        if not isinstance(part, Stack) or len(part.block) > 1 or first.part != last.part:
            return None
        option = tape.option_of(run)
        return (first.part, option) if option else None

    def _taped(self, runs: tuple[Run, ...], option: str) -> Taped | None:
        if tape.written_out(runs) <= tape.LOOPS:
            return None
        start = runs[0].start
        many = Repeat(start, 1, runs[-1].stop - start, runs)
        return taped.find(self, many, option)

    def forward(self, runs: Sequence[Run], depth: int) -> list[Any]:
        """F over `runs`: returns what each keeps, or what a scan over several does.

        The stretch's input is in `x`, claimed once; that claim is consumed, and one on its output is left.
        """
        kept: list[Any] = []
        for one in self.segments(runs):
            if isinstance(one, Run):
                kept.append(self._forward_run(one, depth))
            elif isinstance(one, Taped):
                kept.append(taped.forward(self, one, depth))
            else:
                walk = functools.partial(Interpreter.forward, runs=one.runs, depth=depth)
                kept.append(scans.forward(self, one, walk))
        return kept

    def _forward_run(self, run: Run, depth: int) -> list[Any]:
        kept: list[Any] = []
        if run.kind in (RunKind.MOONWALK, RunKind.RECOMPUTE):
            self.claim(run.start)
        invert = run.kind is RunKind.INVERT and self.check
        if invert:
            self.take_sketch(run.start)
        for piece in repeats.pieces(self.view, run):
            if piece.count > 1:
                part = Part.of(run, piece)
                walk = functools.partial(Interpreter.forward_layers, run=part, depth=depth)
                saved = scans.forward(self, piece, walk)
                if run.kind is not RunKind.RECOMPUTE:
                    kept.append(saved)
            else:
                kept += self.forward_layers(Part.of(run, piece, shift=False), depth)
                if invert and piece.stop == run.start + 1 < run.stop:
                    self.take_sketch(piece.stop)
        if run.kind is RunKind.INVERT:
            self.claim(run.stop)
        return kept

    def backward(self, runs: Sequence[Run], kept: list[Any], box: list[PyTree], depth: int) -> None:
        """Backward over `runs`.

        `box` holds one cotangent, that of the stretch's output on entry and of its input on exit: a list, so
        that no frame up the stack keeps alive what the sweep is done with. `kept` is emptied for the same
        reason.
        """
        for one in reversed(self.segments(runs)):
            held = kept.pop()
            if isinstance(one, Run):
                self._backward_run(one, held, box, depth)
            elif isinstance(one, Taped):
                taped.backward(self, one, held, box, depth)
            else:
                self._scan_backward(one, held, box, depth)

    def _scan_backward(self, many: Repeat, held: scans.Scanned, box: list[PyTree], depth: int) -> None:
        def walk(inner: Interpreter, ct: PyTree, kept: list[Any]) -> Any:
            inside = [ct]
            inner.backward(many.runs, kept, inside, depth)
            return inside.pop(), None

        stores = all(run.kind is RunKind.STORE for run in many.runs)
        single = stores and not self.grads.performs
        box.append(scans.backward(self, many, held, box.pop(), walk, single=single)[0])

    def _backward_run(self, run: Run, held: list[Any], box: list[PyTree], depth: int) -> None:
        match run.kind:
            case RunKind.STORE:
                self.store(run, held, box, depth)
            case RunKind.MOONWALK:
                moonwalk.backward(self, run, held, box, depth)
            case RunKind.RECOMPUTE:
                self._recompute(run, box, depth)
            case RunKind.INVERT:
                inversion.backward(self, run, held, box, depth)
            case RunKind.OFFLOAD:
                self.offload(run, held, box, depth)

    def _recompute(self, run: Run, box: list[PyTree], depth: int) -> None:
        # Nothing else keeps XLA from recomputing at once, or from not recomputing at all.
        self.wait(run.start, box)
        kept = self.forward(run.inner, depth + 1)
        self.release(run.stop)
        if barriers.done_early(self.perform):
            # Nor from beginning with the cotangent: a product's, by its input, needs no activation.
            self.wait_for_cotangent(run.stop - 1, box)
        self.backward(run.inner, kept, box, depth + 1)
