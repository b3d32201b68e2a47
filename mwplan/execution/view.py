"""The layers that a walker sees: those of a whole chain, or of a window on one of its stacks."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from mwplan.execution import loops
from mwplan.network.chain import Chain, Place, Stack

PyTree = Any


@dataclass(frozen=True)
class View:
    """Some layers of a chain, in their order.

    `places`, of each layer; `at`, a repetition to be added to theirs, known only when the program runs.
    """

    chain: Chain
    places: list[Place]
    at: Any = 0

    def place(self, position: int) -> Place:
        """Where the layer that makes `x_position` is."""
        return self.places[position - 1]

    def layer(self, position: int) -> PyTree:
        """The layer that makes `x_position`."""
        source, row = self.source(position)
        return source if row is None else loops.row(source, row)

    def source(self, position: int) -> tuple[PyTree, Any]:
        """What the layer that makes `x_position` is read from: itself and None, or layers that are stacked,
        and its row among them."""
        place = self.place(position)
        part = self.chain.parts[place.part]
        if not isinstance(part, Stack):
            return part, None
        return part.block[place.phase], self.at + place.repetition

    def stacked(self, position: int) -> bool:
        """Whether that layer is one of a stack's."""
        return isinstance(self.chain.parts[self.place(position).part], Stack)

    def tag(self, position: int) -> Hashable:
        """What layers that may be walked by one scan share."""
        place = self.place(position)
        return (place.part, place.phase) if self.stacked(position) else ("alone", place.part)

    def window(self, start: int, span: int, repetition: Any) -> View:
        """The layers `start + 1 .. start + span`, `repetition` times as many further on."""
        base = self.places[start]
        block = len(self.chain.parts[base.part].block)
        inside = [
            dataclasses.replace(place, repetition=place.repetition - base.repetition)
            for place in self.places[start : start + span]
        ]
        return View(self.chain, inside, self.at + base.repetition + repetition * (span // block))
