"""What a training run has to tell, in words and tables of text."""

from __future__ import annotations

from collections.abc import Sequence

from mwplan.app.train_result import PlanRow, TrainResult
from mwplan.common.sizes import show_bytes
from mwplan.plans.schedule import LETTERS, Strategy

#: How much slower than backpropagation one may be who wants to know how far memory can be saved.
PATIENCE = 1.25
_OWN = (Strategy.VIJP, Strategy.FRAGMENT)


def as_the_budget_shrinks(rows: Sequence[PlanRow], backprop_ns: int, fixed_bytes: int) -> str:
    """One line a budget: its temporaries, the predicted times of the plan and of the best recomputation, and
    a letter a layer."""
    lines = [
        "How the plan changes as the budget shrinks: temporaries, predicted time over backpropagation's, and",
        "of recomputation alone; a letter a layer, from the input (S store, R recompute, V vijp, F fragment,",
        "I invert).",
        "",
        f"  {'temporaries':>11}  {'plan':>4}  {'redo':>4}",
    ]
    for row in rows:
        redone = "ends" if row.recomputation_ns is None else f"{row.recomputation_ns / backprop_ns:.2f}"
        letters = "".join(LETTERS[strategy] for strategy in row.strategies)
        lines.append(
            f"  {show_bytes(row.budget_bytes - fixed_bytes):>11}  {row.time_ns / backprop_ns:>4.2f}"
            f"  {redone:>4}  {letters}"
        )
    return "\n".join([*lines, ""])


def least_within(points: Sequence[tuple[int, int]], limit_ns: float) -> int | None:
    """The least total bytes of those no slower than the limit."""
    return min((total for total, time in points if time <= limit_ns), default=None)


def reach(
    every: Sequence[tuple[int, int]], alone: Sequence[tuple[int, int]], backprop_ns: int, fixed_bytes: int
) -> str:
    """How far both frontiers reach, in sentences: at a price in time, and at any."""

    def size(total: int | None) -> str:
        return "no memory" if total is None else show_bytes(total - fixed_bytes)

    limit = PATIENCE * backprop_ns
    lines = [
        f"Within {PATIENCE} times backpropagation's time (all as predicted, of temporaries): recomputation "
        f"alone gets down to {size(least_within(alone, limit))}, all strategies to "
        f"{size(least_within(every, limit))}.",
        f"At any price: recomputation alone ends at {size(alone[0][0] if alone else None)}, all strategies "
        f"at {size(every[0][0] if every else None)}.",
    ]
    return "\n".join([*lines, ""])


def made_of(result: TrainResult) -> str:
    """What the trained plan is made of, and what it and its rival took, in sentences; also where it is no
    news."""
    plain, redone = result.backprop_step_seconds, result.recomputation_step_seconds
    rival = "does not fit" if redone is None else f"takes {redone / plain:.2f}"
    return (
        f"{_made_of(result)} Timed in turn, its gradient takes {result.planned_step_seconds / plain:.2f} of "
        f"backpropagation's time; the best recomputation within this budget {rival}."
    )


def _made_of(result: TrainResult) -> str:
    counts = ", ".join(f"{n} {strategy.value}" for strategy, n in result.schedule.counts.items())
    if any(strategy in result.schedule.counts for strategy in _OWN):
        return f"The plan that was trained: {counts}."
    if Strategy.INVERT in result.schedule.counts:
        return f"The plan that was trained holds no vijps: {counts}."
    return (
        f"The plan that was trained is recomputation ({counts}): at this budget nothing that fits is "
        "predicted to be faster."
    )


def side_by_side_rows(result: TrainResult) -> list[tuple[str, ...]]:
    """What was predicted and measured of the plan, of the best recomputation within the same budget, and of
    backpropagation: a table, its header first."""
    room, fixed = result.budget_bytes - result.fixed_bytes, result.fixed_bytes
    plan_bytes, plain_bytes = result.measured_temporary_bytes, result.backprop_temporary_bytes
    redo_bytes, redo_seconds = result.recomputation_temporary_bytes, result.recomputation_step_seconds
    plan_seconds, plain_seconds = result.planned_step_seconds, result.backprop_step_seconds
    redone = "does not fit"

    def share(value: float | None, whole: float) -> str:
        return redone if value is None else f"{value / whole:.2f}"

    def size(value: int | None) -> str:
        return redone if value is None else show_bytes(value)

    def ms(value: float | None) -> str:
        return redone if value is None else f"{value * 1e3:.1f} ms"

    def errors(value: float) -> str:
        return f"{value:.1e}"

    def percent(value: float) -> str:
        return f"{value:.2%}"

    return [
        ("", "plan", "recomputation alone", "backpropagation"),
        ("temporaries, budget", size(room), size(room), ""),
        ("temporaries, predicted", size(result.predicted_temporary_bytes), "", ""),
        ("temporaries, measured", size(plan_bytes), size(redo_bytes), size(plain_bytes)),
        ("of backpropagation's", share(plan_bytes, plain_bytes), share(redo_bytes, plain_bytes), "1.00"),
        (
            "all device memory",
            size(fixed + plan_bytes),
            size(None if redo_bytes is None else fixed + redo_bytes),
            size(fixed + plain_bytes),
        ),
        (
            "gradient, predicted",
            ms(result.predicted_step_seconds),
            "",
            ms(result.backprop_predicted_ns / 1e9),
        ),
        ("gradient, measured", ms(plan_seconds), ms(redo_seconds), ms(plain_seconds)),
        (
            "of backpropagation's",
            share(plan_seconds, plain_seconds),
            share(redo_seconds, plain_seconds),
            "1.00",
        ),
        (
            "compilation",
            f"{result.planned_compile_seconds:.1f} s",
            "",
            f"{result.backprop_compile_seconds:.1f} s",
        ),
        (
            "gradient error to float64, first step",
            errors(result.gradient_error_first),
            "",
            errors(result.backprop_error_first),
        ),
        ("the same, last step", errors(result.gradient_error_last), "", errors(result.backprop_error_last)),
        ("largest reported discrepancy", errors(max(result.discrepancies, default=0.0)), "", ""),
        ("times planned again", str(len(result.replans)), "", ""),
        ("final loss", f"{result.losses_planned[-1]:.4f}", "", f"{result.losses_plain[-1]:.4f}"),
        ("test accuracy", percent(result.accuracy_planned), "", percent(result.accuracy_plain)),
    ]
