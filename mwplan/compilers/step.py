"""A compiled step that says which of its arguments is not what it was compiled for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from mwplan.common import trees
from mwplan.common.errors import ArgumentError


class Step:
    """A compiled program, called with arrays of the shapes that it was compiled for.

    **Attributes:** all that JAX's compiled program has (`memory_analysis`, `as_text`, ...), which is
    `compiled`; `names`, of the arguments: the last stands for all that follow, by their number.
    **Raises:** `ArgumentError` where an argument has another structure, shape or dtype. **Cost:** of a call
    that is accepted, none.
    """

    def __init__(self, compiled: Any, args: tuple[Any, ...], names: tuple[str, ...]) -> None:
        self.compiled, self.names = compiled, names
        self._structs = trees.struct(args)

    def __call__(self, *args: Any) -> Any:
        """What the program returns."""
        try:
            return self.compiled(*args)
        except TypeError as error:
            if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(args)):
                raise  # JAX says that what is compiled is not to be traced
            if difference := self._difference(args):
                raise ArgumentError(difference) from error
            raise

    def __getattr__(self, name: str) -> Any:
        if name == "compiled":  # not there yet, as while it is copied
            raise AttributeError(name)
        return getattr(self.compiled, name)

    def _difference(self, args: tuple[Any, ...]) -> str:
        """What is other in `args` than what the program was compiled for, in words, or nothing."""
        advice = "Fit again for it"
        if len(args) != len(self._structs):
            return f"the step takes {len(self._structs)} arguments and got {len(args)}"
        for at, (got, want) in enumerate(zip(args, self._structs)):
            name = f"`{self._name(at)}`"
            leaves, treedef = jax.tree_util.tree_flatten_with_path(got)
            wanted, want_treedef = jax.tree_util.tree_flatten_with_path(want)
            other: bool = treedef != want_treedef  # type: ignore[operator]
            if other:
                keystr, own = jax.tree_util.keystr, self._name(at)
                keys = [[own + keystr(path) for path, _ in some] for some in (leaves, wanted)]
                how = differ(*keys)
                return f"{name} has another structure than the step was compiled for: {how}. {advice}"
            for (path, leaf), (_, struct) in zip(leaves, wanted):
                shown = [_shown(one) for one in (leaf, struct)]
                if shown[0] == shown[1]:
                    continue
                where = f"`{self._name(at)}{jax.tree_util.keystr(path)}`"
                advice += ", or, if it is the last batch of a data set, leave it out or pad it"
                return f"{where} is {shown[0]}, and the step was compiled for {shown[1]}. {advice}"
        return ""

    def _name(self, at: int) -> str:
        last = len(self.names) - 1
        return self.names[at] if at < last else f"{self.names[-1]}[{at - last}]"


def differ(got: Sequence[str], want: Sequence[str]) -> str:
    """How the leaves of a tree, by their names, differ from those that are wanted, in words."""

    def some(names: list[str]) -> str:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return ", ".join(f"`{name.strip('`')}`" for name in names[:3]) + more

    missing, new = [one for one in want if one not in got], [one for one in got if one not in want]
    told = [f"it lacks {some(missing)}"] if missing else []
    told += [f"it has {some(new)} besides"] if new else []
    return " and ".join(told) or "the leaves are the same, but not what holds them (types, static fields)"


def _shown(leaf: Any) -> str:
    """An array's dtype and shape."""
    if not hasattr(leaf, "dtype"):
        return type(leaf).__name__
    dtype = leaf.dtype if trees.is_key(leaf) else jax.dtypes.canonicalize_dtype(leaf.dtype)
    return f"{dtype}{list(leaf.shape)}"
