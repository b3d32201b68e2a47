"""The arguments that a function is traced for: which leaves are arrays, and what they are called."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mwplan.common import trees
from mwplan.common.errors import ArgumentError
from mwplan.compilers.step import differ

PyTree = Any


@dataclass(frozen=True, kw_only=True)
class Signature:
    """The arguments that a function was traced for.

    `treedef` of `(params, args)`, `params_treedef` of the first; `dynamic`, which leaves are arrays or
    numbers, and `avals`, their types; `fixed`, the other leaves (functions, texts), by position; `names`, of
    all leaves, as paths; `params`, how many of the leaves are those of `params`."""

    treedef: Any
    params_treedef: Any
    dynamic: tuple[int, ...]
    avals: tuple[Any, ...]
    fixed: dict[int, Any]
    names: tuple[str, ...]
    params: int

    @classmethod
    def of(cls, params: PyTree, args: tuple[Any, ...]) -> Signature:
        """Of arguments: arrays, numbers, `jax.ShapeDtypeStruct`s; other leaves are fixed. Numbers too in an
        argument that has such leaves (as an Equinox module), and `True` and `False`: Python may branch on
        them."""
        found, treedef = jax.tree_util.tree_flatten_with_path((params, args))
        numbers = [flag for tree in (params, *args) for flag in _numbers_vary(tree)]
        dynamic = tuple(
            i
            for i, ((_, leaf), vary) in enumerate(zip(found, numbers, strict=True))
            if is_dynamic(leaf, vary)
        )
        inside = {*dynamic}
        return cls(
            treedef=treedef,
            params_treedef=jax.tree.structure(params),
            dynamic=dynamic,
            avals=tuple(_aval(found[i][1]) for i in dynamic),
            fixed={i: leaf for i, (_, leaf) in enumerate(found) if i not in inside},
            names=tuple(_path(path) for path, _ in found),
            params=len(jax.tree.leaves(params)),
        )

    def arrays(self, params: PyTree, args: tuple[Any, ...]) -> list[Any]:
        """The dynamic leaves of such arguments. Raises `ArgumentError` where they are of another structure,
        shape or dtype."""
        found, treedef = jax.tree.flatten((params, args))
        if treedef != self.treedef:
            raise ArgumentError(f"{self._other(params, args)}: fit the function again for other arguments")
        for i, leaf in enumerate(found):
            if i in self.fixed:
                if isinstance(leaf, jax.core.Tracer):
                    raise ArgumentError(
                        f"{self.names[i]} is {self.fixed[i]!r}, part of the program that was planned, and "
                        "`jax.jit` around it made an array of it. Let only arrays through: with Equinox "
                        "`eqx.filter_jit(f, compiler_options=mw.compiler_options())`"
                    )
                if not _same(leaf, self.fixed[i]):
                    raise ArgumentError(
                        f"{self.names[i]} is {leaf!r}, and the step was compiled for {self.fixed[i]!r}: what "
                        "is no array is "
                        "part of the program; fit the function again"
                    )
            elif not is_dynamic(leaf):
                raise ArgumentError(f"{self.names[i]} is {leaf!r}, and the step was compiled for an array")
        for i, want in zip(self.dynamic, self.avals):
            got = _aval(found[i])
            if got.shape != want.shape or got.dtype != want.dtype:
                raise ArgumentError(
                    f"{self.names[i]} is {got.dtype}{list(got.shape)}, and the step was compiled for "
                    f"{want.dtype}{list(want.shape)}: fit the function again for other shapes"
                )
        return [found[i] for i in self.dynamic]

    def _other(self, params: PyTree, args: tuple[Any, ...]) -> str:
        """How the structure of such arguments differs, in words."""
        given, count = 1 + len(args), 1 + len(self.treedef.children()[1].children())
        if given != count:
            also = f" and {count - 1} more" if count > 1 else " alone"
            return f"{given} arguments were given, and the step was compiled for {count}, `params`{also}"
        got = [_path(path) for path, _ in jax.tree_util.tree_flatten_with_path((params, args))[0]]
        return f"the arguments are not those that the step was compiled for: {differ(got, self.names)}"

    def lost(self, arguments: PyTree, arrays: Sequence[Any], returned: Sequence[Any]) -> list[str]:
        """The names of array leaves that were `arrays` before the function ran on these arguments, are others
        now, and are not among what it returned: those of mutable trees, as Flax NNX's modules."""
        after = jax.tree.leaves(arguments)
        known = {id(one) for one in returned}
        if len(after) != len(self.names):
            return []
        before = dict(zip(self.dynamic, arrays))
        return [
            self.names[i]
            for i, leaf in enumerate(after)
            if i in before and leaf is not before[i] and id(leaf) not in known
        ]

    def arguments(self, arrays: Sequence[Any]) -> tuple[PyTree, tuple[Any, ...]]:
        """`(params, args)` with these dynamic leaves."""
        leaves = {**self.fixed, **dict(zip(self.dynamic, arrays))}
        params, args = jax.tree.unflatten(self.treedef, [leaves[i] for i in range(len(leaves))])
        return params, args


def warn_if_lost(names: Sequence[str]) -> None:
    """Warns of what `Signature.lost` found."""
    if names:
        some = ", ".join([*names[:4], *(["..."] if names[4:] else [])])
        warnings.warn(
            f"`loss` changes {some} and does not return it: what it writes there is lost at every step "
            "(running averages, counters of keys). With `has_aux=True` it may return `(loss, "
            "nnx.state(model, ...))`, to be written back after the step",
            stacklevel=5,
        )


def is_dynamic(leaf: Any, numbers: bool = True) -> bool:
    """Whether a leaf of the arguments is an array, its shape, or (if `numbers`) a number."""
    if isinstance(leaf, (bool, int, float, complex)):
        return numbers and not isinstance(leaf, bool)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return True
    return trees.is_array(leaf) and getattr(leaf.dtype, "kind", "f") not in "OUSMm"


def _numbers_vary(tree: PyTree) -> list[bool]:
    """For each leaf, whether it would vary from call to call if it is a number."""
    leaves = jax.tree.leaves(tree)
    vary = all(is_dynamic(leaf) for leaf in leaves)
    return [vary] * len(leaves)


def _aval(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.core.ShapedArray(leaf.shape, _canonical(leaf.dtype), weak_type=leaf.weak_type)
    if isinstance(leaf, (bool, int, float, complex)):
        return jax.typeof(jnp.asarray(leaf)).update(weak_type=not isinstance(leaf, bool))
    aval = jax.typeof(leaf)
    return aval.update(dtype=_canonical(aval.dtype))


def _canonical(dtype: Any) -> Any:
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        return dtype
    return np.dtype(jax.dtypes.canonicalize_dtype(dtype))


def traceable(aval: Any) -> Any:
    """The shape with which to trace an argument of that type."""
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type, sharding=_sharding(aval))


def _sharding(aval: Any) -> Any:
    """Where an array's type says how it lies (axes of type `Explicit`), that."""
    sharding = getattr(aval, "sharding", None)
    kinds = getattr(getattr(sharding, "mesh", None), "axis_types", None) or ()
    return sharding if jax.sharding.AxisType.Explicit in kinds else None


def _same(a: Any, b: Any) -> bool:
    try:
        return bool(a is b or (type(a) is type(b) and a == b))
    except Exception:
        return False


def _path(path: Any) -> str:
    """A leaf of `(params, args)` as people write it."""
    first, *rest = path
    if first.idx == 0:
        return f"`params{jax.tree_util.keystr(tuple(rest))}`"
    return f"`args{jax.tree_util.keystr(tuple(rest))}`"
