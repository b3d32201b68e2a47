"""What the layers of one signature cost, and the largest errors seen among them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax

from mwplan.network import rules
from mwplan.plans.profiles import LayerProfile
from mwplan.profiling import growth
from mwplan.profiling.options import Figures, checked_rules

PyTree = Any
Name = tuple[bool, str]


def name_of(rule: rules.VijpRule | rules.InvertRule) -> Name:
    """What tells the rules of one layer apart: a vijp and an inverse may share a name."""
    return isinstance(rule, rules.InvertRule), rule.name


def exact(checked: Iterable[rules.VijpRule | rules.InvertRule]) -> bool:
    """Whether these rules make no errors at all, whatever the weights."""
    return all(isinstance(rule, rules.WholeFragment) for rule in checked)


def forbidden(
    checked: Iterable[rules.VijpRule | rules.InvertRule], one: PyTree, struct: PyTree
) -> frozenset[Name]:
    """Those of a layer's rules that its weights forbid, at inputs like `struct`."""
    return frozenset(name_of(rule) for rule in checked if rule.check(one, struct) is not None)


class Costs:
    """What one signature's options cost, and the largest errors seen among the layers that share it."""

    def __init__(self, figures: Figures, one: PyTree, x: PyTree) -> None:
        self.figures = figures
        walks, inverses = checked_rules(one, x)
        options = {one.name: one for one in figures.moonwalk}  # without what is of no use
        self.moonwalk = [(rule, options[rule.name]) for rule in walks if rule.name in options]
        self.invert = list(zip(inverses, figures.invert, strict=True))
        self.errors: dict[Name, tuple[float, ...]] = {}
        self.growths: dict[Name, list[float]] = {}  # of inverses, layer after layer
        self.unusable: set[Name] = set()  # what any layer that was looked at forbids

    def checked(self) -> list[rules.VijpRule | rules.InvertRule]:
        """The rules that have preconditions on values."""
        return [rule for rule, _ in self.moonwalk] + [rule for rule, _ in self.invert]

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
            forward_ns=self.figures.forward_ns,
            forward_workspace_bytes=self.figures.forward_workspace_bytes,
            parameter_bytes=self.figures.parameter_bytes,
            table_bytes=-(-self.figures.table_bytes // loops),
            store=self.figures.store,
            moonwalk=tuple(option(r, o) for r, o in self.moonwalk if name_of(r) not in unusable),
            invert=tuple(option(r, o) for r, o in self.invert if name_of(r) not in unusable),
        )
