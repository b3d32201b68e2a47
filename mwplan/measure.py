"""Measures what each way of handling each layer costs on this device.

Every operation that a step may execute is compiled alone, exactly as the executor calls it: its time is the median of runs
after a warm-up, less what an empty call costs; its workspace is the compiled program's temporaries; its residuals and fragments are counted from
the shapes it returns. Layers with the same structure, parameter shapes and input share one measurement.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mwplan import growth, operations, rules, trees
from mwplan.chain import Chain, boundaries, check_chain, fingerprint, layer_name, layer_signature
from mwplan.compiling import options_of, temporaries
from mwplan.errors import ArgumentError
from mwplan.profiles import InvertOption, LayerProfile, MoonwalkOption, Profile, StoreOption
from mwplan.residuals import new_bytes

PyTree = Any
GROWTH_SAMPLES = 8  # layers of one signature whose growth is measured; the largest counts for all


def profile(
    chain: Chain,
    x: PyTree,
    *,
    repeats: int = 5,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Profile:
    """Measures every layer of `chain` at input `x`, on the default device.

    **Arguments:** `chain`; `x`, concrete arrays of the shape that will be trained on; `repeats`, timed runs of each operation (the
    median counts); `seed`, of the random cotangents; `progress(done, layers, name)`, called after each layer.
    **Returns:** a `Profile`: bytes and nanoseconds as integers, each option's local error and growth.
    **Raises:** `ChainError` where a layer does not accept what it gets; `ArgumentError` for abstract inputs.
    **Cost:** a compilation for each operation of each distinct layer, and some runs of it. Memory: that of one layer's
    operations and its activations.
    """
    check_chain(chain)
    leaves = jax.tree.leaves((chain, x))
    if any(isinstance(leaf, (jax.core.Tracer, jax.ShapeDtypeStruct)) for leaf in leaves):
        raise ArgumentError("`chain` and `x` must be concrete arrays: call `mw.profile` outside `jax.jit`")
    if repeats < 1:
        raise ArgumentError(f"`repeats={repeats}` must be at least 1")
    structs = boundaries(chain, x)
    bench = _Bench(repeats, seed)
    keys = [layer_signature(one) + str(structs[i]) for i, one in enumerate(chain.layers)]
    sampled = _spread(keys, GROWTH_SAMPLES)
    measured: dict[str, _Costs] = {}
    unusable: list[frozenset[str]] = []  # by layer: the rules that its present weights forbid
    for i, one in enumerate(chain.layers):
        if keys[i] not in measured:
            measured[keys[i]] = _costs(bench, one, x)
        costs = measured[keys[i]]
        unusable.append(
            frozenset(rule.name for rule in costs.checked() if rule.check(one, structs[i]) is not None)
        )
        if i in sampled:
            costs.add_errors(bench, one, x, unusable[i])
        x = bench.run(operations.plain_forward, one, x)
        if progress is not None:
            progress(i + 1, len(chain), layer_name(one))
    profiles = tuple(
        measured[keys[i]].layer_profile(layer_name(one), unusable[i]) for i, one in enumerate(chain.layers)
    )
    params = trees.nbytes(trees.parameters(chain))
    device = jax.devices()[0]
    return Profile(
        layers=profiles,
        activation_bytes=tuple(trees.nbytes(s) for s in structs),
        cotangent_bytes=tuple(trees.nbytes(trees.parameters(s)) for s in structs),
        sweep_cotangent_bytes=tuple(
            trees.nbytes(jax.eval_shape(trees.widen, trees.parameters(s))) for s in structs
        ),
        fixed_bytes=trees.nbytes(chain) + params + trees.nbytes(structs[0]),
        fingerprint=fingerprint(chain),
        device=f"{device.platform}:{device.device_kind}",
        source=f"measured, jax {jax.__version__}, median of {repeats}",
    )


def _spread(keys: list[str], count: int) -> set[int]:
    """Up to `count` positions of each key, evenly spread, the first and the last among them."""
    positions: dict[str, list[int]] = {}
    for i, key in enumerate(keys):
        positions.setdefault(key, []).append(i)
    chosen: set[int] = set()
    for where in positions.values():
        n = min(count, len(where))
        chosen.update(where[round(k * (len(where) - 1) / max(1, n - 1))] for k in range(n))
    return chosen


class _Costs:
    """What one signature's options cost, and the largest errors seen among the layers that share it."""

    def __init__(self) -> None:
        self.forward_ns = 0
        self.forward_workspace_bytes = 0
        self.parameter_bytes = 0
        self.store: list[StoreOption] = []
        self.moonwalk: list[tuple[rules.VijpRule, MoonwalkOption]] = []
        self.invert: list[tuple[rules.InvertRule, InvertOption]] = []
        self.errors: dict[str, tuple[float, float]] = {}

    def checked(self) -> list[rules.VijpRule | rules.InvertRule]:
        """The rules that have preconditions on values."""
        return [rule for rule, _ in self.moonwalk] + [rule for rule, _ in self.invert]

    def add_errors(self, bench: _Bench, one: PyTree, x: PyTree, unusable: frozenset[str]) -> None:
        """Measures local error and growth of every usable rule at one layer, and keeps the largest."""
        for rule in self.checked():
            if rule.name in unusable:
                continue
            if isinstance(rule, rules.VijpRule):
                got = growth.measure(one, rule, x, bench.key)
            else:
                got = growth.measure_inverse(one, rule, x, bench.key)
            # Not a number is an error of unknown size: unusable.
            local_error, factor = (math.inf if math.isnan(value) else value for value in got)
            seen = self.errors.get(rule.name, (0.0, 0.0))
            self.errors[rule.name] = max(seen[0], local_error), max(seen[1], factor)

    def layer_profile(self, name: str, unusable: frozenset[str]) -> LayerProfile:
        """The profile of one of the layers."""

        def option(rule: rules.VijpRule | rules.InvertRule, costs: Any) -> Any:
            local_error, factor = self.errors.get(rule.name, (0.0, 0.0))
            return dataclasses.replace(costs, local_error=local_error, growth=factor)

        return LayerProfile(
            name=name,
            forward_ns=self.forward_ns,
            forward_workspace_bytes=self.forward_workspace_bytes,
            parameter_bytes=self.parameter_bytes,
            store=tuple(self.store),
            moonwalk=tuple(option(r, o) for r, o in self.moonwalk if r.name not in unusable),
            invert=tuple(option(r, o) for r, o in self.invert if r.name not in unusable),
        )


class _Bench:
    """Compiles and times single operations; equal programs are measured once."""

    def __init__(self, repeats: int, seed: int) -> None:
        self.repeats = repeats
        self.key = jax.random.key(seed)
        self.known: dict[str, tuple[int, int]] = {}
        self.jitted: dict[Any, Any] = {}
        self.options = options_of() or None
        self.overhead_ns = 0
        empty = self.compile(lambda a: a, jnp.zeros(()))
        self.overhead_ns = self.median_ns(empty, (jnp.zeros(()),), repeats=50)

    def compile(self, operation: Callable[..., Any], *args: Any) -> Any:
        """The operation compiled for `args`."""
        return jax.jit(operation, compiler_options=self.options).lower(*args).compile()

    def run(self, operation: Callable[..., Any], *args: Any) -> Any:
        """The operation's result, jitted, without measuring."""
        if operation not in self.jitted:
            self.jitted[operation] = jax.jit(operation, compiler_options=self.options)
        return self.jitted[operation](*args)

    def median_ns(self, compiled: Any, args: tuple[Any, ...], repeats: int) -> int:
        """Median wall time of one call, after a warm-up, less an empty call's."""
        jax.block_until_ready(compiled(*args))
        times = []
        for _ in range(repeats):
            start = time.perf_counter_ns()
            jax.block_until_ready(compiled(*args))
            times.append(time.perf_counter_ns() - start)
        return max(0, math.ceil(statistics.median(times)) - self.overhead_ns)

    def cost(self, operation: Callable[..., Any], *args: Any) -> tuple[int, int]:
        """`(time_ns, workspace_bytes)` of the operation at `args`."""
        lowered = jax.jit(operation, compiler_options=self.options).lower(*args)
        text = hashlib.sha256(lowered.as_text().encode()).hexdigest()
        if text not in self.known:
            compiled = lowered.compile()
            workspace = temporaries(compiled)
            self.known[text] = self.median_ns(compiled, args, self.repeats), workspace
        return self.known[text]

    def cotangent(self, struct: PyTree) -> PyTree:
        """White noise of the given shapes and dtypes (float0 for what has no cotangent)."""
        leaves, treedef = jax.tree.flatten(struct)
        keys = jax.random.split(self.key, len(leaves) or 1)
        return jax.tree.unflatten(
            treedef,
            [
                jax.random.normal(k, leaf.shape, leaf.dtype)
                if trees.is_inexact(leaf)
                else jnp.zeros(leaf.shape, jax.dtypes.float0)
                for k, leaf in zip(keys, leaves)
            ],
        )


def _costs(bench: _Bench, one: PyTree, x: PyTree) -> _Costs:
    """Measures all options of one layer at its input."""
    costs = _Costs()
    costs.forward_ns, costs.forward_workspace_bytes = bench.cost(operations.plain_forward, one, x)
    costs.parameter_bytes = trees.nbytes(trees.parameters(one))
    y = bench.run(operations.plain_forward, one, x)
    ct_out = bench.cotangent(trees.struct(y))
    for store in rules.store_rules(one, x):
        costs.store.append(_store_option(bench, store, one, x, ct_out))
    for rule in rules.vijp_rules(one, x):
        if isinstance(rule, rules.VijpRule):
            costs.moonwalk.append((rule, _moonwalk_option(bench, rule, one, x, ct_out)))
    for inverse in rules.invert_rules(one, x):
        if isinstance(inverse, rules.InvertRule):
            operation = functools.partial(operations.invert_backward, rule=inverse)
            backward_ns, workspace = bench.cost(operation, one, y, ct_out, None)
            option = InvertOption(
                name=inverse.name, backward_ns=backward_ns, backward_workspace_bytes=workspace
            )
            costs.invert.append((inverse, option))
    return costs


def _store_option(
    bench: _Bench, rule: rules.StoreRule, one: PyTree, x: PyTree, ct_out: PyTree
) -> StoreOption:
    forward = functools.partial(operations.forward, rule=rule)
    forward_ns, forward_workspace = bench.cost(forward, one, x)
    y, held = bench.run(forward, one, x)
    shared = (x if held.keeps_input else None, y if held.keeps_output else None)
    backward = functools.partial(operations.store_backward, rule=rule)
    backward_ns, backward_workspace = bench.cost(backward, one, held, *shared, ct_out)
    return StoreOption(
        name=rule.name,
        residual_bytes=new_bytes(held),
        keeps_input=held.keeps_input,
        keeps_output=held.keeps_output,
        forward_ns=forward_ns,
        backward_ns=backward_ns,
        forward_workspace_bytes=forward_workspace,
        backward_workspace_bytes=backward_workspace,
    )


def _moonwalk_option(
    bench: _Bench, rule: rules.VijpRule, one: PyTree, x: PyTree, ct_out: PyTree
) -> MoonwalkOption:
    forward = functools.partial(operations.forward, rule=rule)
    forward_ns, forward_workspace = bench.cost(forward, one, x)
    y, held = bench.run(forward, one, x)
    shared = (x if held.keeps_input else None, y if held.keeps_output else None)
    reverse = functools.partial(operations.reverse, rule=rule)
    wide = trees.widen(ct_out)
    reverse_ns, reverse_workspace = bench.cost(reverse, one, held, *shared, wide)
    ct_in, fragment = bench.run(reverse, one, held, *shared, wide)
    vijp = functools.partial(operations.vijp, rule=rule)
    vijp_ns, vijp_workspace = bench.cost(vijp, one, x, ct_in, fragment)
    advance = functools.partial(operations.advance, last=True)
    advance_ns, advance_workspace = bench.cost(advance, one, x, wide)
    return MoonwalkOption(
        name=rule.name,
        residual_bytes=new_bytes(held),
        keeps_input=held.keeps_input,
        keeps_output=held.keeps_output,
        fragment_bytes=trees.nbytes(fragment),
        forward_ns=forward_ns,
        reverse_ns=reverse_ns,
        rebuild_ns=vijp_ns + advance_ns,
        forward_workspace_bytes=forward_workspace,
        reverse_workspace_bytes=reverse_workspace,
        rebuild_workspace_bytes=vijp_workspace,
        advance_workspace_bytes=advance_workspace,
        fragment_is_cotangent=isinstance(rule, rules.WholeFragment),
    )
