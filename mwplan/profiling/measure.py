"""Measures what each way of handling each layer costs on this device.

What an operation needs is read off the operation, compiled alone; what an option takes is the median of runs
of all its operations, compiled exactly as the executor calls them, less what an empty call costs; residuals
and fragments are counted from the shapes that operations return. Layers with the same structure, parameter
shapes and input share one measurement, and so do those of earlier profiles, which are kept on disk; of stacks
deeper than 64 repetitions the preconditions are checked at those few whose growth is measured.
"""

from __future__ import annotations

import collections
from typing import Any

import jax

from mwplan.common import platforms, trees
from mwplan.common.errors import ArgumentError
from mwplan.compilers.compiling import options_given
from mwplan.execution.repeats import LEAST_REPETITIONS
from mwplan.network import axes, residuals, sharding
from mwplan.network.chain import Chain, boundaries, check_chain, fingerprint
from mwplan.plans.packing import Workspace
from mwplan.plans.profiles import LayerProfile, Profile
from mwplan.profiling.carrying import Carrying, carrying
from mwplan.profiling.layer_costs import Costs, Name
from mwplan.profiling.progress import Progress, shown
from mwplan.profiling.session import Session
from mwplan.profiling.touch import FirstTouch
from mwplan.profiling.visiting import depth_of, layer_keys, layer_names

PyTree = Any


@options_given()
def profile(
    chain: Chain,
    x: PyTree,
    *,
    repeats: int = 5,
    seed: int = 0,
    wrt_input: bool = False,
    progress: Progress | bool | None = None,
    cache: bool = True,
) -> Profile:
    """Measures every layer of `chain` at input `x`, on the default device.

    Of arrays on a mesh (`jax.NamedSharding`) the figures are those of one device: `x` counts by its shard,
    which is what a data-parallel step's device works on. Weights are gathered for the measurement, as for
    their use in a step; `fixed_bytes` counts their shards (and gradients sharded like them). What is not
    modelled: activations sharded other than by `x`, the communication and its buffers; layers that name an
    axis themselves (`jax.lax.pmean`) are measured as if it had one device.

    **Arguments:** `chain`; `x`, concrete arrays of the shape that will be trained on; `repeats`, timed runs
    of each program (the median counts; long ones run fewer times); `seed`, of the random cotangents;
    `wrt_input`, whether the gradient with respect to `x` will be asked for too: of what layers hand on as it
    is from `x`, an encoder's output say, the cotangent then lives throughout;
    `progress(done, of, what)`, called as it goes on; by default a bar on standard error where that is a
    terminal, with `False` none; `cache`: whether to look up, on disk, what layers like these cost when they
    were measured before (in `$XDG_CACHE_HOME/mwplan`, `~/.cache/mwplan` by default), by their programs, the
    device, the settings and versions of JAX and the code of this package; and their errors, by what the
    weights and `x` hold besides. What is measured is kept there in any case.
    **Returns:** a `Profile`: bytes and nanoseconds as integers, each option's local error and growth, and
    what an inverse's error does to gradients.
    **Raises:** `ChainError` where a layer does not accept what it gets; `ArgumentError` for abstract inputs.
    **Cost:** for each distinct layer, a trace of each operation and a cheap compilation, to see what memory
    it needs; for each of its options a program that is compiled and run some times. They are compiled on as
    many threads as there are processors. Of what is known from before, a trace of the layers' own rules, and
    a pass through the weights. Memory: that of one layer's operations and its activations.

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
    gradients = (trees.parameters(chain), trees.parameters(x) if wrt_input else ())
    fixed = sum(map(sharding.local_bytes, (chain, gradients, x)))
    chain, x = sharding.gathered(chain), sharding.local(x)
    whole, chain = chain, axes.bound(chain, x)
    structs = boundaries(chain, x)
    shared = carrying(chain, structs, wrt_input=wrt_input)
    keys = layer_keys(whole, structs, shared)
    device = jax.devices()[0]
    with shown(progress, "profiling") as tell, Session(repeats, seed, cache, tell) as session:
        session.prepare(chain, structs, keys, shared)
        unusable = session.measure(chain, x, structs, keys)
        return assemble(
            whole,
            structs,
            shared,
            [
                (name, session.costs[key], unusable.get(i))
                for i, (name, key) in enumerate(zip(layer_names(chain), keys))
            ],
            fixed_bytes=fixed,
            touch=session.touch(),
            device=f"{device.platform}:{device.device_kind}",
            source=f"measured, jax {jax.__version__}, median of {repeats}",
        )


def assemble(
    chain: Chain,
    structs: list[PyTree],
    shared: Carrying,
    layers: list[tuple[str, Costs, frozenset[Name] | None]],
    *,
    fixed_bytes: int,
    touch: FirstTouch,
    device: str,
    source: str,
) -> Profile:
    """The profile of a chain from each layer's name, costs and the rules that its weights forbid (None: not
    looked at)."""
    residuals.forget()
    known: dict[Any, LayerProfile] = {}
    profiles = []
    counts = collections.Counter(id(costs) for _, costs, _ in layers)
    for (name, costs, seen), place in zip(layers, chain.places()):
        forbidden = frozenset(costs.unusable) if seen is None else seen
        depth = depth_of(chain.parts[place.part])
        loops = depth if depth >= LEAST_REPETITIONS else 1
        if (id(costs), forbidden, loops) not in known:
            known[id(costs), forbidden, loops] = costs.layer_profile(
                name, forbidden, counts[id(costs)], loops
            )
        profiles.append(known[id(costs), forbidden, loops])
    new = [boundary.new(struct) for boundary, struct in zip(shared.boundaries, structs, strict=True)]
    return Profile(
        layers=tuple(profiles),
        activation_bytes=(trees.nbytes(structs[0]), *(trees.nbytes(some) for some in new[1:])),
        cotangent_bytes=tuple(trees.nbytes(trees.parameters(some)) for some in new),
        sweep_cotangent_bytes=tuple(
            trees.nbytes(jax.eval_shape(trees.widen, trees.parameters(s))) for s in structs
        ),
        fixed_bytes=fixed_bytes,
        carried_bytes=shared.fixed_bytes,
        kept_bytes=touch.kept_bytes,
        first_touch_mib_ns=touch.first_touch_mib_ns,
        workspaces=_workspaces([costs for _, costs, _ in layers]),
        fingerprint=fingerprint(chain),
        device=device,
        source=source,
    )


def _workspaces(layers: list[Costs]) -> tuple[Workspace, ...]:
    """Of all layers, one of each size. On CPUs alone: elsewhere they have not been held against compiled
    steps."""
    found = {one.total_bytes: one for costs in layers for one in costs.figures.workspaces}
    return tuple(found[total] for total in sorted(found)) if platforms.platform() == "cpu" else ()
