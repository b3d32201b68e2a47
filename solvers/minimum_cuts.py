r"""What to keep of a computation and what to make again: all trades of bytes against time, by minimum cuts.

A forward pass computes values; a backward pass needs some of them. Each is kept from the one to the other, at
its bytes $w_v$ and the time $s_v$ of writing and reading it, or made again, with the operation that gives it
at the operation's time $c_e$; then what that reads must be there too. For a price $\lambda$ of a nanosecond
in bytes the least of

$$\sum_{v\ kept} (w_v + \lambda s_v) + \lambda \sum_{e\ made\ again} c_e$$

is a minimum cut of this network. Below the cut is what the backward pass has to have:

- $v_{in} \to v_{out}$, capacity $w_v + \lambda s_v$: needed and not made again, $v$ is kept;
- source $\to e$, capacity $\lambda c_e$: $e$ is made again;
- $e \to v_{in}$ without limit: $v$ is made again by its operation; source $\to v_{in}$ where it has none;
- $u_{out} \to e$ without limit: $e$ made again needs what it reads;
- $v_{out} \to$ sink without limit, of what the backward pass reads.

The bytes and times of the cuts for all $\lambda$ are the lower convex hull of all choices'. Its corners are
found by cutting at the slope of each pair of neighbours that are known, until none lies below.

**Source:** keeping against making again as one minimum cut, for one $\lambda$, is that of PyTorch's min-cut
partitioner; cutting at slopes is Eisner and Severance's (JACM 23(4), 1976). Times of keeping, operations of
several results and the hull of both together are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ortools.graph.python import max_flow

_SCALE = 1 << 40  # of all capacities together: what is lost by rounding is a part in so many


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """What an operation gives. `nbytes`, to keep it; `keep_ns`, to write it for that and read it back;
    `maker`, the operation (a number), or None where it is given and cannot be made; `needed`, whether the
    backward pass reads it."""

    nbytes: int
    keep_ns: float = 0.0
    maker: int | None = None
    needed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """`time_ns`, to do it again; `reads`, values (numbers); `once`: whether it may not be done again."""

    time_ns: float
    reads: tuple[int, ...]
    once: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Which values are `kept`, and which `operations` are done again; the bytes of the first, and the time of
    both."""

    kept: tuple[int, ...]
    operations: tuple[int, ...]
    nbytes: int
    time_ns: float


def hull(values: Sequence[Value], operations: Sequence[Operation]) -> list[Cut]:
    """The corners of the lower convex hull, from the fewest bytes to the least time.

    **Cost:** two minimum cuts a corner, each well below a millisecond for a hundred operations.

    >>> values = [Value(nbytes=8), Value(nbytes=8, maker=0, needed=True)]
    >>> values += [Value(nbytes=2, maker=1), Value(nbytes=8, maker=2, needed=True)]
    >>> operations = [Operation(time_ns=1, reads=(0,)), Operation(time_ns=5, reads=(1,))]
    >>> operations += [Operation(time_ns=1, reads=(2,))]
    >>> [(cut.kept, cut.nbytes, cut.time_ns) for cut in hull(values, operations)]
    [((1,), 8, 6.0), ((1, 2), 10, 1.0), ((1, 3), 16, 0.0)]
    """
    network = _Network(values, operations)
    total_bytes = 1 + sum(value.nbytes for value in values)
    total_ns = 1.0 + sum(v.keep_ns for v in values) + sum(o.time_ns for o in operations)
    # Of equal bytes the least time, and the other way about.
    least = network.cut(1.0 / total_bytes, 1e-6 / total_ns)
    fastest = network.cut(1e-6 / total_bytes, 1.0 / total_ns)
    found = [least]

    def between(left: Cut, right: Cut) -> None:
        """Adds the corners between two, and the right one."""
        saved, lost = right.nbytes - left.nbytes, left.time_ns - right.time_ns
        if saved <= 0 or lost <= 0:
            return
        middle = network.cut(1.0 / saved, 1.0 / lost)

        def weight(one: Cut) -> float:
            return one.nbytes / saved + one.time_ns / lost

        if weight(middle) < weight(left) - 1e-6 and left.nbytes < middle.nbytes < right.nbytes:
            between(left, middle)
            between(middle, right)
        else:
            found.append(right)

    between(least, fastest)
    return found


class _Network:
    """The network of one problem, to be cut at any price."""

    def __init__(self, values: Sequence[Value], operations: Sequence[Operation]) -> None:
        self.values, self.operations = values, operations
        count = len(values)
        self.source, self.sink = 2 * count + len(operations), 2 * count + len(operations) + 1
        self.first_operation = 2 * count
        arcs: list[tuple[int, int]] = []
        nbytes: list[float] = []
        times: list[float] = []

        def arc(tail: int, head: int, size: float = 0.0, time: float = np.inf) -> None:
            arcs.append((tail, head))
            nbytes.append(size)
            times.append(time)

        for v, value in enumerate(values):
            arc(v, count + v, value.nbytes, value.keep_ns)
            arc(self.source if value.maker is None else self.first_operation + value.maker, v)
            if value.needed:
                arc(count + v, self.sink)
        for e, operation in enumerate(operations):
            arc(self.source, self.first_operation + e, 0.0, np.inf if operation.once else operation.time_ns)
            for read in operation.reads:
                arc(count + read, self.first_operation + e)
        self.tails, self.heads = np.array(arcs, np.int64).reshape(-1, 2).T
        self.nbytes, self.times = np.array(nbytes), np.array(times)

    def cut(self, of_bytes: float, of_time: float) -> Cut:
        """The minimum cut where a byte costs `of_bytes` and a nanosecond `of_time`."""
        open_ended = np.isinf(self.times)
        costs = of_bytes * self.nbytes + of_time * np.where(open_ended, 0.0, self.times)
        most = float(costs.sum()) or 1.0
        capacities = np.where(open_ended, 2 * _SCALE, np.ceil(costs * (_SCALE / most))).astype(np.int64)
        flow = max_flow.SimpleMaxFlow()
        flow.add_arcs_with_capacity(self.tails, self.heads, capacities)
        status = flow.solve(self.source, self.sink)
        if status != flow.OPTIMAL:
            raise AssertionError(f"the maximum flow was not found: {status}")
        above = frozenset(flow.get_source_side_min_cut())
        count = len(self.values)
        kept = tuple(v for v in range(count) if v in above and count + v not in above)
        again = tuple(e for e in range(len(self.operations)) if self.first_operation + e not in above)
        # What is below the cut and leads nowhere is not made.
        kept, again = self._wanted(frozenset(kept), frozenset(again))
        return Cut(
            kept=kept,
            operations=again,
            nbytes=sum(self.values[v].nbytes for v in kept),
            time_ns=float(
                sum(self.values[v].keep_ns for v in kept) + sum(self.operations[e].time_ns for e in again)
            ),
        )

    def _wanted(self, kept: frozenset[int], again: frozenset[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of what is kept and made again, that which something needed comes from."""
        stack = [v for v, value in enumerate(self.values) if value.needed]
        seen: set[int] = set()
        made: set[int] = set()
        while stack:
            v = stack.pop()
            if v in seen:
                continue
            seen.add(v)
            maker = self.values[v].maker
            if v not in kept and maker is not None and maker in again:
                made.add(maker)
                stack += self.operations[maker].reads
        return tuple(sorted(kept & seen)), tuple(sorted(made))
