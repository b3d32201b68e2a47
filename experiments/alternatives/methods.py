"""The methods by name."""

from __future__ import annotations

from collections.abc import Callable

from experiments.alternatives.nested import recompute_checkpoint, rotor_checkpoint
from experiments.alternatives.problem import (
    Candidate,
    Problem,
)
from experiments.alternatives.scanned import backprop_scan, checkpoint_scan, chen_scan, equinox
from experiments.alternatives.scheduled import fragment, invert, moonwalk, plan, recompute
from experiments.alternatives.unrolled import backprop, checkpoint_each, chen

Method = Callable[[Problem, "int | None"], Candidate]
#: Methods that are what they are, whatever the budget, and those that plan for one.
FIXED: dict[str, Method] = {
    "backprop": backprop,
    "backprop_scan": backprop_scan,
    "checkpoint_each": checkpoint_each,
    "checkpoint_scan": checkpoint_scan,
    "chen": chen,
    "chen_scan": chen_scan,
    "invert": invert,
    "moonwalk": moonwalk,
    "fragment": fragment,
}


BUDGETED: dict[str, Method] = {
    "equinox": equinox,
    "rotor_checkpoint": rotor_checkpoint,
    "recompute_checkpoint": recompute_checkpoint,
    "recompute": recompute,
    "plan": plan,
}


METHODS = FIXED | BUDGETED
#: Methods that keep and recompute, and do nothing else.
RECOMPUTING = (
    "checkpoint_each",
    "checkpoint_scan",
    "chen",
    "chen_scan",
    "equinox",
    "rotor_checkpoint",
    "recompute_checkpoint",
    "recompute",
)
