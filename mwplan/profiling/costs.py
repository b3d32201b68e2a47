r"""What a program would cost on a device that is not at hand: kernels, flop, bytes moved and bytes alive.

The model, on the flat program of `mwplan.profiling.programs`:

1. **Fusion.** Products, convolutions, transforms, factorisations, sorts, scatters, windows and loops are a
   kernel each. All other equations are elementwise, or move data: those that feed each other, with no such
   kernel or finished reduction on a path between them, are one kernel, which a reduction may end. What is
   cheap is computed again rather than read. Views are free, and so is what depends on no array.
2. **Bytes** of a kernel: what it reads of each array from outside (a slice or gather only what it takes),
once, and what others read of it.
3. **Flop**: $2\,batch\,m\,n\,k$ of a product; of a convolution 2 for each output and tap and channel that it
   sees, zeros of a dilated input not counted; $5 n \log_2 n$ of a complex transform, half of a real one; the
   leading term of a factorisation, a launch a column; 1 an element otherwise, 15 where transcendental.
   Complex products count four times.
4. **Loops**: a `scan` costs its body times its length; a `while` loop, whose trips are unknown, `WHILE_TRIPS`
times its body; of a `cond` the dearest branch.
5. **Memory**: kernels run in the program's order. An array lives from its kernel to its last reader; an
   elementwise kernel writes over an intermediate of the same size that ends there, never over an argument
   (XLA:CPU rarely does). Nothing is lost to alignment, and libraries' own scratch is not known; a transform
   is given one copy of its output.

**Source:** the flop of factorisations are those of Golub and Van Loan, Matrix Computations; the fusion rule
is ours, after what XLA does.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from mwplan.network.canonical import scan_counts
from mwplan.profiling.programs import PRODUCTS, Graph, Node, Value, graph

WHILE_TRIPS = 10
TRANSCENDENTAL = 15  # flop of one element of `exp` and the like

REDUCTIONS = {
    *("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor"),
    *("argmax", "argmin", "reduce"),
}
_MOVES = {
    *(
        "slice",
        "dynamic_slice",
        "gather",
        "pad",
        "concatenate",
        "rev",
        "transpose",
        "broadcast_in_dim",
        "iota",
    ),
    *("split", "select_and_gather_add"),
}
_TAKES = {"slice", "dynamic_slice", "gather", "split"}  # read no more than they write
TRANSCENDENTALS = {
    *("exp", "exp2", "expm1", "log", "log1p", "sin", "cos", "tan", "asin", "acos", "atan", "atan2"),
    *("sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "logistic", "pow", "cbrt", "erf", "erfc", "erf_inv"),
    *("lgamma", "digamma", "igamma", "igammac", "bessel_i0e", "bessel_i1e", "random_bits", "threefry2x32"),
    "polynomial",
}
_ELEMENTWISE = {
    *(
        "add",
        "add_any",
        "sub",
        "mul",
        "div",
        "rem",
        "neg",
        "sign",
        "abs",
        "max",
        "min",
        "clamp",
        "integer_pow",
    ),
    *(
        "sqrt",
        "rsqrt",
        "square",
        "floor",
        "ceil",
        "round",
        "is_finite",
        "nextafter",
        "select_n",
        "not",
        "and",
    ),
    *("or", "xor", "eq", "ne", "lt", "le", "gt", "ge", "eq_to", "le_to", "lt_to", "convert_element_type"),
    *("bitcast_convert_type", "reduce_precision", "real", "imag", "complex", "conj", "shift_left"),
    *("shift_right_logical", "shift_right_arithmetic", "population_count", "clz"),
    *("random_wrap", "random_unwrap", "random_seed", "random_fold_in", "random_split", "random_clone"),
}
FUSED = _ELEMENTWISE | TRANSCENDENTALS | _MOVES | REDUCTIONS


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """What a device runs at once.

    **Attributes:** `flop`, by kind of arithmetic ("half", "tf32", "float32", "float64"); `moved_bytes`, to
    and from memory; `launches`; `scratch_bytes`, alive while it runs; `reads` and `writes`, whole arrays;
    `in_place`, whether an output may be written over an input; `inner`, of a loop: the kernels of its body,
    run `trips` times.
    """

    name: str
    flop: dict[str, float]
    moved_bytes: int
    launches: int = 1
    scratch_bytes: int = 0
    reads: tuple[Value, ...] = ()
    writes: tuple[Value, ...] = ()
    in_place: bool = False
    inner: tuple[Kernel, ...] = ()
    trips: int = 1


# -- 1. fusion


def kernels(program: Graph) -> list[Kernel]:
    """What the program launches, in order."""
    outside = {id(v.root) for v in program.outputs}
    groups = _in_order(_groups(program))
    _recompute(groups, outside)
    home: dict[int, int] = {}  # the first group that makes a root: the one that writes it, if any does
    for index, group in enumerate(groups):
        for node in group:
            for v in node.outputs:
                home.setdefault(id(v.root), index)
    read = outside.union(*(_outer(group) for group in groups))
    found = []
    for index, group in enumerate(groups):
        writes = [v for n in group for v in n.outputs if home[id(v.root)] == index and id(v.root) in read]
        if not writes:
            continue
        outer = _outer(group)
        taken = dict.fromkeys(outer, 0)
        for node in group:
            for v in node.inputs:
                if id(v.root) in outer:
                    share = v.nbytes
                    if node.name in _TAKES:
                        share = min(share, sum(o.nbytes for o in node.outputs))
                    taken[id(v.root)] = min(v.root.nbytes, taken[id(v.root)] + share)
        moved = sum(taken.values()) + sum(v.nbytes for v in writes)
        kernel = _kernel(group, moved)
        found.append(dataclasses.replace(kernel, reads=tuple(outer.values()), writes=tuple(writes)))
    return found


def _outer(group: list[Node]) -> dict[int, Value]:
    """The arrays that a group reads and does not make, by identity."""
    inside = {id(v.root) for node in group for v in node.outputs}
    inputs = (v for node in group for v in node.inputs)
    return {id(v.root): v.root for v in inputs if not v.constant and id(v.root) not in inside}


def _groups(program: Graph) -> list[list[Node]]:
    """The equations of each kernel. A group's equations have one level: the most kernels that must be over
    before it may start."""
    level: dict[int, int] = {id(v): 0 for v in program.inputs}
    makers: dict[int, tuple[int, int]] = {}  # root -> (fused equation, its level)
    parent: list[int] = []
    nodes: list[Node] = []

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for node in program.nodes:
        start = max((level.get(id(v), 0) for v in node.inputs), default=0)
        if all(v.root is not v for v in node.outputs):
            end = start + (node.name == "optimization_barrier")
        elif all(v.constant for v in node.outputs):
            end = 0
        else:
            mine = len(nodes)
            nodes.append(node)
            parent.append(mine)
            if node.name in FUSED:
                for v in node.inputs:
                    other, at = makers.get(id(v.root), (-1, -1))
                    if at == start:
                        parent[find(other)] = find(mine)
                makers.update({id(v): (mine, start) for v in node.outputs if node.name not in REDUCTIONS})
            end = start + (node.name not in FUSED or node.name in REDUCTIONS)
        level.update({id(v): end for v in node.outputs})
    found: dict[int, list[Node]] = {}
    for i, node in enumerate(nodes):
        found.setdefault(find(i), []).append(node)
    return list(found.values())


def _in_order(groups: list[list[Node]]) -> list[list[Node]]:
    """The groups in the order of their first equations, each after those it reads from."""
    home = {id(v.root): index for index, group in enumerate(groups) for node in group for v in node.outputs}
    done: dict[int, None] = {}
    for first in range(len(groups)):
        stack = [first]
        while stack:
            at = stack[-1]
            needs = {home[key] for key in _outer(groups[at]) if key in home}
            missing = sorted(i for i in needs if i not in done)
            if missing and at not in done:
                stack += missing[::-1]
            else:
                done.setdefault(stack.pop())
    return [groups[i] for i in done]


def _recompute(groups: list[list[Node]], outside: set[int]) -> None:
    """Lets kernels compute again what is cheap and needs not much more to be read, as XLA fuses a producer
    into each of its readers."""
    readers: dict[int, set[int]] = {}
    for index, group in enumerate(groups):
        for key in _outer(group):
            readers.setdefault(key, set()).add(index)
    for group in groups:
        makers = {id(v.root): node for node in group for v in node.outputs}
        for node in list(group):
            for v in node.outputs:
                others = [groups[i] for i in readers.get(id(v.root), ())]
                if id(v.root) in outside or not others or v.root is not v:
                    continue
                again = _cheap(node, makers)
                if again is None or any(other[0].name not in FUSED for other in others):
                    continue
                wanted = _outer(again)
                if any(
                    sum(u.nbytes for key, u in wanted.items() if key not in _outer(other)) >= 2 * v.nbytes
                    for other in others
                ):
                    continue
                for i in readers.pop(id(v.root)):
                    groups[i][:0] = [n for n in again if n not in groups[i]]
                    for key in wanted:
                        readers.setdefault(key, set()).add(i)


def _cheap(node: Node, makers: dict[int, Node]) -> list[Node] | None:
    """What of its group an equation is made from, itself last; None if that is more than arithmetic on
    elements."""
    found: dict[int, Node] = {}
    stack = [node]
    while stack:
        one = stack.pop()
        if one.name not in _ELEMENTWISE | {"broadcast_in_dim", "iota"}:
            return None
        found[id(one)] = one
        stack += [makers[id(v.root)] for v in one.inputs if id(v.root) in makers]
    return list(found.values())[::-1]


# -- 2. to 4. what a kernel costs


def _kernel(group: list[Node], moved: int) -> Kernel:
    if group[0].name not in FUSED:
        return _heavy(group[0], moved)
    flop: dict[str, float] = {}
    for node in group:
        count = sum(v.size for v in (node.inputs if node.name in REDUCTIONS else node.outputs))
        factor = TRANSCENDENTAL if node.name in TRANSCENDENTALS else node.name not in _MOVES
        kind = _vector_kind(node.outputs[0])
        flop[kind] = flop.get(kind, 0.0) + factor * count
    in_place = not any(node.name in _MOVES | REDUCTIONS for node in group)
    return Kernel(name=group[-1].name, flop=flop, moved_bytes=moved, in_place=in_place)


def _vector_kind(value: Value) -> str:
    return "float64" if value.dtype in (jnp.float64, jnp.complex128) else "float32"


def product_kind(node: Node) -> str:
    """The arithmetic of a product: "half" (float16, bfloat16), "tf32" (float32 at less than the highest
    precision), "float32" or "float64"."""
    dtype = _product_dtype(node)
    if dtype in (jnp.float16, jnp.bfloat16):
        return "half"
    precision = str(node.params.get("precision"))
    if (
        dtype == jnp.float32
        and "HIGHEST" not in precision
        and "F32_F32_F32" not in precision.replace("TF32", "")
    ):
        return "tf32"
    return "float64" if dtype in (jnp.float64, jnp.complex128) else "float32"


def _product_dtype(node: Node) -> Any:
    return jnp.promote_types(node.inputs[0].dtype, node.inputs[1].dtype)


def _heavy(node: Node, moved: int) -> Kernel:
    """The kernel of an equation that is not fused."""
    name, out = node.name, node.outputs[0]
    if name in ("scan", "while", "cond"):
        return _control(node)
    if name == "dynamic_update_slice":  # in place
        return Kernel(name=name, flop={}, moved_bytes=min(moved, 2 * node.inputs[1].nbytes))
    kind, launches, scratch = _vector_kind(out), 1, 0
    if name in PRODUCTS:
        kind = product_kind(node)
        count = _dot_flop(node) if name == "dot_general" else _conv_flop(node)
        count *= 4 if jnp.issubdtype(_product_dtype(node), jnp.complexfloating) else 1
        # Precision "high" is had from three products of parts of the numbers.
        count *= 3 if kind == "tf32" and "HIGH" in str(node.params.get("precision")) else 1
    elif name == "fft":
        grid = math.prod(node.params["fft_lengths"])
        real = not all(jnp.issubdtype(v.dtype, jnp.complexfloating) for v in (node.inputs[0], out))
        transforms = max(node.inputs[0].size, out.size) / max(1, grid)
        count, scratch = (2.5 if real else 5.0) * grid * math.log2(max(2, grid)) * transforms, out.nbytes
    elif name in _FACTORS:
        a, b = node.inputs[0], node.inputs[-1]
        sides = b.shape[-1 if node.params.get("left_side", True) else -2]
        count, launches = _FACTORS[name](max(a.shape[-2:]), min(a.shape[-2:]), sides)
        count *= math.prod(a.shape[:-2]) * (4 if jnp.issubdtype(out.dtype, jnp.complexfloating) else 1)
    elif name in ("sort", "top_k"):
        count = sum(v.size for v in node.inputs) * math.log2(max(2, node.inputs[0].size))
    else:  # windows look at their elements; scatters and what is not known at each output once
        count = float(math.prod(node.params.get("window_dimensions", ())) * max(v.size for v in node.outputs))
    return Kernel(name=name, flop={kind: count}, moved_bytes=moved, launches=launches, scratch_bytes=scratch)


#: Flop and launches of a factorisation of a `n x k` matrix (n >= k), `m` right-hand sides: a column after the
#: other.
_FACTORS: dict[str, Callable[[int, int, int], tuple[float, int]]] = {
    "lu": lambda n, k, m: (n * k**2 - k**3 / 3, k),
    "qr": lambda n, k, m: (4 * n * k**2 - 4 * k**3 / 3, 2 * k),
    "geqrf": lambda n, k, m: (2 * n * k**2 - 2 * k**3 / 3, k),
    "householder_product": lambda n, k, m: (2 * n * k**2 - 2 * k**3 / 3, k),
    "cholesky": lambda n, k, m: (n**3 / 3, k),
    "triangular_solve": lambda n, k, m: (n**2 * m, 1 + n // 32),
    "eigh": lambda n, k, m: (9.0 * n**3, 10 * k),
    "svd": lambda n, k, m: (14.0 * n * k**2 + 8 * k**3, 10 * k),
}


def _dot_flop(node: Node) -> float:
    (contracted, _), _ = node.params["dimension_numbers"]
    lhs = node.inputs[0].shape
    count: int = math.prod(lhs[d] for d in contracted)
    return 2.0 * node.outputs[0].size * count


def _conv_flop(node: Node) -> float:
    numbers = node.params["dimension_numbers"]
    rhs = node.inputs[1]
    seen = rhs.size / max(1, rhs.shape[numbers.rhs_spec[0]])  # taps * channels of one output
    spread: int = math.prod(node.params["lhs_dilation"] or (1,))
    return float(2.0 * node.outputs[0].size * seen / spread)


def _control(node: Node) -> Kernel:
    """A loop or a branch."""
    params = node.params
    bodies = {"scan": "jaxpr", "while": "body_jaxpr"}
    found = [params[bodies[node.name]]] if node.name in bodies else params["branches"]
    programs = [(program, tuple(kernels(program))) for program in map(graph, found)]
    program, inner = max(programs, key=lambda one: sum(k.trips * k.moved_bytes for k in one[1]))
    # The next carry, beside the present one.
    if node.name == "scan":
        count = scan_counts(params)[1]
    else:
        count = len(node.outputs) if node.name == "while" else 0
    carried = sum(v.nbytes for v in node.outputs[:count])
    return Kernel(
        name=node.name,
        flop={},
        moved_bytes=0,
        launches=0,
        scratch_bytes=workspace(program, inner) + carried,
        inner=inner,
        trips={"scan": params.get("length", 1), "while": WHILE_TRIPS}.get(node.name, 1),
    )


# -- 5. memory


def workspace(program: Graph, steps: Sequence[Kernel]) -> int:
    """Bytes alive at most beside inputs and outputs. `steps`: the program's `kernels`."""
    return needs(program, steps, dead=(), temporary=())


def needs(program: Graph, steps: Sequence[Kernel], dead: Sequence[Value], temporary: Sequence[Value]) -> int:
    """Bytes alive at most, of intermediates, of the inputs `dead` until their last use, and of the outputs
    `temporary` from their first.

    Other inputs and outputs are not counted, nor an intermediate that an elementwise kernel turns into such
    an output.
    """
    last: dict[int, int] = {}
    for at, kernel in enumerate(steps):
        last.update({id(v.root): at for v in (*kernel.reads, *kernel.writes)})
    inputs = {id(v.root) for v in program.inputs}
    kept = {id(v.root) for v in program.outputs}
    counted = {id(v.root): v.nbytes for v in dead if id(v.root) in last or id(v.root) in kept}
    free = (inputs | kept) - {id(v.root) for v in (*dead, *temporary)}
    memory: dict[int, int] = {}  # by array: the last of those that share its memory
    for at, kernel in reversed(list(enumerate(steps))):
        over = [v for v in kernel.reads if last[id(v)] == at and id(v) not in inputs | kept]
        for v in kernel.writes:
            memory.setdefault(id(v), id(v))
            ending = next((u for u in over if kernel.in_place and u.nbytes == v.nbytes), None)
            if ending is not None:
                over.remove(ending)
                memory[id(ending)] = memory[id(v)]
    alive = {key: nbytes for key, nbytes in counted.items() if key not in free}
    peak = sum(v.root.nbytes for v in dead)
    for at, kernel in enumerate(steps):
        alive.update({memory[id(v)]: v.nbytes for v in kernel.writes if memory[id(v)] not in free})
        peak = max(peak, sum(alive.values()) + kernel.scratch_bytes)
        for v in (*kernel.reads, *kernel.writes):
            if last[id(v)] == at and id(v) not in kept and memory.get(id(v), id(v)) == id(v):
                alive.pop(id(v), None)
    return peak
