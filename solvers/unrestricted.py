r"""What the run structure gives away: an integer program over single operations, for tiny chains.

In the manner of Checkmate (Jain et al., MLSys 2020), with alternative producers for each value and no runs:
at every step one operation is done, any value may be kept or dropped between steps, anything may be
recomputed.

Values: activations `x_0..x_L`, cotangents `ct_0..ct_L`, fragments, input residuals and full residuals of each
layer's options, and the parameter gradient of each layer (an output: it is made once and not counted).
Operations of layer `l`:

    forward                 x_{l-1} -> x_l                                  any number of times
    forward, option o       x_{l-1} -> x_l, residuals of option o
    backward, STORE o       ct_l, residuals (x_{l-1}, x_l where kept) -> ct_{l-1}, gradient of l
    reverse, MOONWALK o     ct_l, input residuals -> ct_{l-1}, fragment
    rebuild, MOONWALK o     ct_{l-1}, fragment -> ct_l
    advance, MOONWALK o     x_{l-1}, ct_l, after a rebuild -> gradient of l, and x_l if wanted
    invert, INVERT o        x_l, ct_l, what o kept -> x_{l-1}, ct_{l-1}, gradient of l
    loss                    x_L -> ct_L                                      once

Binaries `do[t, k]`, operation `k` at step `t`, and `live[t, v]`, value `v` alive before step `t`:

    sum_k do[t, k] <= 1                                                     one operation a step
    do[t, k] <= live[t, v]                                                  v an input of k
    live[t+1, v] <= live[t, v] + sum_{k makes v} do[t, k]
    sum_v bytes_v live[t, v] + sum_k (new_k + workspace_k) do[t, k] <= M
                                        new_k: outputs of k that are not alive already
    sum_t sum_{k makes gradient l} do[t, k] = 1                             each layer
    minimise sum_t sum_k time_k do[t, k]

A value alive that is made again is counted twice at that step, never less than the truth. Errors of vijps are
not modelled: `max_error` must not bind for a fair comparison. Boundary rules are more generous than those of
runs on purpose: the optimum is a lower bound for any schedule made of these operations under the same prices
(tested: never above the run space's optimum on chains without savings).

**Steps:** the program is given as many steps as the best run schedule has operations; fewer can be used, so
its optimum is at most that schedule's time. More steps can only help: the bound is for schedules of at most
that many operations.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mwplan.plans.profiles import InvertOption, LayerProfile, MoonwalkOption, StoreOption
from mwplan.plans.schedule import Run, RunKind, Solution, Status, Strategy
from mwplan.solvers.predictions import moonwalk_strategy
from mwplan.solvers.problem import Problem, check_integer

Value = tuple[str, int, str]


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation: what it needs alive, what it makes, the layer whose gradient it makes (0: none),
    workspace and time."""

    name: str
    needs: frozenset[Value]
    makes: frozenset[Value]
    gradient: int
    workspace_bytes: int
    time_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationSequence(Solution):
    """A solution without runs: its `time_ns` and `bound_ns` hold; `operations`, the names in order."""

    operations: tuple[str, ...] = ()


def operations(problem: Problem) -> tuple[list[Operation], dict[Value, int]]:
    """All operations of a chain that are `allowed`, and the bytes of every value."""
    profile, allowed = problem.profile, problem.strategies
    size: dict[Value, int] = {}
    for at in range(len(profile) + 1):
        size["x", at, ""] = 0 if at == 0 else profile.activation_bytes[at]
        size["ct", at, ""] = profile.cotangent_bytes[at]
    out = [Operation("loss", frozenset({_x(len(profile))}), frozenset({_ct(len(profile))}), 0, 0, 0)]
    for at, layer in enumerate(profile.layers, start=1):
        work, spent = layer.forward_workspace_bytes, layer.forward_ns
        out.append(_op(f"forward {at}", {_x(at - 1)}, {_x(at)}, 0, work, spent))
        for s in layer.store if Strategy.STORE in allowed else ():
            out += _store(at, s, size)
        for m in layer.moonwalk:
            if moonwalk_strategy(m) in allowed:
                out += _moonwalk(at, layer, m, size)
        for i in layer.invert if Strategy.INVERT in allowed else ():
            out += _invert(at, layer, i, size)
    return out, size


def _needed(at: int, option: StoreOption | MoonwalkOption) -> set[Value]:
    """What a backward step of layer `at` needs besides residuals."""
    x, y = {_x(at - 1)} if option.keeps_input else set(), {_x(at)} if option.keeps_output else set()
    return {_ct(at), *x, *y}


def _store(at: int, s: StoreOption, size: dict[Value, int]) -> list[Operation]:
    kept = {("store", at, s.name)}
    size["store", at, s.name] = s.residual_bytes
    forward = f"forward {at} {s.name}", {_x(at - 1)}, {_x(at)} | kept
    needs, back = kept | _needed(at, s), s.backward_workspace_bytes
    return [
        _op(*forward, 0, s.forward_workspace_bytes, s.forward_ns),
        _op(f"backward {at} {s.name}", needs, {_ct(at - 1)}, at, back, s.backward_ns),
    ]


def _moonwalk(at: int, layer: LayerProfile, m: MoonwalkOption, size: dict[Value, int]) -> list[Operation]:
    x, y, ct_x, ct_y = _x(at - 1), _x(at), _ct(at - 1), _ct(at)
    kept, fragment = {("moonwalk", at, m.name)}, {("fragment", at, m.name)}
    size["moonwalk", at, m.name], size["fragment", at, m.name] = m.residual_bytes, m.fragment_bytes
    if m.fragment_is_cotangent:
        # It is ct_l itself, kept.
        fragment = {ct_y}
    # The time of a rebuild pays for the gradient too, so that comes only after it.
    paid = {("paid", at, m.name)}
    size["paid", at, m.name] = 0
    reversed_, rebuilt, done = {ct_x} | (fragment - {ct_y}), ({ct_y} | paid) - fragment, paid | {x, ct_y}
    back, rebuild, name = m.reverse_workspace_bytes, m.rebuild_workspace_bytes, f"{at} {m.name}"
    return [
        _op(f"forward {name}", {x}, {y} | kept, 0, m.forward_workspace_bytes, m.forward_ns),
        _op(f"reverse {name}", kept | _needed(at, m), reversed_, 0, back, m.reverse_ns),
        _op(f"rebuild {name}", fragment | {ct_x}, rebuilt, 0, rebuild, m.rebuild_ns),
        _op(f"gradient {name}", done, set(), at, m.last_workspace_bytes, 0),
        _op(f"advance {name}", done, {y}, at, m.advance_workspace_bytes, layer.forward_ns),
    ]


def _invert(at: int, layer: LayerProfile, i: InvertOption, size: dict[Value, int]) -> list[Operation]:
    x, y, out = _x(at - 1), _x(at), []
    needs = {y, _ct(at)}
    own = (i.residual_bytes, i.forward_ns, i.forward_workspace_bytes)
    if own != (0, layer.forward_ns, layer.forward_workspace_bytes):
        kept = {("invert", at, i.name)}
        size["invert", at, i.name] = i.residual_bytes
        needs |= kept
        name, workspace = f"forward {at} invert {i.name}", i.forward_workspace_bytes
        out.append(_op(name, {x}, {y} | kept, 0, workspace, i.forward_ns))
    workspace = i.backward_workspace_bytes
    return [*out, _op(f"invert {at} {i.name}", needs, {x, _ct(at - 1)}, at, workspace, i.backward_ns)]


def _op(
    name: str, needs: set[Value], makes: set[Value], gradient: int, workspace: int, time: int
) -> Operation:
    return Operation(name, frozenset(needs), frozenset(makes), gradient, workspace, time)


def _x(at: int) -> Value:
    return ("x", at, "")


def _ct(at: int) -> Value:
    return ("ct", at, "")


def steps_of(runs: Iterable[Run]) -> int:
    """How many operations a schedule's runs take, the loss left out."""
    total = 0
    for run in runs:
        n = run.stop - run.start
        if run.kind is RunKind.STORE:
            total += 2
        elif run.kind is RunKind.INVERT:
            total += 2 * n
        elif run.kind is RunKind.MOONWALK:
            # F, R, and the two of M.
            total += 4 * n
        else:
            total += n + steps_of(run.inner)
    return total


def solve_unrestricted(problem: Problem, steps: int) -> OperationSequence:
    """The fastest sequence of at most `steps` operations within `budget_bytes`, of any order and without
    runs.

    **Raises:** `ArgumentError`. **Cost:** `steps` times (operations + values) binaries: chains of up to 3 or
    4 layers.
    """
    check_integer("steps", steps, 1)
    from ortools.sat.python import cp_model

    every, size = operations(problem)
    model = cp_model.CpModel()
    do = _model(model, every, size, problem, steps)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = problem.time_limit_s
    solver.parameters.num_workers = problem.workers
    solver.parameters.random_seed = problem.seed
    status = solver.solve(model)
    if status == cp_model.INFEASIBLE:
        return OperationSequence(status=Status.INFEASIBLE, solver="unrestricted")
    bound = max(0, int(-(-(solver.best_objective_bound - 1e-6) // 1)))
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return OperationSequence(status=Status.UNKNOWN, bound_ns=bound, solver="unrestricted")
    names = [every[k].name for row in do for k in range(len(every)) if solver.boolean_value(row[k])]
    time = round(solver.objective_value)
    optimal = status == cp_model.OPTIMAL
    return OperationSequence(
        status=Status.OPTIMAL if optimal else Status.FEASIBLE,
        time_ns=time,
        bound_ns=time if optimal else bound,
        solver="unrestricted",
        operations=tuple(names),
    )


def _model(
    model: Any, every: list[Operation], size: dict[Value, int], problem: Problem, steps: int
) -> list[list[Any]]:
    """Adds all variables and constraints; returns `do`."""
    values = list(size)
    do = [[model.new_bool_var(f"do{t},{k}") for k in range(len(every))] for t in range(steps + 1)]
    live = [{v: model.new_bool_var(f"live{t},{v}") for v in values} for t in range(steps + 2)]
    made = [sum(size[v] for v in op.makes) + op.workspace_bytes for op in every]
    makers = {v: [k for k, op in enumerate(every) if v in op.makes] for v in values}
    for v in values:
        if v != _x(0):
            model.add(live[0][v] == 0)
    for t in range(steps + 1):
        model.add(live[t][_x(0)] == 1)
        model.add_at_most_one(do[t])
        for k, op in enumerate(every):
            for v in op.needs:
                model.add_implication(do[t][k], live[t][v])
        for v in values:
            model.add(live[t + 1][v] <= live[t][v] + sum(do[t][k] for k in makers[v]))
        bytes_alive = sum(size[v] * live[t][v] for v in values if size[v])
        model.add(bytes_alive + sum(n * do[t][k] for k, n in enumerate(made) if n) <= problem.budget)
        if t:
            # Idle steps come last.
            model.add(sum(do[t]) <= sum(do[t - 1]))
    for at in range(1, len(problem.profile) + 1):
        model.add(sum(row[k] for row in do for k, op in enumerate(every) if op.gradient == at) == 1)
    model.add(sum(row[0] for row in do) == 1)
    # The chain's input cotangent is a result too.
    model.add(sum(row[k] for row in do for k, op in enumerate(every) if _ct(0) in op.makes) >= 1)
    model.minimize(sum(op.time_ns * row[k] for row in do for k, op in enumerate(every)))
    return do
