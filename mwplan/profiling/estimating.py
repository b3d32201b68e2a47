"""Profiles of devices that are not at hand: bytes from shapes, times from a roofline, errors measured on this
host where there are weights.

**Bytes.** Activations, residuals, fragments and the fixed part are counted as `mw.profile` counts them,
and equal its figures. Workspaces and savings are the liveness of the program's kernels: XLA's schedule,
fusion, padding and library scratch are not known. Seen on a CPU: equal in the median; too low by about
the layer's activations for convolutions' weight gradients, by up to two of them for attention, so that
plans exceeded small budgets by up to 28%. Leave a margin.

**Times** are a roofline's (`mwplan.profiling.roofline`, `mwplan.profiling.costs`): arithmetic or traffic
at the device's full rates, and a launch for each kernel. Not in the model: how far a kernel stays below
those rates (small or oddly shaped products: often a half), caches, autotuned algorithms (Winograd),
fusion of products with what follows, launches that overlap, several devices. Ratios between the options
of a layer are what a plan depends on, and are better than the times themselves. Checked on a CPU alone
(results/estimate); the built-in GPUs' figures are data sheets', not yet held against a GPU. Where a layer
chooses its operations by the platform, those for the device are counted.

**Compiled** by the device's own compiler (`mwplan.targets.pricing`), where it is installed: workspaces and
savings are its buffers, of each operation alone; times a roofline's of the kernels that it launches after
fusion, or on TPUs its own estimates. What a layer keeps is what its compiler keeps of it from the forward to
the backward pass (`mwplan.targets.crossing`). What libraries need beside (cuDNN, cuBLAS) is not known, nor
what is fused across layers. The two paragraphs above are about what is counted without it.

**Errors** depend on weights and working precision, hardly on the device. Where all weights are arrays
they are measured as in `mw.profile`, at the first `examples` examples of `x`, or of white noise (zeros
for integers) where `x` is shapes; on this host, in its own matrix precision: float32 at reduced precision
(TF32) on the device makes them larger. Where weights are shapes, rules whose errors no weights change are
measured at random ones: those of layers without parameters at white noise, of orthogonal layers, and
whole fragments (0). All others' local error and growth are infinite, so that no plan uses them.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from mwplan.common import platforms, trees
from mwplan.common.errors import ArgumentError, ChainError
from mwplan.compilers.compiling import options_given
from mwplan.network import axes
from mwplan.network.chain import Chain, Stack, boundaries, check_chain, one_block
from mwplan.plans.profiles import Profile
from mwplan.profiling import kept_figures, measure
from mwplan.profiling.bench import Pricing
from mwplan.profiling.carrying import Place, carrying
from mwplan.profiling.kept_errors import Errors
from mwplan.profiling.layer_costs import Costs, Name, exact, name_of
from mwplan.profiling.noise import random_cotangent
from mwplan.profiling.options import Figures, measure_layer
from mwplan.profiling.progress import Progress, shown
from mwplan.profiling.roofline import Device, Roofline, device_of
from mwplan.profiling.stacked import StackedCompiler
from mwplan.profiling.touch import FirstTouch
from mwplan.profiling.visiting import first_layers, layer_keys, layer_names, visit
from mwplan.targets import plugins
from mwplan.targets.devices import TpuChip
from mwplan.targets.pricing import Compiler
from mwplan.targets.target import target_of

PyTree = Any
PRICED_AT_ONCE = 4  # layers whose operations are traced and compiled side by side


@options_given()
def estimate(
    chain: Chain,
    x: PyTree,
    *,
    device: str | Device,
    examples: int = 16,
    seed: int = 0,
    wrt_input: bool = False,
    progress: Progress | bool | None = None,
    compiled: bool | None = None,
    cache: bool = True,
) -> Profile:
    """Estimates what `mw.profile` would measure of `chain` at input `x` on a device that is not at hand.

    **Arguments:** `chain`, its weights arrays or `jax.ShapeDtypeStruct`s (`jax.eval_shape(make_chain, key)`
    gives the latter without computing anything); `x`, arrays or `jax.ShapeDtypeStruct`s of the shape that
    will be trained on; `device`, a name in `mw.targets.DEVICES` or a `mw.Device`; `examples`, of how many the
    errors are measured; `seed`, of random cotangents and inputs; `wrt_input`, `progress`, as of
    `mw.profile`; `compiled`: whether the device's own compiler prices operations (True: an error where it is
    not installed; False: they are counted), by default where it is installed; `cache`, as of `mw.profile`.
    **Returns:** a `Profile` whose `source` says "estimated", and how. The same network's plans from it run
    anywhere; `mw.fit` or a profile on the device itself should have the last word.
    **Raises:** `ChainError` where a layer does not accept what it gets; `ArgumentError` for an unknown
    device, or a layer that needs its weights' values to be traced and has only their shapes;
    `CompilerMissingError` and `TargetError` of the device's compiler.
    **Cost:** one tracing of each operation of each distinct layer; where they are compiled, some seconds a
    layer. With weights, and where a rule makes errors, also a forward pass of `examples` examples on this
    host's default device, and compilations to measure them: some seconds a rule. Nothing of the size of `x`
    is allocated. Of what is known from before (`mwplan.common.cache`), a trace of the layers' own rules, and
    a pass through the weights.

    What is modelled and what is not, and how far off it is: `mwplan.profiling.estimating`.

    >>> make = lambda key: mw.Chain([mw.layers.Dense.init(key, 1024, 1024), jnp.tanh])
    >>> net = jax.eval_shape(make, jax.random.key(0))  # no weights: nothing is computed
    >>> profile = mw.estimate(net, jax.ShapeDtypeStruct((4096, 1024), jnp.float32), device="h100")
    >>> profile.activation_bytes
    (16777216, 16777216, 16777216)
    """
    check_chain(chain)
    pricing = _pricing(device_of(device), compiled)
    if isinstance(examples, bool) or not isinstance(examples, int) or examples < 1:
        raise ArgumentError(f"`examples={examples!r}` must be an integer, at least 1")
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((chain, x))):
        raise ArgumentError("`chain` and `x` must be arrays or shapes: call `mw.estimate` outside `jax.jit`")
    whole, chain = chain, axes.bound(chain, x)
    platform = _platform(device_of(device))
    with platforms.lowering_for(platform):
        structs = boundaries(chain, x)
        shared = carrying(chain, structs, wrt_input=wrt_input)
    abstract = _abstract(chain)
    names, keys = layer_names(chain), layer_keys(whole, structs, shared)
    with shown(progress, "estimating") as tell:
        counted, programs = _counted(chain, pricing, platform, structs, keys, names, tell, cache)
        if abstract:
            for i, one in first_layers(chain, keys):
                _errors_without_weights(counted[keys[i]], one, structs[i], examples, seed)
            unusable = {}
        else:
            unusable = _errors(chain, x, structs, keys, counted, programs, examples, seed, cache, tell)
        tell(len(chain), len(chain), names[-1])
    gradients = (trees.parameters(chain), trees.parameters(structs[0]) if wrt_input else ())
    with platforms.lowering_for(platform):
        return measure.assemble(
            whole,
            structs,
            shared,
            [(names[i], counted[key], unusable.get(i)) for i, key in enumerate(keys)],
            fixed_bytes=sum(map(trees.nbytes, (chain, gradients, structs[0]))),
            touch=FirstTouch(),  # accelerators pool their memory
            device=device_of(device).name,
            source=_source(pricing)
            + ("errors without weights" if abstract else f"errors of {examples} examples"),
        )


def _pricing(device: Device, compiled: bool | None) -> Roofline | Compiler:
    """By the device's compiler, where that is wanted or installed, else by counting."""
    if compiled or (compiled is None and device.chip is not None and plugins.missing(device) is None):
        return Compiler(target_of(device))
    return Roofline(device)


def _source(pricing: Roofline | Compiler) -> str:
    if isinstance(pricing, Compiler):
        return f"estimated by the compiler of {pricing.target.name} ({pricing.target.compiler}), "
    why = plugins.missing(pricing.device) if pricing.device.chip is not None else None
    return f"estimated by a roofline, jax {jax.__version__}{f' ({why})' if why else ''}, "


def _counted(
    chain: Chain,
    pricing: Roofline | Compiler,
    platform: str,
    structs: list[PyTree],
    keys: list[tuple[Any, ...]],
    names: list[str],
    tell: Progress,
    look_up: bool,
) -> tuple[dict[Hashable, Costs], dict[Hashable, str | None]]:
    """What the layers cost, by their keys; those of a compiler side by side: while one is compiled another is
    traced. And the names of the programs of their own rules."""
    facts = _facts(pricing)
    wide = jnp.result_type(float) == jnp.float64  # `with jax.enable_x64():` is of one thread

    def count(i: int, one: Any) -> tuple[Costs, str | None]:
        where = f"layer {i + 1} ({names[i]})"
        with jax.enable_x64(wide), platforms.lowering_for(platform):
            stacked, place = keys[i][-2:]
            priced = StackedCompiler(pricing) if stacked and isinstance(pricing, Compiler) else pricing
            figures, name = _count(priced, one, structs[i], place, where, [*facts, repr(stacked)], look_up)
        return Costs(figures, one, structs[i]), name

    counted: dict[Hashable, Costs] = {}
    programs: dict[Hashable, str | None] = {}
    threads = PRICED_AT_ONCE if isinstance(pricing, Compiler) else 1
    with ThreadPoolExecutor(threads, thread_name_prefix="price") as pool:
        started: dict[Hashable, Future[tuple[Costs, str | None]]] = {}
        for i, one in enumerate(_layers(chain)):
            if keys[i] not in started:
                started[keys[i]] = pool.submit(count, i, one)
        try:
            for i, key in enumerate(keys):
                counted[key], programs[key] = started[key].result()
                tell(i + 1, len(chain), names[i])
        finally:
            for future in started.values():
                future.cancel()
    return counted, programs


def _facts(pricing: Roofline | Compiler) -> list[str]:
    """What prices depend on beside programs and what is here."""
    if isinstance(pricing, Compiler):
        target = pricing.target
        return [target.compiler, target.facts, target.platform, repr(target.compiler_options)]
    return ["roofline", repr(pricing.device)]


def _platform(device: Device) -> str:
    """That for which the device's programs are written."""
    return "tpu" if isinstance(device.chip, TpuChip) else "gpu" if device.chip is not None else "cpu"


def _errors(
    chain: Chain,
    x: PyTree,
    structs: list[PyTree],
    keys: list[tuple[Any, ...]],
    counted: dict[Hashable, Costs],
    programs: dict[Hashable, str | None],
    examples: int,
    seed: int,
    look_up: bool,
    tell: Progress,
) -> dict[int, frozenset[Name]]:
    """Measures the layers' errors at some examples. Returns, by layer, the rules that its weights forbid."""
    errors = Errors(chain, structs, keys, {key: costs.checked() for key, costs in counted.items()})
    errors.find(x, programs, f"{examples} examples, seed {seed}", look_up=look_up)
    if errors.measured:
        key = jax.random.key(seed)
        some = _some(chain, x, structs, examples, key)
        forward = jax.jit(lambda one, x: one(x))
        for i, one, at in visit(chain, some, errors.sampled, lambda i, one, x: forward(one, x)):
            if i in errors.measured:
                counted[keys[i]].add_errors(key, one, at, errors.unusable[i])
            tell(i + 1, len(chain), "measuring errors")
            if i >= max(errors.measured):  # nothing further on has errors: its inputs need not be computed
                break
    errors.settle(counted)
    return errors.unusable


def _abstract(tree: PyTree) -> bool:
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def _layers(chain: Chain) -> Iterator[Any]:
    """Every layer; of a stack the first repetition's stand for all."""
    for part in chain.parts:
        if not isinstance(part, Stack):
            yield part
            continue
        block = one_block(part) if _abstract(part) else [part.layer(0, j) for j in range(len(part.block))]
        for _ in range(part.depth):
            yield from block


def _count(
    pricing: Pricing,
    one: PyTree,
    struct: PyTree,
    place: Place,
    where: str,
    settings: Sequence[str],
    look_up: bool,
) -> tuple[Figures, str | None]:
    """What one layer's operations cost, and the name of their programs."""
    try:
        name = kept_figures.name_without_prices(pricing.device, one, struct, place, *settings)
        known = kept_figures.known(name) if look_up and name is not None else None
        figures = known or measure_layer(pricing, one, struct, place)
        if known is None and name is not None:
            kept_figures.keep(name, figures)
        return figures, name
    except (TypeError, AttributeError, ValueError, jax.errors.JAXTypeError) as error:
        if not _abstract(one):
            raise
        why = str(error).partition("\n")[0]
        raise ArgumentError(
            f"{where} cannot be estimated from the shapes of its weights alone: {why}. Give it arrays"
        ) from error


def _some(chain: Chain, x: PyTree, structs: list[PyTree], examples: int, key: jax.Array) -> PyTree:
    """The first `examples` examples of `x` as arrays, white noise where it is shapes; all, where layers do
    not take them one by one."""
    leaves = jax.tree.leaves(structs[0])
    sizes = {leaf.shape[:1] for leaf in leaves}
    if len(sizes) == 1 and sizes != {()} and leaves[0].shape[0] > examples:
        batch = leaves[0].shape[0]
        few = jax.tree.map(lambda s: trees.struct_of(s, (examples, *s.shape[1:])), structs[0])
        try:
            alike = all(
                _scaled(a, b, examples, batch) for a, b in zip(boundaries(chain, few), structs, strict=True)
            )
        except ChainError:
            alike = False
        if alike:
            x = few if _abstract(x) else jax.tree.map(lambda a: a[:examples], x)
    return _noise(x, key)


def _scaled(few: PyTree, many: PyTree, examples: int, batch: int) -> bool:
    """Whether leaves differ in their leading axis alone, as `examples` and `batch` do."""
    return all(
        a.ndim == b.ndim > 0 and a.shape[1:] == b.shape[1:] and a.shape[0] * batch == b.shape[0] * examples
        for a, b in zip(jax.tree.leaves(few), jax.tree.leaves(many), strict=True)
    )


def _noise(tree: PyTree, key: jax.Array) -> PyTree:
    """`tree` with white noise for its shapes, zeros where they are not of floating numbers."""
    leaves, treedef = jax.tree.flatten(tree)
    made = [
        leaf
        if not isinstance(leaf, jax.ShapeDtypeStruct)
        else random_cotangent(leaf, jax.random.fold_in(key, i)).astype(leaf.dtype)
        if trees.is_inexact(leaf)
        else jnp.zeros(leaf.shape, leaf.dtype)
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, made)


def _errors_without_weights(costs: Costs, one: PyTree, struct: PyTree, examples: int, seed: int) -> None:
    """The errors that no weights change, at random ones; infinite for the others."""
    key = jax.random.key(seed)
    known = [r for r in costs.checked() if not jax.tree.leaves(one) or getattr(r, "any_weights", False)]
    others = frozenset(name_of(r) for r in costs.checked() if r not in known)
    costs.errors.update(dict.fromkeys(others, (math.inf, math.inf)))
    if exact(known):
        return
    x = _some(Chain([one]), struct, boundaries(Chain([one]), struct), examples, jax.random.fold_in(key, 1))
    # White, each column of about unit length, whatever the parameters stand for: no wide range of sizes.
    weights = jax.tree.map(
        lambda leaf, noise: (
            noise / max(1, math.prod(leaf.shape[:-1])) ** 0.5 if trees.is_inexact(leaf) else noise
        ),
        one,
        _noise(one, jax.random.fold_in(key, 2)),
    )
    costs.add_errors(key, weights, x, others)
