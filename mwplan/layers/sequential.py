"""Several layers as one layer, and the composition of their rules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from mwplan.common import trees
from mwplan.network import rules
from mwplan.network.layer import layer
from mwplan.network.rules import (
    InvertRule,
    StoreRule,
    Unavailable,
    VijpRule,
    WholeFragment,
)


@layer
class Sequential:
    """Several layers as one, applied in order.

    >>> mw.layers.Sequential((jnp.square, jnp.negative))(jnp.array([2.0, 3.0]))
    Array([-4., -9.], dtype=float32)
    """

    layers: tuple[Any, ...]

    def __call__(self, x: Any) -> Any:
        """Applies the layers."""
        for one in self.layers:
            x = one(x)
        return x

    def with_inputs(self, x: Any) -> Iterator[tuple[Any, Any]]:
        """Each layer with the struct of its input."""
        for one in self.layers:
            yield one, x
            x = jax.eval_shape(one, x)

    def vijp_rules(self, x: Any) -> Sequence[VijpRule | Unavailable]:
        """The parts' rules composed: `parts` with each one's first, `parts.NAME` with option NAME wherever a
        part has it."""
        offers = []
        for one, at in self.with_inputs(x):
            own = [r for r in rules.vijp_rules(one, at) if isinstance(r, VijpRule)]
            # Stable: a vijp before a fragment before a whole one.
            offers.append(sorted(own, key=lambda r: (isinstance(r, WholeFragment), r.has_fragment)))
        first = tuple(offer[0] for offer in offers)
        found: list[VijpRule | Unavailable] = [Parts("parts", first, any(r.has_fragment for r in first))]
        for name in dict.fromkeys(
            r.name for offer in offers for r in offer if not isinstance(r, WholeFragment)
        ):
            parts = tuple(next((r for r in offer if r.name == name), offer[0]) for offer in offers)
            if parts != first:
                found.append(Parts(f"parts.{name}", parts, any(r.has_fragment for r in parts)))
        return found

    def store_rules(self, x: Any) -> Sequence[StoreRule]:
        """Each part's own first rule; those by their output where there are any; only convolutions and
        products; only the input."""
        offers = [rules.store_rules(one, at) for one, at in self.with_inputs(x)]
        first = tuple(next(rule for rule in offer if rule not in rules.SMALLER) for offer in offers)
        output = tuple(
            next((rule for rule in offer if rule.name == "output"), rule)
            for offer, rule in zip(offers, first)
        )
        shared = [StoreParts(output, "parts.output")] if output != first else []
        return [StoreParts(first), *shared, *rules.SMALLER]

    def invert_rules(self, x: Any) -> Sequence[InvertRule | Unavailable]:
        """The parts' inverses composed, where all have one."""
        found: list[InvertRule] = []
        for position, (one, at) in enumerate(self.with_inputs(x)):
            own = [r for r in rules.invert_rules(one, at) if isinstance(r, InvertRule)]
            if not own:
                return [Unavailable("parts", f"part {position}, {type(one).__name__}, has no inverse")]
            found.append(own[-1])
        return [InvertParts(tuple(found), keeps=any(rule.keeps for rule in found))]


def _forward_parts(
    layer: Sequential, parts: Sequence[StoreRule | VijpRule | InvertRule], x: Any
) -> tuple[Any, Any]:
    """The output, and what the parts' rules keep."""
    kept = []
    for one, rule in zip(layer.layers, parts, strict=True):
        x, own = rule.forward(one, x)
        kept.append(own)
    return x, tuple(kept)


@dataclass(frozen=True)
class Parts(VijpRule):
    r"""Composition: $J = J_1 J_2 \cdots$, so the parts' vijps in order, at inner activations that are
    recomputed from `x`.

    **Residuals, fragment:** the parts'. **Cost:** the parts', and a forward in the rebuild; its workspace
    holds one inner activation and cotangent at a time. Growth multiplies, local errors add as along a run.
    """

    name: str
    parts: tuple[VijpRule, ...]
    has_fragment: bool = False

    def check(self, layer: Sequential, x: Any) -> str | None:
        """The first reason among the parts."""
        for position, ((one, at), rule) in enumerate(zip(layer.with_inputs(x), self.parts)):
            reason = rule.check(one, at)
            if reason is not None:
                return f"part {position}, {type(one).__name__}: {reason}"
        return None

    def forward(self, layer: Sequential, x: Any) -> tuple[Any, Any]:
        """The output and the parts' residuals."""
        return _forward_parts(layer, self.parts, x)

    def reverse(self, layer: Sequential, residuals: Any, ct_out: Any) -> tuple[Any, Any]:
        """`ct_in` and the parts' fragments."""
        fragments = []
        for one, rule, kept in zip(
            reversed(layer.layers), reversed(self.parts), reversed(residuals), strict=True
        ):
            ct_out, fragment = rule.reverse(one, kept, ct_out)
            fragments.append(fragment)
        return ct_out, tuple(reversed(fragments)) if self.has_fragment else ()

    def rebuild(self, layer: Sequential, x: Any, ct_in: Any, fragment: Any) -> Any:
        """`ct_out`."""
        pieces = fragment if self.has_fragment else ((),) * len(self.parts)
        for position, (one, rule, piece) in enumerate(zip(layer.layers, self.parts, pieces, strict=True)):
            ct_in = rule.rebuild(one, x, ct_in, piece)
            if position + 1 < len(self.parts):
                x = one(x)
        return ct_in


@dataclass(frozen=True)
class StoreParts(StoreRule):
    """Each part stored by a rule of its own."""

    parts: tuple[StoreRule, ...]
    name: str = "parts"

    def forward(self, layer: Sequential, x: Any) -> tuple[Any, Any]:
        """The output and the parts' residuals."""
        return _forward_parts(layer, self.parts, x)

    def backward(self, layer: Sequential, residuals: Any, ct_out: Any) -> tuple[list[Any], Any]:
        """The parts' gradients, in order, and `ct_in`."""
        grads: list[list[Any]] = []
        for one, rule, kept in zip(
            reversed(layer.layers), reversed(self.parts), reversed(residuals), strict=True
        ):
            own, ct_out = rule.backward(one, kept, ct_out)
            grads.insert(0, own)
        return [g for own in grads for g in own], ct_out


@dataclass(frozen=True)
class InvertParts(InvertRule):
    """The parts' inverses, last first. **Residuals, cost:** the parts'; no forward besides."""

    parts: tuple[InvertRule, ...]
    name: str = "parts"
    keeps: bool = False

    def check(self, layer: Sequential, x: Any) -> str | None:
        """The first reason among the parts."""
        for (one, at), rule in zip(layer.with_inputs(x), self.parts):
            reason = rule.check(one, at)
            if reason is not None:
                return reason
        return None

    def forward(self, layer: Sequential, x: Any) -> tuple[Any, Any]:
        """The output and what the parts keep."""
        return _forward_parts(layer, self.parts, x)

    def inverse(self, layer: Sequential, y: Any, kept: Any) -> Any:
        """`x`."""
        for one, rule, own in zip(reversed(layer.layers), reversed(self.parts), reversed(kept), strict=True):
            y = rule.inverse(one, y, own)
        return y

    def backward(self, layer: Sequential, y: Any, kept: Any, ct_out: Any) -> tuple[Any, list[Any], Any]:
        """The parts' own, so that of what was inside the block only one array and its cotangent are there at
        a time."""
        grads: list[list[Any]] = []
        for one, rule, own in zip(reversed(layer.layers), reversed(self.parts), reversed(kept), strict=True):
            y, found, ct_out = trees.tie(rule.backward(one, y, own, ct_out))
            grads.insert(0, found)
        return y, [g for found in grads for g in found], ct_out
