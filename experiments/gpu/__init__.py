"""Memory against depth, budgets and precision on a GPU, within minutes: `python -m experiments.gpu`
(`--small`: toy sizes, for the CPU).

Every point runs in a process of its own, since an allocator's peak cannot be reset. After `minutes` the run
stops; finished points are kept, and a second call goes on. The pool of the device's memory is capped
before JAX starts, so that what does not fit fails as it would on a smaller card. In order of value:

- **calibration**: backpropagation, `jax.checkpoint` and plans of a few networks, each compiled as if the
  device were not there, compiled for it, and run: bytes predicted, compiled and allocated, times modelled and
  measured, and by what the modelled rates are off;
- **ladder**: each method at growing depths within a pool of `pool_gib`, until one runs out of memory. Methods
  that plan do so for `shares` of the pool, the next where one runs out. Of each step: the allocator's peak
  (`memory_stats()`; null where a backend has none) beside XLA's `memory_analysis()`, time, compilation;
- **offload**: every layer's residuals in the host's memory, beside every layer stored: bytes in both
  memories, times, and what the copies got a second;
- **budgets**: at fixed depth, methods interleaved in one process, errors against float64, as
  `experiments.budget_sweep`;
- **precision**: as `experiments.precision`, at full float32 precision and at JAX's default, which on a GPU
  rounds the products' operands.

Writes results/gpu/: records.jsonl, summary.json, figures. Needs the packages of pyproject.toml's dependencies
and the `example` extra; of the dependencies not OR-tools and typer, which it does without. Equinox, where it
is there, gives rows of its own.
"""

from experiments.gpu import calibration
from experiments.gpu.config import Config, Small
from experiments.gpu.main import main
from experiments.gpu.order import Steps, calibrated, ladder, offloaded
from experiments.gpu.points import measure
from experiments.gpu.reports import deepest, draw_ladder, laddered, offload_table
from experiments.gpu.runner import Clock, OutOfTimeError, Runner

__all__ = [
    "Clock", "Config", "OutOfTimeError", "Runner", "Small", "Steps", "calibrated", "calibration", "deepest",
    "draw_ladder", "ladder", "laddered", "main", "measure", "offload_table", "offloaded",
]  # fmt: skip
