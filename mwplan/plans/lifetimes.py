"""The ledger's book of what is alive, with a diary: how long every buffer lives, for `mwplan.plans.packing`.

An operation allocates its workspace, then what it makes; then what is left of the workspace goes, and what
nobody wants any more. That is how compiled steps do it, but for the order of things within an operation, of
which a compiled program tells only a part (`packing.Workspace`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mwplan.plans.packing import Buffer
from mwplan.plans.profiles import Profile

Name = tuple[str, int, int]  # what, position, depth; of activations depth 0


@dataclass(slots=True, eq=False)
class _Life:
    """One buffer, under whatever names."""

    kind: str
    position: int
    size: int
    start: int = 0


class Lives(dict[Name, int]):
    """Bytes of what is alive, by name, and a diary of it.

    A cotangent that changes its name between two events stays one buffer. So do an input and what is made in
    its place, where an operation saves as much.
    """

    def __init__(self, profile: Profile) -> None:
        super().__init__()
        self._workspaces = {one.total_bytes: one.buffers for one in profile.workspaces}
        self._buffers: list[Buffer] = []
        self._named: dict[Name, _Life] = {}
        self._came: list[_Life] = []  # since the last event
        self._went: list[_Life] = []
        #: what the last event made, its workspace and saving
        self._last: tuple[list[_Life], int, int] = ([], 0, 0)
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
        """The buffers of a workspace, less what is saved of it: the largest that the saving holds go
        first."""
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
