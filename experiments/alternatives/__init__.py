"""The methods by which a user can take the same gradient of the same chain, compiled and measured side by
side.

| method | what it is |
|---|---|
| `backprop`, `backprop_scan` | plain `jax.grad`; with `lax.scan` over repeated blocks |
| `checkpoint_each`, `checkpoint_scan` | `jax.checkpoint` on every layer; on every repeated block of a scan |
| `chen`, `chen_scan` | square-root segments, unrolled and as nested scans |
| `recompute` | the optimal persistent plan (STORE and RECOMPUTE, exact bytes, any depth), run by `mw.apply` |
| `recompute_checkpoint` | the optimal persistent plan of nested `jax.checkpoint` |
| `rotor_checkpoint` | rotor's own plan, bytes in 500 slots, as nested `jax.checkpoint` |
| `equinox` | Equinox's checkpointed scan over repeated blocks |
| `invert` | RevNet-style inversion wherever a layer allows it |
| `moonwalk`, `fragment` | moonwalk runs everywhere, with the smallest fragments or the largest |
| `plan` | the schedule of `mw.frontier`, or a faster candidate of `mw.fit(tune=...)` |

Scans take the parameters of repeated blocks stacked, and so do the schedules of chains that are too long to
unroll. On CPUs the convolutions of all loops, ours and others', are in the layout that XLA runs fast there
(`mwplan.network.canonical`): JAX's own is up to 60 times slower. Where a compiled step exceeds the budget,
the method plans again with less; this holds for the plan and for the others.
"""

from experiments.alternatives.bench import Bench
from experiments.alternatives.methods import BUDGETED, FIXED, METHODS, RECOMPUTING
from experiments.alternatives.problem import RECOMPUTATION, Candidate, NotApplicableError, Problem
from experiments.alternatives.scanned import backprop_scan
from experiments.alternatives.scheduled import applied
from experiments.alternatives.study import Study, measure, point
from experiments.alternatives.timing import Compiled, ratio, ties
from experiments.alternatives.truth import float64_gradients, innermost
from experiments.alternatives.unrolled import backprop

__all__ = [
    "BUDGETED",
    "FIXED",
    "METHODS",
    "RECOMPUTATION",
    "RECOMPUTING",
    "Bench",
    "Candidate",
    "Compiled",
    "NotApplicableError",
    "Problem",
    "Study",
    "applied",
    "backprop",
    "backprop_scan",
    "float64_gradients",
    "innermost",
    "measure",
    "point",
    "ratio",
    "ties",
]  # fmt: skip
