"""One measurement of a chain: what is known already, what is compiled and timed now, and errors."""

from __future__ import annotations

import concurrent.futures
import functools
import os
from typing import Any, Self

import jax
from jaxlib import version

from mwplan.common import cache
from mwplan.compilers.compiling import memory_options, options_of
from mwplan.network import operations
from mwplan.network.chain import Chain
from mwplan.profiling import bench, touch
from mwplan.profiling.carrying import Carrying
from mwplan.profiling.layer_costs import Costs, Name, exact
from mwplan.profiling.options import Figures, Options
from mwplan.profiling.progress import Progress
from mwplan.profiling.stacked import StackedLayer
from mwplan.profiling.touch import FirstTouch
from mwplan.profiling.visiting import GROWTH_SAMPLES, first_layers, spread, visit

PyTree = Any
_KIND = "layers"
_SCHEMA = 1
_CODE = ("common", "compilers", "execution", "layers", "network", "plans", "profiling")


class Session:
    """Measures layers; `costs`, by their keys. To be closed: it is a context."""

    def __init__(self, repeats: int, seed: int, look_up: bool, tell: Progress) -> None:
        self.repeats, self.look_up, self.tell = repeats, look_up, tell
        self.bench = bench.Bench(repeats, seed, self.touch)
        self.costs: dict[tuple[Any, ...], Costs] = {}
        self._pending: dict[tuple[Any, ...], tuple[bench.Layer, Options, str]] = {}
        self._touch: FirstTouch | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.bench.close()

    def touch(self) -> FirstTouch:
        """What the first touch of memory costs here."""
        if self._touch is None:
            name = cache.key("first touch", *self._surroundings())
            known = cache.known(name, FirstTouch, kind="touch", schema=_SCHEMA) if self.look_up else None
            self._touch = known or touch.measured()
            if known is None:
                cache.keep(name, self._touch, kind="touch", schema=_SCHEMA)
        return self._touch

    def _surroundings(self) -> list[str]:
        """What figures depend on beside the programs."""
        device = jax.devices()[0]
        flags = repr((options_of(), memory_options(), _flags()))
        code = cache.sources(*_CODE)
        return [jax.__version__, version.__version__, device.platform, device.device_kind, flags, code]

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
            texts = [joint.text for joint in work.joints]
            name = cache.key(
                repr((self.repeats, stacked, place.text())), *self._surroundings(), *options.names(), *texts
            )
            known = cache.known(name, Figures, kind=_KIND, schema=_SCHEMA) if self.look_up else None
            if known is not None:
                self.costs[keys[i]] = Costs(known, one, structs[i])
            else:
                options.derive()
                futures += work.start()
                self._pending[keys[i]] = work, options, name
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
        unusable: dict[int, frozenset[Name]] = {}
        sampled = spread(keys, GROWTH_SAMPLES)
        inexact = {key for key in {*keys} if not exact(self._rules(key))}
        looked_at = {i for i, key in enumerate(keys) if key in inexact}
        timed = {keys.index(key) for key in self._pending}
        last = max(looked_at | timed, default=-1)
        forward = jax.jit(operations.plain_forward, compiler_options=options_of() or None)
        for i, one, at in visit(chain, x, sampled, forward) if last >= 0 else ():
            key = keys[i]
            if key in self._pending:
                self._settle(key, one, at)
            if i in looked_at:
                unusable[i] = self.costs[key].check(one, structs[i])
                if i in sampled:
                    self.costs[key].add_errors(self.bench.key, one, at, unusable[i])
            self.tell(i + 1, len(keys), "measuring layers")
            if i >= last:  # nothing further on is looked at
                break
        self.tell(len(keys), len(keys), "measuring layers")
        return unusable

    def _rules(self, key: tuple[Any, ...]) -> list[Any]:
        """The rules of a layer whose errors, or whose use, values may decide."""
        if key in self.costs:
            return self.costs[key].checked()
        options = self._pending[key][1]
        return [*options.vijps, *(programs.rule for programs in options.inverses)]

    def _settle(self, key: tuple[Any, ...], one: PyTree, x: PyTree) -> None:
        """Times a layer's operations at its input."""
        work, options, name = self._pending.pop(key)
        shapes = jax.tree.leaves((options.layer, options.x))
        work.settle({id(leaf): value for leaf, value in zip(shapes, jax.tree.leaves((one, x)), strict=True)})
        figures = options.figures(work.workspaces())
        cache.keep(name, figures, kind=_KIND, schema=_SCHEMA)
        self.costs[key] = Costs(figures, one, options.x)


@functools.cache
def _flags() -> str:
    """What the environment says to XLA."""
    return os.environ.get("XLA_FLAGS", "")
