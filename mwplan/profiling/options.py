"""The options of one layer, operation by operation, and what each is found to cost."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr

from mwplan.common import trees
from mwplan.common.errors import ArgumentError
from mwplan.compilers import digests
from mwplan.network import operations, rules, sketch
from mwplan.network.chain import layer_name
from mwplan.network.residuals import Residuals, new_bytes
from mwplan.plans.packing import ALIGNMENT, Workspace
from mwplan.plans.profiles import InvertOption, MoonwalkOption, StoreOption
from mwplan.profiling import trades
from mwplan.profiling.bench import Priced, Pricing, Saved, cotangent
from mwplan.profiling.carrying import Place
from mwplan.targets.crossing import Crossing, Kept

PyTree = Any
#: Of a layer's input and output together: what a whole fragment must hold more than a store does to be left
#: out, unpriced. One output more is held where a run is divided; the rest is a margin.
_ENDS_SPARED = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What the options of one layer cost, errors not yet among them: as the fields of `LayerProfile` and
    `Profile` of these names."""

    forward_ns: int
    forward_workspace_bytes: int
    parameter_bytes: int
    table_bytes: int
    store: tuple[StoreOption, ...]
    moonwalk: tuple[MoonwalkOption, ...]
    invert: tuple[InvertOption, ...]
    workspaces: tuple[Workspace, ...] = ()


class Options:
    """All options of the layer `one` (arrays, or shapes) at an input of the shapes `x`, at its `place`.

    `own` first: the plain forward, what `jax.vjp` keeps, and the layer's own rules. Their programs tell all
    that the figures depend on. `derived` adds those that any layer has.
    """

    def __init__(self, pricing: Pricing, one: PyTree, x: PyTree, place: Place) -> None:
        self.pricing, self.one, self.place = pricing, one, place
        self.layer, self.x = trees.struct(one), trees.struct(x)
        self.plain = pricing.program(operations.plain_forward, self.layer, self.x)
        pricing.together(self.plain)
        self.y = self.plain.result
        self.ct = cotangent(self.y)
        self.stores = {
            rule: _StorePrograms(self, rule)
            for rule in rules.store_rules(one, self.x)
            if rule not in rules.SMALLER
        }
        self.vijps, inverses = checked_rules(one, self.x)
        self.derived: set[str] = set()
        self._sketch: Priced | None = None
        self.walks = [
            None if isinstance(rule, rules.WholeFragment) else _MoonwalkPrograms(self, rule)
            for rule in self.vijps
        ]
        self.inverses = [_InvertPrograms(self, rule) for rule in inverses]

    def names(self) -> list[str]:
        """Those of the layer's own rules."""
        found: list[Any] = [*self.stores, *self.vijps, *(programs.rule for programs in self.inverses)]
        return [f"{type(rule).__qualname__} {rule.name}" for rule in found]

    def inverses_alone(self) -> list[str | None]:
        """The names of the inverses' programs (`mwplan.compilers.digests`): a rule's backward pass may do
        without its inverse, of which errors are measured."""

        def program(rule: rules.InvertRule) -> ClosedJaxpr:
            return jax.make_jaxpr(lambda layer, x: rule.inverse(layer, *rule.forward(layer, x)))(
                self.layer, self.x
            )

        return [digests.digest(program(programs.rule)) for programs in self.inverses]

    def derive(self) -> None:
        """The options that any layer has: keeping less than `jax.vjp` does, and the whole cotangent."""
        *own, (last, whole) = self.stores.items()
        # What packs masks needs least, but a kernel more each way.
        unpacked = [programs for programs in self.stores.values() if not programs.held.packs]
        below = min(programs.kept_bytes for programs in self.stores.values()) if unpacked else None
        offered = trades.store_rules(self.layer, self.x, self.pricing.device, below=below)
        derived = {rule: _StorePrograms(self, rule, whole) for rule in offered}
        self.derived = {rule.name for rule in derived}
        self.stores = {**dict(own), **derived, last: whole}
        for i, rule in enumerate(self.vijps):
            if self.walks[i] is None and not self._useless(rule):
                self.walks[i] = _MoonwalkPrograms(self, rule)

    def _useless(self, rule: rules.VijpRule) -> bool:
        """Whether no plan would take the layer through a moonwalk run by this rule, a whole fragment, since
        runs on either side of it, and a store that keeps less, hold less than one run. And take less time:
        the layer's reverse is most of its vjp, and its advance makes again what that needs, while a store
        that keeps less makes it again once and has the vjp besides."""
        if type(rule) is not rules.WholeFragment:
            return False
        args = (self.layer, self.x)
        held = jax.eval_shape(functools.partial(operations.forward, rule=rule), *args)[1]
        kept = new_bytes(held) + held.keeps_input * trees.nbytes(self.x)
        margin = _ENDS_SPARED * (trees.nbytes(self.x) + trees.nbytes(self.y))
        derived = (programs for programs in self.stores.values() if programs.name in self.derived)
        return any(programs.kept_bytes + margin <= kept for programs in derived)

    def sketched(self) -> Priced:
        """The sketch of what the last layer of a run rebuilds."""
        if self._sketch is None:
            self._sketch = self.pricing.program(sketch.take, trees.widen(self.ct))
        return self._sketch

    def figures(self, workspaces: tuple[Workspace, ...] = ()) -> Figures:
        """What everything costs, once it is known."""
        walks = [programs for programs in self.walks if programs is not None]
        kinds: tuple[Iterable[Any], ...] = (self.stores.values(), walks, self.inverses)
        tied = max(programs.table_bytes for kind in kinds for programs in kind)
        return Figures(
            forward_ns=self.plain.time_ns,
            forward_workspace_bytes=self.plain.workspace_bytes,
            parameter_bytes=trees.nbytes(trees.parameters(self.layer)),
            table_bytes=tied + 2 * _table_bytes((self.layer, self.x), self.y, (self.x, self.ct)),
            store=_without_lesser([programs.option() for programs in self.stores.values()], self.derived),
            moonwalk=tuple(programs.option() for programs in walks),
            invert=tuple(programs.option() for programs in self.inverses),
            workspaces=workspaces,
        )


def measure_layer(pricing: Pricing, one: PyTree, x: PyTree, place: Place) -> Figures:
    """What all options of one layer cost at its input, of a pricing that knows at once."""
    options = Options(pricing, one, x, place)
    options.derive()
    return options.figures()


def checked_rules(one: PyTree, x: PyTree) -> tuple[list[rules.VijpRule], list[rules.InvertRule]]:
    """The layer's rules that have preconditions on values, or make errors."""
    walks = [rule for rule in rules.vijp_rules(one, x) if isinstance(rule, rules.VijpRule)]
    return walks, [rule for rule in rules.invert_rules(one, x) if isinstance(rule, rules.InvertRule)]


def _without_lesser(options: list[StoreOption], derived: set[str]) -> tuple[StoreOption, ...]:
    """Without the `derived` ones that no budget would use: another is as fast, keeps as little, and needs as
    little at every moment. And without the last, what `jax.vjp` keeps, where another option keeps the same
    and needs less beside it: which of two such programs is the faster, times do not tell. Less by more than
    scalars and padding, of which an estimate knows nothing."""

    def kept(option: StoreOption) -> tuple[int, bool, bool]:
        return option.residual_bytes, option.keeps_input, option.keeps_output

    def needs(option: StoreOption) -> tuple[int, ...]:
        backward = option.residual_bytes + option.backward_workspace_bytes
        saved = backward - option.backward_saving_bytes
        forward = option.residual_bytes + option.forward_workspace_bytes
        return *kept(option), forward, backward, saved, option.forward_ns + option.backward_ns

    some: list[StoreOption] = []
    for at, one in enumerate(options):
        others = [*some, *options[at + 1 :]]
        used = one.name not in derived or not any(
            all(a <= b for a, b in zip(needs(other), needs(one), strict=True)) for other in others
        )
        some += [one] * used
    *others, last = some
    spared = any(
        kept(one) == kept(last) and one.backward_workspace_bytes + ALIGNMENT < last.backward_workspace_bytes
        for one in others
    )
    return tuple(others if spared else some)


def _table_bytes(*tied: PyTree) -> int:
    """Of the tables of pointers to the arrays of each of `tied` (`Profile.table_bytes`)."""
    counts = (sum(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(tree)) for tree in tied)
    return sum(-(-8 * count // 64) * 64 for count in counts if count > 1)


class _StorePrograms:
    """The operations of one way to store a layer; by less than `whole` keeps, and the more work, if it is
    given."""

    def __init__(self, options: Options, rule: rules.StoreRule, whole: _StorePrograms | None = None) -> None:
        self.name, self.x, place = rule.name, options.x, options.place
        rule = place.store(rule, options.x, options.y)
        self.forward, self.held = _forward(options, rule)
        y = self.forward.result[0]
        shared = _shared(self.held, options.x, y)
        backward = functools.partial(operations.store_backward, rule=rule)
        ct = place.after.dropped(options.ct)
        args = (options.layer, self.held, *shared, ct)
        self.backward = options.pricing.program(backward, *args)
        ends = (place.before.new(shared[0]), place.after.new(shared[1]))
        dead, temporary = (self.held.own, ends, ct), self.backward.result[1]
        self.saving = options.pricing.saving(self.backward, dead=dead, temporary=temporary)
        apart = place.cotangents_apart(options.x, options.y, idle=False)
        self.apart = _Apart(options.pricing, self.backward, (self.held.own, ct), temporary, apart)
        self.ct_bytes, self.ct_in_bytes = trees.nbytes(ct), trees.nbytes(temporary)
        self.pair = self.crossing = None
        if (new_bytes(self.held) or self.held.keeps_output) and not apart:
            self.crossing = options.pricing.crossing(
                self.forward,
                self.backward,
                ends=(place.before.new(options.x), place.after.new(y)),
                ct=ct,
                grads=self.backward.result[0],
            )
        if whole is None:
            self.pair = options.pricing.together(self.forward, self.backward, free=True)
        else:
            options.pricing.derive(self.forward, whole.forward, options.plain)
            options.pricing.derive(self.backward, whole.backward, options.plain)
        self.table_bytes = _table_bytes(
            (options.layer, options.x), self.forward.result, args, self.backward.result
        )

    @property
    def kept_bytes(self) -> int:
        """What is kept, the layer's input counted and its output not: the next layer's is there anyway."""
        return new_bytes(self.held) + self.held.keeps_input * trees.nbytes(self.x)

    def option(self) -> StoreOption:
        """What it costs."""
        told = StoreOption(
            name=self.name,
            residual_bytes=new_bytes(self.held),
            keeps_input=self.held.keeps_input,
            keeps_output=self.held.keeps_output,
            forward_ns=self.forward.time_ns,
            backward_ns=self.backward.time_ns,
            forward_workspace_bytes=self.forward.workspace_bytes,
            backward_workspace_bytes=self.apart.workspace_bytes,
            backward_saving_bytes=self.apart.saving_bytes(self.saving),
        )
        if self.crossing is not None:
            return _as_compiled(told, self.crossing, self.ct_bytes + self.ct_in_bytes)
        if self.pair is None:
            return told
        # The compiler may keep other arrays than `jax.vjp`, which it does not write over.
        most = told.residual_bytes + told.backward_workspace_bytes + self.ct_bytes - self.pair.temporary_bytes
        return dataclasses.replace(
            told,
            backward_workspace_bytes=told.backward_workspace_bytes - min(0, most),
            backward_saving_bytes=min(told.backward_saving_bytes, max(0, most)),
        )


def _as_compiled(told: StoreOption, crossing: Crossing, cotangent_bytes: int) -> StoreOption:
    """An option with what a compiler keeps instead of what it is told to (`mwplan.targets.crossing`);
    `cotangent_bytes`, of the layer's output and input together."""
    kept, (x_bytes, y_bytes) = crossing.kept(told.residual_bytes), crossing.end_bytes

    def forward(residual: int, workspace: int) -> int:
        return x_bytes + y_bytes + residual + workspace

    def backward(one: StoreOption | Kept, workspace: int) -> int:
        held = one.residual_bytes + one.keeps_input * x_bytes + one.keeps_output * y_bytes
        return held + cotangent_bytes + workspace

    # What both passes need is what that needs which needs more; the other backward needs no more than that.
    before = forward(told.residual_bytes, told.forward_workspace_bytes)
    after = backward(told, told.backward_workspace_bytes) - told.backward_saving_bytes
    needs, room = kept.needs_bytes - crossing.grad_bytes, kept.needs_bytes - forward(kept.residual_bytes, 0)
    workspace = told.forward_workspace_bytes
    if before > after:
        needs, workspace = min(needs, after), max(workspace, room)
    more = backward(kept, told.backward_workspace_bytes) - needs
    return dataclasses.replace(
        told,
        residual_bytes=kept.residual_bytes,
        keeps_input=kept.keeps_input,
        keeps_output=kept.keeps_output,
        forward_workspace_bytes=workspace,
        backward_workspace_bytes=told.backward_workspace_bytes - min(0, more),
        backward_saving_bytes=max(0, more),
    )


class _Apart:
    """An operation backward whose cotangents are partly counted for the whole chain, once: those of its
    output and its input together are `apart` bytes more than that. They are workspace, but for what the
    operation writes in their place whether or not it is the last to use an activation."""

    def __init__(self, pricing: Pricing, handle: Any, dead: PyTree, temporary: PyTree, apart: int) -> None:
        self.handle, self.apart = handle, apart
        self.saving = pricing.saving(handle, dead=dead, temporary=temporary) if apart else None

    @property
    def in_place(self) -> int:
        """What is written in their place."""
        return 0 if self.saving is None else min(self.apart, self.saving.saving_bytes)

    @property
    def workspace_bytes(self) -> int:
        """The operation's."""
        workspace: int = self.handle.workspace_bytes
        return workspace + self.apart - self.in_place

    def saving_bytes(self, saving: Saved) -> int:
        """What is left of a saving."""
        return max(0, saving.saving_bytes - self.in_place)


class _MoonwalkPrograms:
    """The operations of one way through a moonwalk run."""

    def __init__(self, options: Options, rule: rules.VijpRule) -> None:
        self.rule = rule
        pricing, one, x = options.pricing, options.layer, options.x
        self.whole = isinstance(rule, rules.WholeFragment)
        self.forward, self.held = _forward(options, rule)
        y = self.forward.result[0]
        wide = trees.widen(options.ct)
        args: tuple[Any, ...] = (one, self.held, *_shared(self.held, x, y), wide)
        self.reverse = pricing.program(functools.partial(operations.reverse, rule=rule), *args)
        self.table_bytes = _table_bytes((one, x), self.forward.result, args, self.reverse.result)
        ct_in, self.fragment = self.reverse.result
        dead: Any = (self.held.own, () if self.whole else wide)
        temporary = ct_in if self.whole else self.reverse.result
        self.reverse_saving = pricing.saving(self.reverse, dead=dead, temporary=temporary)
        args = (one, x, ct_in, self.fragment)
        self.vijp = pricing.program(functools.partial(operations.vijp, rule=rule), *args)
        rebuilt = self.vijp.result
        dead, temporary = ((), ()) if self.whole else ((ct_in, self.fragment), rebuilt)
        self.rebuild_saving = pricing.saving(self.vijp, dead=dead, temporary=temporary)
        self.sketched = options.sketched()
        self.last = pricing.program(functools.partial(operations.advance, last=True), one, x, rebuilt)
        self.going_on = pricing.program(functools.partial(operations.advance, last=False), one, x, rebuilt)
        after, grads = self.going_on.result
        place = options.place
        dead, temporary = place.before.new(x), place.after.new(after)
        self.advance_saving = pricing.saving(self.going_on, dead=dead, temporary=temporary)
        if not self.whole:
            # Other layers' runs end in layers like this one: what is timed is the gradient alone, `last`.
            pricing.together(self.forward, self.reverse, self.vijp, self.last)
        self.table_bytes += _table_bytes(
            args, rebuilt, (one, x, rebuilt), (x, grads), self.going_on.result, (ct_in, grads, x)
        )

    def option(self) -> MoonwalkOption:
        """What it costs."""
        return MoonwalkOption(
            name=self.rule.name,
            residual_bytes=new_bytes(self.held),
            keeps_input=self.held.keeps_input,
            keeps_output=self.held.keeps_output,
            fragment_bytes=trees.nbytes(self.fragment),
            forward_ns=self.forward.time_ns,
            reverse_ns=self.reverse.time_ns,
            rebuild_ns=(0 if self.whole else self.vijp.time_ns) + self.last.time_ns,
            forward_workspace_bytes=self.forward.workspace_bytes,
            reverse_workspace_bytes=self.reverse.workspace_bytes,
            rebuild_workspace_bytes=self.vijp.workspace_bytes,
            advance_workspace_bytes=self.going_on.workspace_bytes,
            last_workspace_bytes=max(self.last.workspace_bytes, self.sketched.workspace_bytes),
            reverse_saving_bytes=self.reverse_saving.saving_bytes,
            rebuild_saving_bytes=self.rebuild_saving.saving_bytes,
            advance_saving_bytes=self.advance_saving.saving_bytes,
            fragment_is_cotangent=self.whole,
        )


class _InvertPrograms:
    """The operations of one way to invert a layer."""

    def __init__(self, options: Options, rule: rules.InvertRule) -> None:
        self.rule = rule
        pricing, one, x = options.pricing, options.layer, options.x
        if not rule.keeps:
            # A composite's rule that keeps nothing still keeps a tuple of as many nothings as it has parts.
            forward = functools.partial(operations.forward, rule=rule)
            self.forward, self.held = options.plain, jax.eval_shape(forward, one, x)[1]
            y = options.y
        else:
            self.forward, self.held = _forward(options, rule)
            y = self.forward.result[0]
            if self.held.keeps_input or self.held.keeps_output:
                raise ArgumentError(
                    f"{type(rule).__name__}, a rule of {layer_name(options.one)}, keeps the layer's input or "
                    "output: an inverse may keep only other arrays"
                )
        args = (one, self.held, y, options.ct, None)
        self.backward = pricing.program(functools.partial(operations.invert_backward, rule=rule), *args)
        before, _, ct_in = self.backward.result
        place = options.place
        dead = (self.held.own, place.after.new(y), options.ct)
        temporary = (place.before.new(before), ct_in)
        self.saving = pricing.saving(self.backward, dead=dead, temporary=temporary)
        # Within a run all cotangents are there.
        apart = place.cotangents_apart(x, options.y, idle=True)
        self.apart = _Apart(pricing, self.backward, (self.held.own, options.ct), ct_in, apart)
        pricing.together(self.forward, self.backward)
        self.table_bytes = _table_bytes((one, y), args, self.backward.result, (y, options.ct))

    def option(self) -> InvertOption:
        """What it costs."""
        return InvertOption(
            name=self.rule.name,
            residual_bytes=new_bytes(self.held),
            forward_ns=self.forward.time_ns,
            forward_workspace_bytes=self.forward.workspace_bytes,
            backward_ns=self.backward.time_ns,
            backward_workspace_bytes=self.apart.workspace_bytes,
            backward_saving_bytes=self.apart.saving_bytes(self.saving),
        )


def _forward(options: Options, rule: Any) -> tuple[Any, Residuals]:
    """The forward that keeps the rule's residuals, and what is held."""
    forward: Callable[..., Any] = functools.partial(operations.forward, rule=rule)
    handle = options.pricing.program(forward, options.layer, options.x)
    return handle, handle.result[1]


def _shared(held: Residuals, x: PyTree, y: PyTree) -> tuple[PyTree, PyTree]:
    return x if held.keeps_input else None, y if held.keeps_output else None
