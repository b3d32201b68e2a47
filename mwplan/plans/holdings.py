"""The ledger's book of what is alive, with a note at each event: how much of each kind, and of what."""

from __future__ import annotations

import enum
from dataclasses import dataclass

Name = tuple[str, int, int]  # what, position, depth; of activations depth 0


class Kind(enum.Enum):
    """What the bytes of a step hold, as memory is drawn."""

    ACTIVATIONS = "activations"
    RESIDUALS = "residuals"
    FRAGMENTS = "fragments"
    COTANGENTS = "cotangents"
    WORKSPACE = "workspace"


KINDS = {
    "x": Kind.ACTIVATIONS, "q": Kind.RESIDUALS, "fragment": Kind.FRAGMENTS, "ct": Kind.COTANGENTS,
    "sweep": Kind.COTANGENTS, "rebuilt": Kind.COTANGENTS,
}  # fmt: skip
#: Of which kinds a saving is taken first: what an operation writes lies where its workspace or its last-used
#: inputs were.
_SAVED = (Kind.WORKSPACE, Kind.COTANGENTS, Kind.ACTIVATIONS, Kind.RESIDUALS, Kind.FRAGMENTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """Something that is alive: of layer or position `position`, within `depth` recomputed runs."""

    kind: Kind
    name: str
    position: int
    depth: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """What is alive at one event. `sizes`: bytes of each kind, in the order of `Kind`, less what is saved,
    so that they add up to the event's `live_bytes`; `holdings`, one by one and the largest first, where no
    earlier event had as much alive, else empty."""

    sizes: tuple[int, ...]
    holdings: tuple[Holding, ...] = ()


class Holdings(dict[Name, int]):
    """Bytes of what is alive, by name; `moments`, one an event."""

    def __init__(self) -> None:
        super().__init__()
        self.moments: list[Moment] = []
        self._most = -1

    def event(self, workspace: int, saving: int) -> None:
        """Notes what is alive now."""
        sizes = dict.fromkeys(Kind, 0)
        for (name, _, _), size in self.items():
            sizes[KINDS[name]] += size
        sizes[Kind.WORKSPACE] = workspace
        for kind in _SAVED:
            taken = min(saving, sizes[kind])
            sizes[kind] -= taken
            saving -= taken
        found: tuple[Holding, ...] = ()
        total = sum(sizes.values())
        if total > self._most:
            self._most, found = total, self._listed(sizes[Kind.WORKSPACE])
        self.moments.append(Moment(sizes=tuple(sizes.values()), holdings=found))

    def _listed(self, workspace: int) -> tuple[Holding, ...]:
        listed = [
            Holding(kind=KINDS[name], name=name, position=position, depth=depth, nbytes=size)
            for (name, position, depth), size in self.items()
            if size
        ]
        if workspace:
            listed.append(
                Holding(kind=Kind.WORKSPACE, name="workspace", position=0, depth=0, nbytes=workspace)
            )
        return tuple(sorted(listed, key=lambda one: -one.nbytes))
