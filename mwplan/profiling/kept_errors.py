"""The errors of a chain's rules: which layers they are measured at, and which are known, on disk, under all
that they were measured from: the programs of the layers, what their weights hold, and the chain's input."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mwplan.common import cache
from mwplan.compilers import digests
from mwplan.network.chain import Chain
from mwplan.profiling.layer_costs import Costs, Name, exact, forbidden, name_of
from mwplan.profiling.visiting import GROWTH_SAMPLES, spread, visit

PyTree = Any
_KIND = "errors"
_SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleErrors:
    """Of one rule of the layers that share a key: the largest errors seen, and an inverse's growths, layer
    after layer. `layer`: the first that has the key."""

    layer: int
    inverse: bool
    rule: str
    errors: tuple[float, ...]
    growths: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """All that were measured along a chain."""

    rules: tuple[RuleErrors, ...]


class Errors:
    """Those of the layers of a chain, `keys` theirs, `rules` by key.

    **Attributes:** `unusable`, by layer, the rules that its weights forbid, of layers whose rules make
    errors; `measured`, the layers at which these are to be measured: none where all are known."""

    def __init__(
        self,
        chain: Chain,
        structs: Sequence[PyTree],
        keys: Sequence[Hashable],
        rules: Mapping[Hashable, Sequence[Any]],
    ) -> None:
        self.chain, self.keys = chain, keys
        inexact = {key: some for key, some in rules.items() if not exact(some)}
        self.looked_at = [i for i, key in enumerate(keys) if key in inexact]
        self.sampled = spread(keys, GROWTH_SAMPLES)
        self.unusable: dict[int, frozenset[Name]] = {}
        for i, one, _ in visit(chain, None, self.sampled, None) if self.looked_at else ():
            if keys[i] in inexact:
                self.unusable[i] = forbidden(inexact[keys[i]], one, structs[i])
        self.measured = self.unusable.keys() & self.sampled
        self._wanted = {
            (keys[i], name)
            for i in self.measured
            for name in {*map(name_of, inexact[keys[i]])} - self.unusable[i]
        }
        self._name: str | None = None
        self._known: dict[tuple[Hashable, Name], RuleErrors] = {}

    def find(
        self, x: PyTree, programs: Mapping[Hashable, str | None], *settings: str, look_up: bool = True
    ) -> None:
        """Looks up what was measured before. `programs`: by key, the name of all programs of a layer's own
        rules, None where they have none; `settings`, what else errors are measured with. **Cost:** a pass
        through the weights."""
        names = [programs[key] for key in self.keys[: self.looked_at[-1] + 1]] if self.looked_at else []
        if not self.measured or None in names:
            return
        parts = self.chain.parts[: self.chain.places()[self.looked_at[-1]].part + 1]
        self._name = cache.key(*settings, *map(str, names), digests.of_arrays((parts, x)))
        found = cache.known(self._name, Kept, kind=_KIND, schema=_SCHEMA) if look_up else None
        some = {(self.keys[one.layer], (one.inverse, one.rule)): one for one in found.rules} if found else {}
        if some.keys() >= self._wanted:
            self._known, self.measured = some, set()

    def settle(self, costs: Mapping[Any, Costs]) -> None:
        """Gives `costs` what is known, and keeps what they have measured."""
        for i, names in self.unusable.items():
            costs[self.keys[i]].unusable |= names
        for (key, rule), one in self._known.items():
            costs[key].errors[rule] = one.errors
            if one.inverse:
                costs[key].growths[rule] = list(one.growths)
        if self._name is not None and self.measured:
            found = [
                RuleErrors(
                    layer=self.keys.index(key),
                    inverse=rule[0],
                    rule=rule[1],
                    errors=costs[key].errors[rule],
                    growths=tuple(costs[key].growths.get(rule, ())),
                )
                for key, rule in sorted(self._wanted, key=repr)
                if rule in costs[key].errors
            ]
            cache.keep(self._name, Kept(rules=tuple(found)), kind=_KIND, schema=_SCHEMA)
