"""What each way of handling each layer costs: plain values, no JAX.

A `Profile` is all that the solvers and the ledger know about a network. `mwplan.profiling.measure` makes one
from a chain on this device, `mwplan.profiling.estimating` for one that is not at hand. The meaning of every
field in an event's accounting is in docs/accounting.md.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mwplan.common import serial
from mwplan.common.errors import ArgumentError
from mwplan.common.sizes import show_bytes, show_ns
from mwplan.plans.packing import Workspace

SCHEMA = 6
_INT64 = 2**63 - 1


@functools.cache
def _names(kind: type, *units: str) -> tuple[str, ...]:
    """The fields of a dataclass in these units: the ends of their names."""
    return tuple(f.name for f in dataclasses.fields(kind) if f.name.endswith(units))


def _sum(obj: Any, unit: str) -> int:
    return sum([getattr(obj, name) for name in _names(obj.__class__, unit)])


def _check_counts(obj: Any, where: str) -> None:
    """Raises `ArgumentError` unless every `_bytes` and `_ns` field of `obj` is an int in [0, 2^63)."""
    for name in _names(obj.__class__, "_bytes", "_ns"):
        value = getattr(obj, name)
        values = value if isinstance(value, tuple) else (value,)
        for v in values:
            if isinstance(v, bool) or not isinstance(v, int) or not 0 <= v <= _INT64:
                raise ArgumentError(
                    f"`{where}.{name}={v!r}` must be an integer from 0 to 2^63 - 1: round up before building "
                    "it"
                )


def _check_error(value: float, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value) or value < 0:
        raise ArgumentError(f"`{where}={value!r}` must be a number, at least 0 (infinity for unusable)")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreOption:
    """One way to store a layer's residuals (strategy STORE).

    `residual_bytes` counts what is new: not parameters, nor the layer's input or output, which
    `keeps_input` and `keeps_output` say are kept too.
    """

    name: str
    residual_bytes: int
    keeps_input: bool
    keeps_output: bool
    forward_ns: int
    backward_ns: int
    forward_workspace_bytes: int = 0
    backward_workspace_bytes: int = 0
    backward_saving_bytes: int = 0

    def __post_init__(self) -> None:
        _check_counts(self, f"StoreOption({self.name})")


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadOption:
    """One way to store a layer's residuals in the host's memory (strategy OFFLOAD).

    What the STORE option of the same name keeps, the layer's input or output included where it keeps them, is
    copied to the host in the forward sweep and back before it is used: `host_bytes`. Times and workspaces
    include the copies; on the device nothing is kept.
    """

    name: str
    host_bytes: int
    forward_ns: int
    backward_ns: int
    forward_workspace_bytes: int = 0
    backward_workspace_bytes: int = 0

    def __post_init__(self) -> None:
        _check_counts(self, f"OffloadOption({self.name})")


@dataclass(frozen=True, slots=True, kw_only=True)
class MoonwalkOption:
    """One way to take a layer through a moonwalk run: strategy VIJP if it keeps no fragment, else FRAGMENT.

    `residual_bytes`, `keeps_input`, `keeps_output`: its input residuals, as in `StoreOption`.
    `fragment_bytes`: the part of the cotangent kept from the R sweep to the M sweep; `fragment_is_cotangent`:
    it is all of it, the same array. `rebuild_ns`: vijp and parameter gradient together; their workspaces are
    `rebuild_` and `advance_workspace_bytes`, the latter `last_workspace_bytes` where the layer ends its run
    and no output has to be rebuilt. `local_error`, `growth`: section 3 of the design, relative; both 0 for a
    whole-cotangent fragment.
    """

    name: str
    residual_bytes: int
    keeps_input: bool
    keeps_output: bool
    fragment_bytes: int
    forward_ns: int
    reverse_ns: int
    rebuild_ns: int
    forward_workspace_bytes: int = 0
    reverse_workspace_bytes: int = 0
    rebuild_workspace_bytes: int = 0
    advance_workspace_bytes: int = 0
    last_workspace_bytes: int = 0
    reverse_saving_bytes: int = 0
    rebuild_saving_bytes: int = 0
    advance_saving_bytes: int = 0
    fragment_is_cotangent: bool = False
    local_error: float = 0.0
    growth: float = 0.0

    def __post_init__(self) -> None:
        _check_counts(self, f"MoonwalkOption({self.name})")
        _check_error(self.local_error, f"MoonwalkOption({self.name}).local_error")
        _check_error(self.growth, f"MoonwalkOption({self.name}).growth")


@dataclass(frozen=True, slots=True, kw_only=True)
class InvertOption:
    """How to rebuild a layer's input from its output and differentiate there (strategy INVERT).

    `residual_bytes`: what the forward pass keeps because the output does not tell it. `backward_ns` and
    `backward_workspace_bytes` cover the inverse and the vjp; `local_error` and `growth` are those of the
    rebuilt activation. A relative error `a` of the layer's input changes what the vjp makes there: the
    input's cotangent by `sensitivity * a`, the parameters' gradient by `gradient_sensitivity * a`, relative,
    and both by the root of `kink * a` besides where the layer is not smooth.
    """

    name: str
    residual_bytes: int = 0
    forward_ns: int
    backward_ns: int
    forward_workspace_bytes: int = 0
    backward_workspace_bytes: int = 0
    backward_saving_bytes: int = 0
    local_error: float = 0.0
    growth: float = 0.0
    sensitivity: float = 0.0
    gradient_sensitivity: float = 0.0
    kink: float = 0.0

    def __post_init__(self) -> None:
        _check_counts(self, f"InvertOption({self.name})")
        for name in ("local_error", "growth", "sensitivity", "gradient_sensitivity", "kink"):
            _check_error(getattr(self, name), f"InvertOption({self.name}).{name}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProfile:
    """One layer: its plain forward, and the options it has for each kind of run.

    `table_bytes`: its share of `Profile.table_bytes`. Equal `LayerProfile`s are interchangeable; the solvers
    exploit it. `store` holds at least one option.
    """

    name: str
    forward_ns: int
    forward_workspace_bytes: int = 0
    parameter_bytes: int = 0
    table_bytes: int = 0
    store: tuple[StoreOption, ...]
    moonwalk: tuple[MoonwalkOption, ...] = ()
    invert: tuple[InvertOption, ...] = ()
    offload: tuple[OffloadOption, ...] = ()

    def __post_init__(self) -> None:
        _check_counts(self, f"LayerProfile({self.name})")
        if not self.store:
            raise ArgumentError(
                f"`LayerProfile({self.name}).store` is empty: every layer can at least be stored"
            )
        for kind in ("store", "moonwalk", "invert", "offload"):
            names = [o.name for o in getattr(self, kind)]
            if len(set(names)) != len(names):
                raise ArgumentError(f"`LayerProfile({self.name}).{kind}` repeats an option's name: {names}")

    @property
    def fastest_store(self) -> StoreOption:
        """The fastest STORE option; of equally fast ones that of least bytes."""
        return min(self.store, key=lambda o: (o.forward_ns + o.backward_ns, o.residual_bytes))

    @property
    def plain_store(self) -> StoreOption:
        """The STORE option that is what `jax.vjp` keeps; the fastest, where there is none of that name."""
        return next((one for one in self.store if one.name == "vjp"), self.fastest_store)

    def costs(self) -> tuple[Any, ...]:
        """Everything but the name."""
        return tuple(getattr(self, field) for field in self.__slots__ if field != "name")


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A chain of layers as the planner sees it, on one device, for one shape of input.

    `activation_bytes`, `cotangent_bytes`, `sweep_cotangent_bytes` have one entry per position 0..L.
    `fixed_bytes` are the arguments and outputs of the gradient step: parameters, input, gradients; and what
    is there beside the step, `optimizer_bytes` of it the optimizer's state (`with_optimizer`).
    Sets of kept values that another option is as good as are not in `layers`.
    `carried_bytes`: temporaries that are alive all the time, and in no other entry: what layers hand on as it
    is (docs/accounting.md). `fingerprint` identifies the chain's structure and input shapes; a schedule made
    from this profile carries it on. `first_touch_mib_ns`: what a step pays for each MiB of its temporaries
    because the system hands them out anew, page by page, as CPUs' allocators do with blocks above
    `kept_bytes`; 0 where memory is pooled. `workspaces`: what the options' larger workspaces consist of, by
    their bytes, as far as it is known; without it fragmentation is not predicted.

    >>> profile = mw.estimate(mw.Chain([jnp.tanh] * 8), jnp.ones((256, 64)), device="h100")
    >>> len(profile.layers), profile.activation_bytes[0]
    (8, 65536)
    >>> mw.Profile.from_json(profile.to_json()) == profile
    True
    """

    layers: tuple[LayerProfile, ...]
    activation_bytes: tuple[int, ...]
    cotangent_bytes: tuple[int, ...]
    sweep_cotangent_bytes: tuple[int, ...]
    fixed_bytes: int = 0
    optimizer_bytes: int = 0
    carried_bytes: int = 0
    kept_bytes: int = 0
    first_touch_mib_ns: int = 0
    workspaces: tuple[Workspace, ...] = ()
    fingerprint: str = ""
    device: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        _check_counts(self, "Profile")
        if not self.layers:
            raise ArgumentError("`Profile.layers` is empty: a chain needs at least one layer")
        for name in ("activation_bytes", "cotangent_bytes", "sweep_cotangent_bytes"):
            got, want = len(getattr(self, name)), len(self.layers) + 1
            if got != want:
                raise ArgumentError(f"`Profile.{name}` has {got} entries; {want - 1} layers need {want}")
        if self.bytes_bound() > _INT64 or self.time_bound() > _INT64:
            raise ArgumentError(
                "the sums over this `Profile` pass 2^63 - 1: state times or bytes in a larger unit before "
                "planning"
            )

    def __len__(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:
        return "\n".join(
            (
                f"profile of {len(self)} layers on {self.device or 'an unnamed device'} "
                f"({self.source or 'made by hand'})",
                f"  fixed {show_bytes(self.fixed_bytes)}: {self.fixed_parts}",
                f"  layers' outputs {show_bytes(sum(self.activation_bytes[1:]))} in all, the largest "
                f"{show_bytes(max(self.activation_bytes[1:]))}",
                f"  backpropagation {show_bytes(self.stored_bytes)} temporaries by prediction, with all that "
                "`jax.vjp` keeps",
                f"  forward {show_ns(sum(layer.forward_ns for layer in self.layers))}",
                "  for `mw.plan(profile, budget)` or `mw.frontier(profile)`; `profile.layers` has the "
                "figures",
            )
        )

    @property
    def fixed_parts(self) -> str:
        """What `fixed_bytes` are, in words."""
        state = self.optimizer_bytes
        return "parameters, input and gradients" + (
            f", and {show_bytes(state)} of optimizer's state" if state else ""
        )

    @property
    def table_bytes(self) -> int:
        """What a compiled step takes beside arrays: tables of pointers, for its whole length, to the arrays
        that each operation reads or writes together.

        XLA keeps one of at least 64 bytes for each `optimization_barrier` of two or more arrays. This is a
        bound for every schedule that recomputes a layer at most twice: about 0.5 KiB a layer, and of layers
        that a loop repeats, once for all. No event counts it; budgets do, and `Schedule.peak_bytes`.
        """
        return sum(layer.table_bytes for layer in self.layers)

    @property
    def beside_bytes(self) -> int:
        """Temporaries that no event counts, because they are there all the time: tables of pointers, and what
        layers hand on."""
        return self.table_bytes + self.carried_bytes

    @property
    def stored_bytes(self) -> int:
        """Predicted temporaries of plain backpropagation where all that `jax.vjp` keeps of every layer is an
        array. `jax.grad` takes less where a compiler makes some of it again within kernels."""
        a, c = self.activation_bytes, self.cotangent_bytes
        held, there, peak = 0, True, 0  # there: the layer's input is kept by others
        backward = []
        for at, layer in enumerate(self.layers):
            o = layer.plain_store
            new = 0 if there else a[at]
            peak = max(peak, held + new + a[at + 1] + o.residual_bytes + o.forward_workspace_bytes)
            held += o.residual_bytes + new * o.keeps_input + a[at + 1] * o.keeps_output
            saving = 0 if there and o.keeps_input else o.backward_saving_bytes
            backward.append(held + c[at] + c[at + 1] + o.backward_workspace_bytes - saving)
            there = o.keeps_output
        turn = held + (0 if there else a[-1]) + c[-1]
        return max(peak, turn, *backward) + self.beside_bytes

    def first_touch_ns(self, peak_bytes: int) -> int:
        """Time that a step of `peak_bytes` temporaries spends on getting them."""
        return 0 if peak_bytes <= self.kept_bytes else peak_bytes * self.first_touch_mib_ns >> 20

    def bytes_bound(self) -> int:
        """An upper bound on the live bytes at any event of any schedule: everything at once."""
        total = self.fixed_bytes + self.beside_bytes + sum(self.activation_bytes) + sum(self.cotangent_bytes)
        total += 2 * sum(self.sweep_cotangent_bytes)
        for layer, times in _distinct(self.layers):
            total += times * layer.forward_workspace_bytes
            total += times * sum(_sum(o, "_bytes") for o in _options(layer))
        return total

    def time_bound(self) -> int:
        """An upper bound on the time of any schedule that nests recomputation no deeper than its length."""
        total = self.first_touch_ns(self.bytes_bound())
        for layer, times in _distinct(self.layers):
            total += times * (len(self.layers) + 1) * layer.forward_ns
            total += times * sum(_sum(o, "_ns") for o in _options(layer))
        return total

    def with_optimizer(self, states_bytes: int) -> Profile:
        """The same chain where an optimizer's state, `states_bytes`, is in memory beside the gradient step:
        budgets hold it too."""
        return dataclasses.replace(
            self,
            fixed_bytes=self.fixed_bytes - self.optimizer_bytes + states_bytes,
            optimizer_bytes=states_bytes,
        )

    def consuming_gradients(self, states_bytes: int) -> Profile:
        """The same chain for a step that updates each layer as its gradient comes: `mw.value_and_update`.

        No gradient outlives the operation after it, so that `fixed_bytes` holds the optimizer's states,
        `states_bytes`, in place of the gradients, and a layer's gradient is workspace of what makes it.
        Assumes that chain and states are donated, and that the update itself is one pass over them
        (elementwise), which needs no arrays of its own. Not counted: a loop over a stack writes a layer's new
        parameters and states apart before they take the place of the old.
        """
        if isinstance(states_bytes, bool) or not isinstance(states_bytes, int) or states_bytes < 0:
            raise ArgumentError(f"`states_bytes={states_bytes!r}` must be an integer, at least 0")
        gradients = sum(layer.parameter_bytes for layer in self.layers)
        if states_bytes and not gradients:
            raise ArgumentError(
                "this `Profile` states no bytes of gradients: they are consumed already, or no layer has "
                "parameters"
            )
        return dataclasses.replace(
            self,
            layers=tuple(_consuming(layer) for layer in self.layers),
            fixed_bytes=self.fixed_bytes - self.optimizer_bytes - gradients + states_bytes,
            optimizer_bytes=states_bytes,
            workspaces=(),  # those with a gradient among them have not been seen
        )

    def offloading(self, bytes_per_s: float, *, least_bytes: int = 1 << 20) -> Profile:
        """The same chain where residuals may be kept in the host's memory: an `OffloadOption` for each STORE
        option that keeps `least_bytes` or more.

        **Arguments:** `bytes_per_s`, what a copy between device and host gets, either way. Of a PCIe link
        about two thirds of the published rate (4.0 with 16 lanes: 2e10, 5.0: 4e10). Copies are taken to
        follow the operations; where a device makes them beside these, it is faster than planned.
        **Raises:** `ArgumentError`.
        """
        number = not isinstance(bytes_per_s, bool) and isinstance(bytes_per_s, (int, float))
        if not number or not 0 < bytes_per_s < math.inf:
            raise ArgumentError(
                f"`bytes_per_s={bytes_per_s!r}` must be a number above 0, of a link to the host: 2e10"
            )
        known: dict[tuple[int, int, int], LayerProfile] = {}
        layers = []
        for layer, before, after in zip(self.layers, self.activation_bytes, self.activation_bytes[1:]):
            key = id(layer), before, after
            if key not in known:
                options = (_offloaded(o, before, after, bytes_per_s) for o in layer.store)
                some = tuple(o for o in options if o.host_bytes >= max(1, least_bytes))
                known[key] = dataclasses.replace(layer, offload=some)
            layers.append(known[key])
        return dataclasses.replace(self, layers=tuple(layers))

    def to_json(self) -> str:
        """This profile as JSON with a schema number."""
        return serial.dump(self, kind="profile", schema=SCHEMA)

    @classmethod
    def from_json(cls, text: str) -> Profile:
        """Reads what `to_json` wrote. Raises `FileFormatError` on anything else."""
        return serial.load(text, cls, kind="profile", schema=SCHEMA)


def _distinct(layers: tuple[LayerProfile, ...]) -> list[tuple[LayerProfile, int]]:
    """The layers, and how often each stands in the chain: long ones often repeat one object."""
    times = collections.Counter(map(id, layers))
    return [(layer, times[key]) for key, layer in {id(x): x for x in layers}.items()]


def _consuming(layer: LayerProfile) -> LayerProfile:
    """The layer with its gradient in the workspace of each operation that makes it."""

    def more(option: Any, *names: str) -> Any:
        return dataclasses.replace(option, **{n: getattr(option, n) + layer.parameter_bytes for n in names})

    return dataclasses.replace(
        layer,
        parameter_bytes=0,  # of gradients that outlive their operation
        store=tuple(more(o, "backward_workspace_bytes") for o in layer.store),
        moonwalk=tuple(more(o, "advance_workspace_bytes", "last_workspace_bytes") for o in layer.moonwalk),
        invert=tuple(more(o, "backward_workspace_bytes") for o in layer.invert),
        offload=tuple(more(o, "backward_workspace_bytes") for o in layer.offload),
    )


def _offloaded(option: StoreOption, before: int, after: int, bytes_per_s: float) -> OffloadOption:
    """A STORE option by way of the host; `before`, `after`: bytes of the layer's input and output."""
    kept = option.residual_bytes + option.keeps_input * before + option.keeps_output * after
    copy_ns = math.ceil(1e9 * kept / bytes_per_s)
    return OffloadOption(
        name=option.name,
        host_bytes=kept,
        forward_ns=option.forward_ns + copy_ns,
        backward_ns=option.backward_ns + copy_ns,
        # On their way residuals are on the device; what came back is nobody else's, and makes room for what
        # is written.
        forward_workspace_bytes=option.forward_workspace_bytes + option.residual_bytes,
        backward_workspace_bytes=max(
            0, option.backward_workspace_bytes + kept - option.backward_saving_bytes
        ),
    )


def _options(layer: LayerProfile) -> Iterator[StoreOption | MoonwalkOption | InvertOption | OffloadOption]:
    yield from layer.store
    yield from layer.moonwalk
    yield from layer.invert
    yield from layer.offload
