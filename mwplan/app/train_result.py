"""Settings and measurements of a training run: plain values, saved as JSON."""

from __future__ import annotations

from dataclasses import dataclass

from mwplan.common import serial
from mwplan.common.errors import ArgumentError
from mwplan.common.sizes import parse_bytes
from mwplan.plans.schedule import Schedule, Strategy

SCHEMA = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """What to train and how.

    `budget`: device bytes of the gradient step. With None, temporaries get 0.15 of what backpropagation's
    take, or a little more than the least feasible. The learning rate decays to 0 along a cosine.
    """

    budget: str | None = None
    max_error: float = 1e-4
    batch: int = 512
    epochs: int = 40
    learning_rate: float = 2e-3
    depth: int = 16
    seed: int = 0
    forbid: tuple[Strategy, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("epochs", 1), ("depth", 1)):
            if getattr(self, name) < least:
                raise ArgumentError(f"`{name}={getattr(self, name)}` must be at least {least}")
        if self.budget is not None:
            parse_bytes(self.budget)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRow:
    """The plan at one budget, as predicted: its time, that of the best recomputation there (None where none
    fits), and the strategy of each layer."""

    budget_bytes: int
    time_ns: int
    recomputation_ns: int | None
    strategies: tuple[Strategy, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What one training run measured: bytes, seconds, errors, losses, accuracies. One entry a step in the
    lists.

    As predicted: `frontier` and `recomputation`, `(total bytes, ns)` of all strategies and of storing and
    recomputing alone; `plans`, from the largest budget to the least; `backprop_predicted_ns`, of everything
    stored. `recomputation_...`: the best recomputation within the same budget, measured; None where none
    fits.
    """

    config: TrainConfig
    device: str
    versions: tuple[str, ...]
    layers: tuple[str, ...]
    schedule: Schedule
    budget_bytes: int
    fixed_bytes: int
    predicted_temporary_bytes: int
    measured_temporary_bytes: int
    backprop_temporary_bytes: int
    predicted_step_seconds: float
    planned_step_seconds: float
    backprop_step_seconds: float
    planned_compile_seconds: float
    backprop_compile_seconds: float
    gradient_error_first: float
    gradient_error_last: float
    backprop_error_first: float
    backprop_error_last: float
    accuracy_planned: float
    accuracy_plain: float
    losses_planned: tuple[float, ...]
    losses_plain: tuple[float, ...]
    discrepancies: tuple[float, ...]
    replans: tuple[int, ...]
    frontier: tuple[tuple[int, int], ...]
    recomputation: tuple[tuple[int, int], ...]
    plans: tuple[PlanRow, ...]
    backprop_predicted_ns: int
    recomputation_temporary_bytes: int | None
    recomputation_step_seconds: float | None

    def to_json(self) -> str:
        """This result as JSON with a schema number."""
        return serial.dump(self, kind="training", schema=SCHEMA)

    @classmethod
    def from_json(cls, text: str) -> TrainResult:
        """Reads what `to_json` wrote."""
        return serial.load(text, cls, kind="training", schema=SCHEMA)
