r"""What a program would cost on a device that is not at hand: kernels, flop and bytes, counted from its jaxpr.

The model, in the order in which it is applied:

1. **Inlining.** Calls (`jit`, `custom_jvp`, `custom_vjp`, `checkpoint`, the solve of `custom_linear_solve`) are inlined, equal equations with
   equal operands merged and dead ones dropped, as XLA would. What depends on no array is free.
2. **Fusion.** Products, convolutions, transforms, factorisations, sorts, scatters, windows and loops are a kernel each. All other
   equations are elementwise, or move data: those that feed each other, with no such kernel or finished reduction on a path between them, are one
   kernel, which a reduction may end. Reshapes are free, and so are transposes beside products.
3. **Bytes** of a kernel: what it reads of each array from outside (a slice or gather only what it takes), once, and what others read of it.
4. **Flop**: $2\,batch\,m\,n\,k$ of a product; of a convolution 2 for each output and tap and channel that it sees, zeros of a dilated input not
   counted; $5 n \log_2 n$ of a complex transform, half of a real one; the leading term of a factorisation; 1 an element otherwise, 15 where transcendental.
   Complex products count four times.
5. **Loops**: a `scan` costs its body times its length; a `while` loop, whose trips are unknown, `WHILE_TRIPS` times its body; of a `cond` the dearest branch.
6. **Memory**: kernels run in the jaxpr's order. An array lives from its kernel to its last reader; an elementwise kernel may write over an operand of the same
   size that ends there. Nothing is lost to alignment, and libraries' own scratch is not known; a transform is given one copy of its output.

What it does not know: fusion of a product with what follows it, caches, autotuned algorithms, launches that overlap. **Source:** the roofline is Williams,
Waterman, Patterson, CACM 52(4), 2009; flop of factorisations as in Golub and Van Loan; the fusion rule is ours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from mwplan import trees

WHILE_TRIPS = 10
TRANSCENDENTAL = 15  # flop of one element of `exp` and the like

_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
}
_ALIASES = {"reshape", "squeeze", "expand_dims", "optimization_barrier", "stop_gradient", "copy", "pvary"}
_PRODUCTS = {"dot_general", "conv_general_dilated"}
_REDUCTIONS = {
    *("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor"),
    *("argmax", "argmin", "reduce"),
}
_MOVES = {
    *("slice", "dynamic_slice", "gather", "pad", "concatenate", "rev", "transpose", "broadcast_in_dim", "iota"),
    *("split", "select_and_gather_add"),
}
_TAKES = {"slice", "dynamic_slice", "gather", "split"}  # read no more than they write
_TRANSCENDENTAL = {
    *("exp", "exp2", "expm1", "log", "log1p", "sin", "cos", "tan", "asin", "acos", "atan", "atan2"),
    *("sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "logistic", "pow", "cbrt", "erf", "erfc", "erf_inv"),
    *("lgamma", "digamma", "igamma", "igammac", "bessel_i0e", "bessel_i1e", "random_bits", "threefry2x32"),
}
_ELEMENTWISE = {
    *("add", "add_any", "sub", "mul", "div", "rem", "neg", "sign", "abs", "max", "min", "clamp", "integer_pow"),
    *("sqrt", "rsqrt", "square", "floor", "ceil", "round", "is_finite", "nextafter", "select_n", "not", "and"),
    *("or", "xor", "eq", "ne", "lt", "le", "gt", "ge", "eq_to", "le_to", "lt_to", "convert_element_type"),
    *("bitcast_convert_type", "reduce_precision", "real", "imag", "complex", "conj", "shift_left"),
    *("shift_right_logical", "shift_right_arithmetic", "population_count", "clz", "copy_p"),
    *("random_wrap", "random_unwrap", "random_seed", "random_fold_in", "random_split", "random_clone"),
}


@dataclass(eq=False, slots=True)
class Value:
    """An array of a program. `root`: the array whose memory it is (itself, unless it is a view); `constant`: depends on no array."""

    shape: tuple[int, ...]
    dtype: Any
    nbytes: int
    constant: bool = False
    root: Value = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.root is None:
            self.root = self

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


@dataclass(eq=False, slots=True)
class Node:
    """One equation."""

    name: str
    params: dict[str, Any]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


@dataclass(frozen=True)
class Graph:
    """A program without calls: equations in an order in which they can run."""

    inputs: list[Value]
    nodes: list[Node]
    outputs: list[Value]

    def everywhere(self) -> Iterator[Node]:
        """All equations, those of loops and branches too."""
        for node in self.nodes:
            yield node
            for body in _bodies(node):
                yield from graph(body).everywhere()


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """What a device runs at once.

    **Attributes:** `flop`, by kind of arithmetic (`kind_of`, or "factor" and "factor64" of factorisations); `moved_bytes`, to and from
    memory; `launches`; `scratch_bytes`, alive while it runs; `reads` and `writes`, whole arrays; `in_place`, whether an output
    may be written over an input; `inner`, of a loop: the kernels of its body, run `trips` times.
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


def trace(operation: Callable[..., Any], *args: Any) -> tuple[Graph, Any]:
    """The program that `operation(*args)` is, and the shapes of its result. `args`: pytrees of arrays or shapes; nothing is computed."""
    jaxpr, shapes = jax.make_jaxpr(operation, return_shape=True)(*args)
    return graph(jaxpr), shapes


# -- 1. inlining


class _Inliner:
    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.known: dict[Any, tuple[Value, ...]] = {}
        self.literals: dict[Any, Value] = {}

    def run(self, jaxpr: Jaxpr, consts: Sequence[Value], args: Sequence[Value]) -> list[Value]:
        env: dict[Any, Value] = {}
        env.update(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))

        def read(atom: Any) -> Value:
            if isinstance(atom, Literal):
                key = (str(atom.aval), str(atom.val))
                return self.literals.setdefault(key, _value(atom.aval, constant=True))
            return env[atom]

        for eqn in jaxpr.eqns:
            inputs = [read(atom) for atom in eqn.invars]
            env.update(zip(eqn.outvars, self.equation(eqn, inputs), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, inputs: list[Value]) -> Sequence[Value]:
        name = eqn.primitive.name
        if name == "custom_linear_solve":
            lengths, jaxprs = eqn.params["const_lengths"], eqn.params["jaxprs"]
            start = lengths.matvec + lengths.vecmat
            consts = inputs[start : start + lengths.solve]
            return self.call(jaxprs.solve, [*consts, *inputs[sum(lengths) :]])
        if name in _CALLS:
            return self.call(eqn.params[_CALLS[name]], inputs)
        try:
            key = (name, tuple(map(id, inputs)), tuple(sorted(eqn.params.items())))
            if key in self.known:
                return self.known[key]
        except TypeError:  # parameters that cannot be compared: not merged
            key = None
        free = all(v.constant for v in inputs) and not eqn.effects and name != "random_bits"
        outputs = tuple(_value(var.aval, constant=free) for var in eqn.outvars)
        if key is not None and name != "optimization_barrier":
            self.known[key] = outputs
        self.nodes.append(Node(name, eqn.params, tuple(inputs), outputs))
        return outputs

    def call(self, jaxpr: Any, inputs: Sequence[Value]) -> list[Value]:
        if isinstance(jaxpr, ClosedJaxpr):
            consts = [_value(var.aval) for var in jaxpr.jaxpr.constvars]
            return self.run(jaxpr.jaxpr, consts, inputs)
        return self.run(jaxpr, (), inputs)


def _value(aval: Any, constant: bool = False) -> Value:
    shape, dtype = tuple(getattr(aval, "shape", ())), getattr(aval, "dtype", None)
    if dtype is None or dtype == jax.dtypes.float0:
        return Value(shape, dtype, 0, True)
    return Value(shape, dtype, trees.nbytes(jax.ShapeDtypeStruct(shape, dtype)), constant)


def graph(jaxpr: Any) -> Graph:
    """A jaxpr without its calls, repetitions and dead equations."""
    inliner = _Inliner()
    opened = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    consts = [_value(var.aval) for var in opened.constvars]
    inputs = [_value(var.aval) for var in opened.invars]
    outputs = inliner.run(opened, consts, inputs)
    wanted = {id(v) for v in outputs}
    alive = []
    for node in reversed(inliner.nodes):
        if any(id(v) in wanted for v in node.outputs):
            wanted.update(id(v) for v in node.inputs)
            alive.append(node)
    nodes = alive[::-1]
    _view(nodes)
    return Graph(inputs, nodes, outputs)


def _view(nodes: list[Node]) -> None:
    """Gives views the root of what they look at."""
    readers: dict[int, set[str]] = {}
    for node in nodes:
        for v in node.inputs:
            readers.setdefault(id(v), set()).add(node.name)
    maker = {id(v): node.name for node in nodes for v in node.outputs}
    for node in nodes:
        if node.name == "transpose":
            at_product = maker.get(id(node.inputs[0])) in _PRODUCTS
            alias = at_product or readers.get(id(node.outputs[0]), {""}) <= _PRODUCTS
        elif node.name == "broadcast_in_dim":
            alias = node.inputs[0].size == node.outputs[0].size
        elif node.name == "convert_element_type":
            alias = node.inputs[0].dtype == node.outputs[0].dtype
        else:
            alias = node.name in _ALIASES
        if alias:
            for old, new in zip(node.inputs, node.outputs):
                new.root = old.root


# -- 2. fusion


def kernels(program: Graph) -> list[Kernel]:
    """What the program launches, in order."""
    groups = _groups(program)
    outside = {id(v.root) for v in program.outputs}
    home: dict[int, int] = {}  # which group makes a root
    for index, group in enumerate(groups):
        home.update({id(v.root): index for node in group for v in node.outputs})
    read_by: dict[int, set[int]] = {}
    for index, group in enumerate(groups):
        for node in group:
            for v in node.inputs:
                read_by.setdefault(id(v.root), set()).add(index)
    made = []
    for index, group in enumerate(groups):
        inside = {id(v.root) for node in group for v in node.outputs}
        writes = [
            v
            for node in group
            for v in node.outputs
            if id(v) in outside or read_by.get(id(v.root), set()) - {index}
        ]
        taken: dict[int, int] = {}
        reads: dict[int, Value] = {}
        for node in group:
            for v in node.inputs:
                if v.constant or id(v.root) in inside:
                    continue
                reads[id(v.root)] = v.root
                share = min(v.nbytes, sum(o.nbytes for o in node.outputs)) if node.name in _TAKES else v.nbytes
                taken[id(v.root)] = min(v.root.nbytes, taken.get(id(v.root), 0) + share)
        made.append(_kernel(group, tuple(reads.values()), sum(taken.values()), tuple(writes)))
    return [made[i] for i in _order(groups, home)]


def _groups(program: Graph) -> list[list[Node]]:
    """The equations of each kernel. A group's equations have one level: the most kernels that must be over before it may start."""
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
            fused = _fused(node)
            if fused:
                for v in node.inputs:
                    other, at = makers.get(id(v.root), (-1, -1))
                    if at == start:
                        parent[find(other)] = find(mine)
                makers.update({id(v): (mine, start) for v in node.outputs if node.name not in _REDUCTIONS})
            end = start + (not fused or node.name in _REDUCTIONS)
        level.update({id(v): end for v in node.outputs})
    found: dict[int, list[Node]] = {}
    for i, node in enumerate(nodes):
        found.setdefault(find(i), []).append(node)
    return list(found.values())


def _fused(node: Node) -> bool:
    return node.name in _ELEMENTWISE | _TRANSCENDENTAL | _MOVES | _REDUCTIONS


def _order(groups: list[list[Node]], home: dict[int, int]) -> list[int]:
    """The groups in the order of their first equations, each after those it reads from."""
    done: dict[int, None] = {}
    for first in range(len(groups)):
        stack = [first]
        while stack:
            at = stack[-1]
            needs = {home[id(v.root)] for node in groups[at] for v in node.inputs if id(v.root) in home}
            missing = sorted(i for i in needs if i != at and i not in done)
            if missing and at not in done:
                stack += missing[::-1]
            else:
                done.setdefault(stack.pop())
    return list(done)


# -- 3. to 5. what a kernel costs


def _kernel(group: list[Node], reads: tuple[Value, ...], read_bytes: int, writes: tuple[Value, ...]) -> Kernel:
    moved = read_bytes + sum(v.nbytes for v in writes)
    if len(group) == 1 and not _fused(group[0]):
        kernel = _heavy(group[0], moved)
    else:
        flop: dict[str, float] = {}
        for node in group:
            count = sum(v.size for v in (node.inputs if node.name in _REDUCTIONS else node.outputs))
            factor = TRANSCENDENTAL if node.name in _TRANSCENDENTAL else node.name not in _MOVES
            wide = any(_is_wide(v.dtype) for v in node.outputs)
            kind = "float64" if wide else "float32"
            flop[kind] = flop.get(kind, 0.0) + factor * count
        in_place = not any(node.name in _MOVES | _REDUCTIONS for node in group)
        kernel = Kernel(name=group[-1].name, flop=flop, moved_bytes=moved, in_place=in_place)
    return dataclasses.replace(kernel, reads=reads, writes=writes)


def _is_wide(dtype: Any) -> bool:
    return dtype in (jnp.float64, jnp.complex128)


def kind_of(node: Node) -> str:
    """The arithmetic of a product: "float16", "bfloat16", "tf32" (float32 at default precision), "float32" or "float64"."""
    dtype = jnp.promote_types(node.inputs[0].dtype, node.inputs[1].dtype)
    if _is_wide(dtype):
        return "float64"
    if dtype in (jnp.float16, jnp.bfloat16):
        return jnp.dtype(dtype).name
    precision = str(node.params.get("precision"))
    if dtype == jnp.float32 and "HIGHEST" not in precision and "F32_F32_F32" not in precision.replace("TF32", ""):
        return "tf32"
    return "float32"


def _heavy(node: Node, moved: int) -> Kernel:
    name, out = node.name, node.outputs[0]
    wide = _is_wide(out.dtype)
    vector = "float64" if wide else "float32"
    if name in _PRODUCTS:
        dtype = jnp.promote_types(node.inputs[0].dtype, node.inputs[1].dtype)
        count = _dot_flop(node) if name == "dot_general" else _conv_flop(node)
        count *= 4 if jnp.issubdtype(dtype, jnp.complexfloating) else 1
        # Three products of halves of the numbers make up one of "high" precision.
        count *= 3 if kind_of(node) == "tf32" and "HIGH" in str(node.params.get("precision")) else 1
        return Kernel(name=name, flop={kind_of(node): count}, moved_bytes=moved)
    if name == "fft":
        grid = math.prod(node.params["fft_lengths"])
        lead = max(node.inputs[0].size, out.size) / max(1, grid)
        real = not all(jnp.issubdtype(v.dtype, jnp.complexfloating) for v in (node.inputs[0], out))
        count = (2.5 if real else 5.0) * grid * math.log2(max(2, grid)) * lead
        return Kernel(name=name, flop={vector: count}, moved_bytes=moved, scratch_bytes=out.nbytes)
    if name in _FACTORS:
        rows, cols = node.inputs[0].shape[-2:]
        other = node.inputs[1].shape[-1] if name == "triangular_solve" else 0
        if name == "triangular_solve" and not node.params["left_side"]:
            other = node.inputs[1].shape[-2]
        count, launches = _FACTORS[name](max(rows, cols), min(rows, cols), other)
        count *= math.prod(node.inputs[0].shape[:-2])
        count *= 4 if jnp.issubdtype(out.dtype, jnp.complexfloating) else 1
        kind = "factor64" if wide else "factor"
        return Kernel(name=name, flop={kind: count}, moved_bytes=moved, launches=launches)
    if name in ("scan", "while", "cond"):
        return _control(node, moved)
    if name == "dynamic_update_slice":  # in place
        return Kernel(name=name, flop={}, moved_bytes=min(moved, 2 * node.inputs[1].nbytes))
    if name in ("sort", "top_k", "approx_top_k"):
        count = sum(v.size for v in node.inputs) * math.log2(max(2, node.inputs[0].size))
        return Kernel(name=name, flop={vector: count}, moved_bytes=4 * moved, launches=2)
    window = math.prod(node.params.get("window_dimensions", ()))
    count = float(window * max((v.size for v in node.outputs), default=0))
    return Kernel(name=name, flop={vector: count}, moved_bytes=moved)


#: Flop and launches of a factorisation of a `n x k` matrix (n >= k), `m` right-hand sides: a column after the other.
_FACTORS: dict[str, Callable[[int, int, int], tuple[float, int]]] = {
    "lu": lambda n, k, m: (n * k**2 - k**3 / 3, k),
    "qr": lambda n, k, m: (4 * n * k**2 - 4 * k**3 / 3, 2 * k),
    "geqrf": lambda n, k, m: (2 * n * k**2 - 2 * k**3 / 3, k),
    "geqp3": lambda n, k, m: (2 * n * k**2 - 2 * k**3 / 3, k),
    "householder_product": lambda n, k, m: (2 * n * k**2 - 2 * k**3 / 3, k),
    "cholesky": lambda n, k, m: (n**3 / 3, k),
    "triangular_solve": lambda n, k, m: (n**2 * m, 1 + n // 32),
    "tridiagonal_solve": lambda n, k, m: (8.0 * n * m, 1),
    "eigh": lambda n, k, m: (9.0 * n**3, 10 * k),
    "eig": lambda n, k, m: (25.0 * n**3, 10 * k),
    "schur": lambda n, k, m: (25.0 * n**3, 10 * k),
    "svd": lambda n, k, m: (14.0 * n * k**2 + 8 * k**3, 10 * k),
}


def _dot_flop(node: Node) -> float:
    (contracted, _), _ = node.params["dimension_numbers"]
    lhs = node.inputs[0].shape
    return 2.0 * node.outputs[0].size * math.prod(lhs[d] for d in contracted)


def _conv_flop(node: Node) -> float:
    numbers = node.params["dimension_numbers"]
    rhs = node.inputs[1]
    seen = rhs.size / max(1, rhs.shape[numbers.rhs_spec[0]])  # taps * channels of one output
    return 2.0 * node.outputs[0].size * seen / math.prod(node.params["lhs_dilation"] or (1,))


def _bodies(node: Node) -> list[Any]:
    """The jaxprs of a loop or a branch."""
    if node.name == "scan":
        return [node.params["jaxpr"]]
    if node.name == "while":
        return [node.params["body_jaxpr"]]
    return list(node.params["branches"]) if node.name == "cond" else []


def _control(node: Node, moved: int) -> Kernel:
    best: tuple[int, tuple[Kernel, ...], int] = (-1, (), 0)
    for body in _bodies(node):
        program = graph(body)
        inner = tuple(kernels(program))
        weight = sum(k.trips * k.moved_bytes for k in inner)
        scratch = workspace(program, inner) + _carried(node)
        best = max(best, (weight, inner, scratch), key=lambda one: one[0])
    trips = {"scan": node.params.get("length", 1), "while": WHILE_TRIPS}.get(node.name, 1)
    return Kernel(
        name=node.name, flop={}, moved_bytes=0, scratch_bytes=best[2], inner=best[1], trips=trips, launches=0
    )


def _carried(node: Node) -> int:
    """The next carry, beside the present one."""
    count = node.params["num_carry"] if node.name == "scan" else len(node.outputs)
    return sum(v.nbytes for v in node.outputs[:count]) if node.name != "cond" else 0


# -- 6. memory


def workspace(program: Graph, run: Iterable[Kernel] | None = None) -> int:
    """Bytes alive at most beside inputs and outputs."""
    return needs(program, run, dead=(), temporary=())


def needs(
    program: Graph, run: Iterable[Kernel] | None, dead: Sequence[Value], temporary: Sequence[Value]
) -> int:
    """Bytes alive at most, of intermediates, of the inputs `dead` until their last use, and of the outputs `temporary` from their first.

    Other inputs and outputs are not counted. `run`: what `kernels` returned, where it is there already.
    """
    steps = list(kernels(program) if run is None else run)
    counted = {id(v.root): v.root for v in dead}
    last: dict[int, int] = {}
    for at, kernel in enumerate(steps):
        last.update({id(v.root): at for v in (*kernel.reads, *kernel.writes)})
    kept = {id(v.root) for v in program.outputs}
    free = {id(v.root) for v in program.inputs} | kept
    free -= set(counted) | {id(v.root) for v in temporary}
    alive = {key: v.nbytes for key, v in counted.items() if key not in free}
    peak = sum(alive.values())
    alive = {key: nbytes for key, nbytes in alive.items() if key in last or key in kept}
    for at, kernel in enumerate(steps):
        dying = {id(v.root) for v in (*kernel.reads, *kernel.writes) if last[id(v.root)] == at} - kept
        over = [alive[key] for key in dying if key in alive] if kernel.in_place else []
        saved = 0
        for v in kernel.writes:
            if id(v.root) in free or v.root is not v:
                continue
            alive[id(v)] = v.nbytes
            if v.nbytes in over:
                over.remove(v.nbytes)
                saved += v.nbytes
        peak = max(peak, sum(alive.values()) + kernel.scratch_bytes - saved)
        for key in dying:
            alive.pop(key, None)
    return peak
