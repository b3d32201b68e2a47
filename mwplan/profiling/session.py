"""One measurement of a chain: what is known already, what is compiled and timed now, and errors."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Hashable
from typing import Any, Self

import jax

from mwplan.common import cache
from mwplan.compilers.compiling import options_of
from mwplan.network import operations
from mwplan.network.chain import Chain
from mwplan.profiling import bench, kept_figures, touch
from mwplan.profiling.carrying import Carrying
from mwplan.profiling.kept_errors import Errors
from mwplan.profiling.layer_costs import Costs, Name
from mwplan.profiling.options import Options
from mwplan.profiling.progress import Progress
from mwplan.profiling.stacked import StackedLayer
from mwplan.profiling.touch import FirstTouch
from mwplan.profiling.visiting import first_layers, visit

PyTree = Any
_SCHEMA = 1


class Session:
    """Measures layers; `costs`, by their keys. To be closed: it is a context."""

    def __init__(self, repeats: int, seed: int, look_up: bool, tell: Progress) -> None:
        self.repeats, self.seed, self.look_up, self.tell = repeats, seed, look_up, tell
        self.bench = bench.Bench(repeats, seed, self.touch)
        self.costs: dict[tuple[Any, ...], Costs] = {}
        self._names: dict[Hashable, str] = {}
        self._pending: dict[tuple[Any, ...], tuple[bench.Layer, Options]] = {}
        self._touch: FirstTouch | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.bench.close()

    def touch(self) -> FirstTouch:
        """What the first touch of memory costs here."""
        if self._touch is None:
            name = cache.key("first touch", *kept_figures.surroundings())
            known = cache.known(name, FirstTouch, kind="touch", schema=_SCHEMA) if self.look_up else None
            self._touch = known or touch.measured()
            if known is None:
                cache.keep(name, self._touch, kind="touch", schema=_SCHEMA)
        return self._touch

    def prepare(
        self, chain: Chain, structs: list[PyTree], keys: list[tuple[Any, ...]], shared: Carrying
    ) -> None:
        """Looks up the layers, and has compiled what is not known."""
        futures: list[concurrent.futures.Future[Any]] = []
        firsts = first_layers(chain, keys)
        for done, (i, one) in enumerate(firsts):
            stacked, place = keys[i][-2], shared.place(i)
            work = StackedLayer(self.bench) if stacked else bench.Layer(self.bench)
            options = Options(work, one, structs[i], place)
            programs = [joint.name for joint in work.joints]
            name = kept_figures.name_of(options, programs, repr((self.repeats, stacked)))
            self._names[keys[i]] = name
            known = kept_figures.known(name) if self.look_up else None
            if known is not None:
                self.costs[keys[i]] = Costs(known, one, structs[i])
            else:
                options.derive()
                futures += work.start()
                self._pending[keys[i]] = work, options
            self.tell(done + 1, len(firsts), "reading layers")
        for done, _ in enumerate(concurrent.futures.as_completed(futures)):
            self.tell(done + 1, len(futures), "compiling operations")
        for future in futures:
            future.result()

    def measure(
        self, chain: Chain, x: PyTree, structs: list[PyTree], keys: list[tuple[Any, ...]]
    ) -> dict[int, frozenset[Name]]:
        """Times what was compiled, and measures errors. Returns, by layer, the rules that its weights
        forbid."""
        errors = Errors(chain, structs, keys, {key: self._rules(key) for key in {*keys}})
        errors.find(x, self._names, *kept_figures.surroundings(), f"{self.seed}", look_up=self.look_up)
        timed = {keys.index(key) for key in self._pending}
        last = max(errors.measured | timed, default=-1)
        compiled = {key: work.forward for key, (work, _) in self._pending.items()}
        jitted = jax.jit(operations.plain_forward, compiler_options=options_of() or None)

        def forward(i: int, one: PyTree, x: PyTree) -> PyTree:
            return compiled.get(keys[i], jitted)(one, x)

        for i, one, at in visit(chain, x, errors.sampled, forward) if last >= 0 else ():
            key = keys[i]
            if key in self._pending:
                self._settle(key, one, at)
            if i in errors.measured:
                self.costs[key].add_errors(self.bench.key, one, at, errors.unusable[i])
            self.tell(i + 1, len(keys), "measuring layers")
            if i >= last:  # nothing further on is looked at
                break
        errors.settle(self.costs)
        self.tell(len(keys), len(keys), "measuring layers")
        return errors.unusable

    def _rules(self, key: tuple[Any, ...]) -> list[Any]:
        """The rules of a layer whose errors, or whose use, values may decide."""
        if key in self.costs:
            return self.costs[key].checked()
        options = self._pending[key][1]
        return [*options.vijps, *(programs.rule for programs in options.inverses)]

    def _settle(self, key: tuple[Any, ...], one: PyTree, x: PyTree) -> None:
        """Times a layer's operations at its input."""
        work, options = self._pending.pop(key)
        shapes = jax.tree.leaves((options.layer, options.x))
        work.settle({id(leaf): value for leaf, value in zip(shapes, jax.tree.leaves((one, x)), strict=True)})
        figures = options.figures(work.workspaces())
        kept_figures.keep(self._names[key], figures)
        self.costs[key] = Costs(figures, one, options.x)
