"""Measures what each way of handling each layer costs on this device.

Every operation that a step may execute is compiled alone, exactly as the executor calls it: its time is the
median of runs after a warm-up, less what an empty call costs; its workspace is the compiled program's
temporaries; its residuals and fragments are counted from the shapes it returns. Layers with the same
structure, parameter shapes and input share one measurement; of stacks deeper than 64 repetitions the
preconditions are checked at those few whose growth is measured.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax

from mwplan.common import trees
from mwplan.common.errors import ArgumentError
from mwplan.execution.repeats import LEAST_REPETITIONS
from mwplan.network import operations, residuals, rules, sharding, sketch
from mwplan.network.chain import Chain, Stack, boundaries, check_chain, fingerprint, layer_name, signatures
from mwplan.network.residuals import Residuals, new_bytes
from mwplan.plans.packing import Workspace
from mwplan.plans.profiles import InvertOption, LayerProfile, MoonwalkOption, Profile, StoreOption
from mwplan.profiling import growth
from mwplan.profiling.bench import Bench, Priced, Pricing
from mwplan.profiling.stacked import StackedBench

PyTree = Any
CHECKED_REPETITIONS = 64  # of a deeper stack, only the repetitions whose growth is measured are checked
# layers of one signature whose errors are measured; the largest count for all (inverses' growth:
# `growth.steady`)
GROWTH_SAMPLES = 8


def profile(
    chain: Chain,
    x: PyTree,
    *,
    repeats: int = 5,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Profile:
    """Measures every layer of `chain` at input `x`, on the default device.

    Of arrays on a mesh (`jax.NamedSharding`) the figures are those of one device: `x` counts by its shard,
    which is what a data-parallel step's device works on. Weights are gathered for the measurement, as for
    their use in a step; `fixed_bytes` counts their shards (and gradients sharded like them). What is not
    modelled: activations sharded other than by `x`, the communication and its buffers.

    **Arguments:** `chain`; `x`, concrete arrays of the shape that will be trained on; `repeats`, timed runs
    of each operation (the median counts); `seed`, of the random cotangents; `progress(done, layers, name)`,
    called after each layer.
    **Returns:** a `Profile`: bytes and nanoseconds as integers, each option's local error and growth, and
    what an inverse's error does to gradients.
    **Raises:** `ChainError` where a layer does not accept what it gets; `ArgumentError` for abstract inputs.
    **Cost:** a compilation for each operation of each distinct layer, and some runs of it. Memory: that of
    one layer's operations and its activations.

    >>> profile = mw.profile(mw.Chain([jnp.tanh] * 2), jnp.ones((256, 64)), repeats=1)
    >>> len(profile.layers), profile.activation_bytes
    (2, (65536, 65536, 65536))
    """
    check_chain(chain)
    leaves = jax.tree.leaves((chain, x))
    if any(isinstance(leaf, (jax.core.Tracer, jax.ShapeDtypeStruct)) for leaf in leaves):
        raise ArgumentError(
            "`chain` and `x` must be concrete arrays, to be measured: call `mw.profile` outside `jax.jit`; "
            "of shapes alone there is "
            "`mw.estimate` (`--device` on the command line)"
        )
    if repeats < 1:
        raise ArgumentError(f"`repeats={repeats}` must be at least 1")
    fixed = sum(map(sharding.local_bytes, (chain, trees.parameters(chain), x)))
    chain, x = sharding.gathered(chain), sharding.local(x)
    structs = boundaries(chain, x)
    bench = Bench(repeats, seed)
    names = layer_names(chain)
    keys = layer_keys(chain, structs)
    sampled = spread(keys, GROWTH_SAMPLES)
    measured: dict[Hashable, Costs] = {}
    unusable: dict[int, frozenset[Name]] = {}  # by layer: the rules that its weights forbid
    for i, one, at in visit(chain, x, sampled, bench.forward):
        if keys[i] not in measured:
            measured[keys[i]] = measure_layer(StackedBench(bench) if keys[i][-1] else bench, one, at)
        unusable[i] = measured[keys[i]].check(one, structs[i])
        if i in sampled:
            measured[keys[i]].add_errors(bench.key, one, at, unusable[i])
        if progress is not None:
            progress(i + 1, len(chain), names[i])
    device = jax.devices()[0]
    return assemble(
        chain,
        structs,
        [(names[i], measured[key], unusable.get(i)) for i, key in enumerate(keys)],
        fixed_bytes=fixed,
        fresh=bench.fresh(),
        workspaces=bench.workspaces(),
        device=f"{device.platform}:{device.device_kind}",
        source=f"measured, jax {jax.__version__}, median of {repeats}",
    )


def assemble(
    chain: Chain,
    structs: list[PyTree],
    layers: list[tuple[str, Costs, frozenset[Name] | None]],
    *,
    fixed_bytes: int,
    fresh: tuple[int, int],
    device: str,
    source: str,
    workspaces: tuple[Workspace, ...] = (),
) -> Profile:
    """The profile of a chain from each layer's name, costs and the rules that its weights forbid (None: not
    looked at); `fresh`, as `Bench.fresh`."""
    residuals.forget()
    known: dict[Any, LayerProfile] = {}
    profiles = []
    counts = collections.Counter(id(costs) for _, costs, _ in layers)
    for (name, costs, seen), place in zip(layers, chain.places()):
        forbidden = frozenset(costs.unusable) if seen is None else seen
        depth = _depth(chain.parts[place.part])
        loops = depth if depth >= LEAST_REPETITIONS else 1
        if (id(costs), forbidden, loops) not in known:
            known[id(costs), forbidden, loops] = costs.layer_profile(
                name, forbidden, counts[id(costs)], loops
            )
        profiles.append(known[id(costs), forbidden, loops])
    return Profile(
        layers=tuple(profiles),
        activation_bytes=tuple(trees.nbytes(s) for s in structs),
        cotangent_bytes=tuple(trees.nbytes(trees.parameters(s)) for s in structs),
        sweep_cotangent_bytes=tuple(
            trees.nbytes(jax.eval_shape(trees.widen, trees.parameters(s))) for s in structs
        ),
        fixed_bytes=fixed_bytes,
        kept_bytes=fresh[0],
        fresh_mib_ns=fresh[1],
        workspaces=workspaces,
        fingerprint=fingerprint(chain),
        device=device,
        source=source,
    )


def _block(part: Any) -> tuple[Any, ...]:
    return part.block if isinstance(part, Stack) else (part,)


def _depth(part: Any) -> int:
    return part.depth if isinstance(part, Stack) else 1


def layer_names(chain: Chain) -> list[str]:
    """What each layer is called in tables."""
    return [layer_name(one) for part in chain.parts for one in _block(part) * _depth(part)]


def layer_keys(chain: Chain, structs: list[PyTree]) -> list[tuple[Any, ...]]:
    """What layers that share one measurement share: structure, parameter shapes, input, whether stacked."""
    trees_ = [jax.tree.structure(one) for part in chain.parts for one in _block(part) * _depth(part)]
    texts = [str(struct) for struct in structs]
    stacked = [isinstance(chain.parts[place.part], Stack) for place in chain.places()]
    return list(zip(trees_, signatures(chain), texts, stacked))


def visit(
    chain: Chain, x: PyTree, sampled: set[int], forward: Callable[[PyTree, PyTree], PyTree]
) -> Iterator[tuple[int, Any, PyTree]]:
    """`(index, layer, input)` of every layer; of a deep stack only the repetitions where a layer is sampled.

    `forward(layer, x)` is the layer's output.
    """
    i = 0
    for part in chain.parts:
        block, depth = _block(part), _depth(part)
        at = 0  # the repetition that x is the input of
        chosen = {(k - i) // len(block) for k in sampled if i <= k < i + len(block) * depth}
        for n in range(depth) if depth <= CHECKED_REPETITIONS else sorted(chosen):
            if at < n:
                x = _through(part, x, at, n)
            for j in range(len(block)):
                one = part.layer(n, j) if isinstance(part, Stack) else part
                yield i + n * len(block) + j, one, x
                x = forward(one, x)
            at = n + 1
        if at < depth:
            x = _through(part, x, at, depth)
        i += len(block) * depth


@jax.jit
def _through(part: Stack, x: PyTree, start: int, stop: int) -> PyTree:
    """`x` after the repetitions `start .. stop - 1`."""

    def step(n: Any, x: PyTree) -> PyTree:
        return functools.reduce(lambda x, j: part.layer(n, j)(x), range(len(part.block)), x)

    return jax.lax.fori_loop(start, stop, step, x)


def spread(keys: Sequence[Hashable], count: int) -> set[int]:
    """Up to `count` positions of each key, evenly spread, the first and the last among them."""
    positions: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        positions.setdefault(key, []).append(i)
    chosen: set[int] = set()
    for where in positions.values():
        n = min(count, len(where))
        chosen.update(where[round(k * (len(where) - 1) / max(1, n - 1))] for k in range(n))
    return chosen


Name = tuple[bool, str]


def name_of(rule: rules.VijpRule | rules.InvertRule) -> Name:
    """What tells the rules of one layer apart: a vijp and an inverse may share a name."""
    return isinstance(rule, rules.InvertRule), rule.name


class Costs:
    """What one signature's options cost, and the largest errors seen among the layers that share it."""

    def __init__(self) -> None:
        self.forward_ns = 0
        self.forward_workspace_bytes = 0
        self.parameter_bytes = 0
        self.table_bytes = 0
        self.store: list[StoreOption] = []
        self.moonwalk: list[tuple[rules.VijpRule, MoonwalkOption]] = []
        self.invert: list[tuple[rules.InvertRule, InvertOption]] = []
        self.errors: dict[Name, tuple[float, ...]] = {}
        self.growths: dict[Name, list[float]] = {}  # of inverses, layer after layer
        self.unusable: set[Name] = set()  # what any layer that was looked at forbids

    def checked(self) -> list[rules.VijpRule | rules.InvertRule]:
        """The rules that have preconditions on values."""
        return [rule for rule, _ in self.moonwalk] + [rule for rule, _ in self.invert]

    def check(self, one: PyTree, struct: PyTree) -> frozenset[Name]:
        """The rules that the weights of one of the layers, at inputs like `struct`, forbid; takes note of
        them."""
        forbidden = frozenset(name_of(rule) for rule in self.checked() if rule.check(one, struct) is not None)
        self.unusable |= forbidden
        return forbidden

    def add_errors(self, key: jax.Array, one: PyTree, x: PyTree, unusable: frozenset[Name]) -> None:
        """Measures the errors of every usable rule at one layer, and keeps the largest."""
        for rule in self.checked():
            name = name_of(rule)
            if name in unusable:
                continue
            got: tuple[float, ...]
            if isinstance(rule, rules.VijpRule):
                got = growth.measure(one, rule, x, key)
            else:
                got = growth.measure_inverse(one, rule, x, key)
            # Not a number is an error of unknown size: unusable.
            got = tuple(math.inf if math.isnan(value) else value for value in got)
            self.errors[name] = tuple(map(max, got, self.errors.get(name, got)))
            if isinstance(rule, rules.InvertRule):
                self.growths.setdefault(name, []).append(got[1])

    def layer_profile(self, name: str, unusable: frozenset[Name], count: int, loops: int) -> LayerProfile:
        """The profile of one of the `count` layers that share these costs; one loop repeats `loops` of
        them."""

        def option(rule: rules.VijpRule | rules.InvertRule, costs: Any) -> Any:
            # A rule of moonwalk runs has the first two alone.
            fields = ("local_error", "growth", "sensitivity", "gradient_sensitivity", "kink")
            found = dict(zip(fields, self.errors.get(name_of(rule), ())))
            if seen := self.growths.get(name_of(rule)):
                found["growth"] = growth.steady(seen, count / len(seen))
            return dataclasses.replace(costs, **found)

        return LayerProfile(
            name=name,
            forward_ns=self.forward_ns,
            forward_workspace_bytes=self.forward_workspace_bytes,
            parameter_bytes=self.parameter_bytes,
            table_bytes=-(-self.table_bytes // loops),
            store=tuple(self.store),
            moonwalk=tuple(option(r, o) for r, o in self.moonwalk if name_of(r) not in unusable),
            invert=tuple(option(r, o) for r, o in self.invert if name_of(r) not in unusable),
        )


def _without_lesser(options: list[StoreOption]) -> list[StoreOption]:
    """Without the last, what `jax.vjp` keeps, where another option keeps the same and needs less beside it:
    which of two such programs is the faster, times do not tell."""
    *others, last = options

    def kept(option: StoreOption) -> tuple[int, bool, bool]:
        return option.residual_bytes, option.keeps_input, option.keeps_output

    spared = any(
        kept(one) == kept(last) and one.backward_workspace_bytes < last.backward_workspace_bytes
        for one in others
    )
    return others if spared else options


def measure_layer(bench: Pricing, one: PyTree, x: PyTree) -> Costs:
    """What all options of one layer cost at its input: measured, or whatever else `bench` does."""
    plain = bench.program(operations.plain_forward, one, x)
    y = plain.result
    plain = bench.in_place(plain, operations.plain_forward, one, x, dead=x)
    ct_out = bench.cotangent(y)
    stores = [_StorePrograms(bench, rule, one, x, ct_out) for rule in operations.store_rules(one, x)]
    sketched = bench.program(sketch.take, trees.widen(ct_out))  # as of what the last layer of a run rebuilds
    walks = [
        _MoonwalkPrograms(bench, rule, one, x, ct_out, sketched.workspace_bytes)
        for rule in rules.vijp_rules(one, x)
        if isinstance(rule, rules.VijpRule)
    ]
    inverses = [
        _InvertPrograms(bench, rule, one, x, y, ct_out, plain)
        for rule in rules.invert_rules(one, x)
        if isinstance(rule, rules.InvertRule)
    ]
    bench.settle()
    costs = Costs()
    costs.forward_ns, costs.forward_workspace_bytes = plain.time_ns, plain.workspace_bytes
    costs.parameter_bytes = trees.nbytes(trees.parameters(one))
    tied = [[programs.table_bytes for programs in kind] for kind in (stores, walks, inverses)]
    costs.table_bytes = max(map(max, filter(None, tied))) + 2 * _table_bytes((one, x), y, (x, ct_out))
    costs.store = _without_lesser([programs.option() for programs in stores])
    costs.moonwalk = [(programs.rule, programs.option()) for programs in walks]
    costs.invert = [(programs.rule, programs.option()) for programs in inverses]
    return costs


def _table_bytes(*tied: PyTree) -> int:
    """Of the tables of pointers to the arrays of each of `tied` (`Profile.table_bytes`)."""
    counts = (sum(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(tree)) for tree in tied)
    return sum(-(-8 * count // 64) * 64 for count in counts if count > 1)


class _StorePrograms:
    """The operations of one way to store a layer."""

    def __init__(self, bench: Pricing, rule: rules.StoreRule, one: PyTree, x: PyTree, ct_out: PyTree) -> None:
        self.name = rule.name
        self.forward, y, self.held = _forward(bench, rule, one, x)
        shared = _shared(self.held, x, y)
        backward = functools.partial(operations.store_backward, rule=rule)
        args = (one, self.held, *shared, ct_out)
        dead = (self.held.own, shared, ct_out)
        self.backward = bench.in_place(bench.program(backward, *args), backward, *args, dead=dead)
        self.saving = bench.saving(
            self.backward, backward, *args, dead=dead, outputs=lambda result: result[1]
        )
        self.table_bytes = _table_bytes((one, x), self.forward.result, args, self.backward.result)

    def option(self) -> StoreOption:
        """What it costs."""
        return StoreOption(
            name=self.name,
            residual_bytes=new_bytes(self.held),
            keeps_input=self.held.keeps_input,
            keeps_output=self.held.keeps_output,
            forward_ns=self.forward.time_ns,
            backward_ns=self.backward.time_ns,
            forward_workspace_bytes=self.forward.workspace_bytes,
            backward_workspace_bytes=self.backward.workspace_bytes,
            backward_saving_bytes=self.saving,
        )


class _MoonwalkPrograms:
    """The operations of one way through a moonwalk run."""

    def __init__(
        self, bench: Pricing, rule: rules.VijpRule, one: PyTree, x: PyTree, ct_out: PyTree, sketch_bytes: int
    ) -> None:
        self.rule = rule
        self.sketch_bytes = sketch_bytes
        self.forward, y, self.held = _forward(bench, rule, one, x)
        wide = trees.widen(ct_out)
        reverse = functools.partial(operations.reverse, rule=rule)
        args: tuple[Any, ...] = (one, self.held, *_shared(self.held, x, y), wide)
        whole = isinstance(rule, rules.WholeFragment)
        dead: Any = (self.held.own, () if whole else wide)
        self.reverse = bench.in_place(bench.program(reverse, *args), reverse, *args, dead=dead)
        self.savings = [
            bench.saving(
                self.reverse,
                reverse,
                *args,
                dead=dead,
                outputs=lambda result: result[0] if whole else result,
            )
        ]
        self.table_bytes = _table_bytes((one, x), self.forward.result, args, self.reverse.result)
        ct_in, self.fragment = self.reverse.result
        vijp = functools.partial(operations.vijp, rule=rule)
        args = (one, x, ct_in, self.fragment)
        dead = (ct_in, self.fragment)
        self.vijp = bench.in_place(bench.program(vijp, *args), vijp, *args, dead=() if whole else dead)
        self.savings.append(
            0 if whole else bench.saving(self.vijp, vijp, *args, dead=dead, outputs=lambda result: result)
        )
        self.last = bench.program(functools.partial(operations.advance, last=True), one, x, wide)
        going_on = functools.partial(operations.advance, last=False)
        self.going_on = bench.program(going_on, one, x, wide)
        self.savings.append(
            bench.saving(self.going_on, going_on, one, x, wide, dead=x, outputs=lambda result: result[0])
        )
        grads = self.going_on.result[1]
        self.table_bytes += _table_bytes(
            args, self.vijp.result, (one, x, wide), (x, grads), self.going_on.result, (ct_in, grads, x)
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
            rebuild_ns=self.vijp.time_ns + self.last.time_ns,
            forward_workspace_bytes=self.forward.workspace_bytes,
            reverse_workspace_bytes=self.reverse.workspace_bytes,
            rebuild_workspace_bytes=self.vijp.workspace_bytes,
            advance_workspace_bytes=self.going_on.workspace_bytes,
            last_workspace_bytes=max(self.last.workspace_bytes, self.sketch_bytes),
            reverse_saving_bytes=self.savings[0],
            rebuild_saving_bytes=self.savings[1],
            advance_saving_bytes=self.savings[2],
            fragment_is_cotangent=isinstance(self.rule, rules.WholeFragment),
        )


class _InvertPrograms:
    """The operations of one way to invert a layer; `plain`, its forward that keeps nothing."""

    def __init__(
        self,
        bench: Pricing,
        rule: rules.InvertRule,
        one: PyTree,
        x: PyTree,
        y: PyTree,
        ct_out: PyTree,
        plain: Priced,
    ) -> None:
        self.rule = rule
        if not rule.keeps:
            # A composite's rule that keeps nothing still keeps a tuple of as many nothings as it has parts.
            forward = functools.partial(operations.forward, rule=rule)
            self.forward, self.held = plain, jax.eval_shape(forward, one, x)[1]
        else:
            self.forward, _, self.held = _forward(bench, rule, one, x)
            if self.held.keeps_input or self.held.keeps_output:
                raise ArgumentError(
                    f"{type(rule).__name__}, a rule of {layer_name(one)}, keeps the layer's input or output: "
                    "an inverse may keep only other arrays"
                )
        backward = functools.partial(operations.invert_backward, rule=rule)
        args = (one, self.held, y, ct_out, None)
        dead = (self.held.own, y, ct_out)
        self.backward = bench.in_place(bench.program(backward, *args), backward, *args, dead=dead)
        self.saving = bench.saving(
            self.backward, backward, *args, dead=dead, outputs=lambda result: (result[0], result[2])
        )
        self.table_bytes = _table_bytes((one, y), args, self.backward.result, (y, ct_out))

    def option(self) -> InvertOption:
        """What it costs."""
        return InvertOption(
            name=self.rule.name,
            residual_bytes=new_bytes(self.held),
            forward_ns=self.forward.time_ns,
            forward_workspace_bytes=self.forward.workspace_bytes,
            backward_ns=self.backward.time_ns,
            backward_workspace_bytes=self.backward.workspace_bytes,
            backward_saving_bytes=self.saving,
        )


def _forward(bench: Pricing, rule: Any, one: PyTree, x: PyTree) -> tuple[Priced, PyTree, Residuals]:
    """The forward that keeps the rule's residuals, the output and what is held."""
    forward = functools.partial(operations.forward, rule=rule)
    handle = bench.program(forward, one, x)
    y, held = handle.result
    dead = () if held.keeps_input else x
    return bench.in_place(handle, forward, one, x, dead=dead), y, held


def _shared(held: Residuals, x: PyTree, y: PyTree) -> tuple[PyTree, PyTree]:
    return x if held.keeps_input else None, y if held.keeps_output else None
