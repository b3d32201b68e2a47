r"""Where to cut: a dynamic program over positions.

Of $n$ operations, let $a_p$ be the bytes that are alive at position $p$ (between the $p$-th operation and the
next) and $m(p, q)$ the bytes that the operations between two positions make. Cuts $0 = p_0 < p_1 < \dots <
p_K = n$ are chosen to maximise

$$ \sum_{k=1}^{K} \log m(p_{k-1}, p_k) \; - \; \sum_{k=1}^{K-1} \log (c \, a_{p_k}). $$

A piece that makes $m = m_1 + m_2$ is so cut in two exactly where $m_1 m_2 / (m_1 + m_2) > c \, a$: where both
halves make more than a cut keeps, whatever the size of the network. Alive bytes are least between the blocks
of a network; a costly stretch is cut finer, because the more it makes, the more may be alive at a cut within.
$c$ is 1, and is raised until there are at most as many pieces as asked for. Sums over pieces: equal stretches
are cut alike.

Elementwise operations and changes of shape count for a quarter: mostly they are fused and not kept. A cut
just before an elementwise operation would keep it from being fused with what it follows, and counts as if
more were alive there.

Of positions that lie close together, with fewer bytes made between them than are alive at one of them, that
one is left out where less is alive at the other: a network's blocks are cut between, not shortly after the
first sum of the next.

Layers that a moonwalk run or an inverse can pass, one after another (`finding.runs`), are cut around whatever
is alive there: as a chain of them would be.

**Cost:** the square of the number of positions where less is alive than right before or right after: 0.1 s
for 5,000 operations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from mwplan.functions.flow import Flow
from mwplan.functions.kinds import ELEMENTWISE, SHAPES
from mwplan.functions.recognition import Found
from mwplan.functions.tracing import ALIAS

#: What the bytes that an elementwise operation makes count for.
FUSED_WEIGHT = 0.25
#: By how much alive bytes count more where the next operation is elementwise.
UNFUSED = 1.25
#: `c` where it need not be raised.
LEAST_RATIO = 1.0


def cuts(flow: Flow, most: int, known: Sequence[Sequence[Found]] = ()) -> list[int]:
    """The cuts of a flow into at most `most` layers (more only where loops and what stands between them need
    more), `0` and the end not among them: around loops, around the layers of each of the runs `known`, and
    those that `choose` finds in each stretch of the rest."""
    spans = flow.spans()
    outside = sum(region < 0 for _, _, region in spans)
    depths = [flow.traced.regions[region].depth if region >= 0 else 1 for _, _, region in spans]
    inside = sum(depth for depth in depths if depth > 1)
    found: list[int] = []
    for start, stop, region in spans:
        # A loop of many repetitions is cut into fewer pieces, what is outside shares what is left.
        share = most // (2 * inside) if region >= 0 else (most - min(inside, most // 2)) // outside
        own = [run for run in known if start <= run[0].start and run[-1].stop <= stop]
        found += [*_within(flow, start, stop, max(1, share), own), stop]
    return found[:-1]


def _within(flow: Flow, start: int, stop: int, most: int, known: Sequence[Sequence[Found]]) -> list[int]:
    """The cuts of one span: at both ends of every layer of the runs, of which several are one piece where
    they are too many; and in the rest."""
    longest = max((len(run) for run in known), default=0)
    for each in range(1, longest + 1):
        around = {one.start for run in known for one in run[::each]} | {run[-1].stop for run in known}
        if len(around) + 1 <= most:
            break
    else:
        known, around = (), set()
    inner = {p for run in known for p in range(run[0].start, run[-1].stop)}
    bounds = sorted({start, stop, *around})
    rest = [(a, b) for a, b in itertools.pairwise(bounds) if a not in inner]
    share = max(1, (most - len(bounds) + 1 + len(rest)) // max(1, len(rest)))
    found = {*around} - {start, stop}
    for a, b in rest:
        found |= {a + p for p in choose(weights(flow, a, b), keeps(flow, a, b), share)}
    return sorted(found)


def weights(flow: Flow, start: int, stop: int) -> np.ndarray:
    """The bytes that each operation makes, as they count."""
    out = []
    for step in flow.steps[start:stop]:
        fused = step.primitive.name in ELEMENTWISE or step.primitive.name in SHAPES
        made = 0 if step.primitive is ALIAS else sum(map(flow.traced.nbytes, step.outputs))
        out.append(made * (FUSED_WEIGHT if fused else 1.0))
    return np.asarray(out, dtype=np.float64)


def keeps(flow: Flow, start: int, stop: int) -> np.ndarray:
    """The bytes alive at each position from `start` to `stop`, as they count."""
    alive = flow.alive_bytes(start, stop).astype(np.float64)
    for i, step in enumerate(flow.steps[start:stop]):
        if step.primitive.name in ELEMENTWISE:
            alive[i] *= UNFUSED
    return alive


def choose(made: np.ndarray, alive: np.ndarray, most: int) -> list[int]:
    """The cuts, `0` and `n` not among them, that maximise what the module's text says.

    **Arguments:** `made`, of each of `n` operations; `alive`, of each of `n + 1` positions; `most`, pieces.
    """
    total = np.concatenate([[0.0], np.cumsum(made)])
    places = _valleys(alive, total)
    if len(places) == 2 or most == 1:
        return []
    at = total[places]
    with np.errstate(divide="ignore", invalid="ignore"):
        gains = np.log(np.maximum(at[None, :] - at[:, None], 0.0))  # [from, to]; -inf where nothing is made
    price = np.log(np.maximum(alive[places], 1.0))
    low, high = LEAST_RATIO, LEAST_RATIO
    found = _best(gains, price + math.log(low))
    while len(found) >= most:
        high *= 4.0
        found = _best(gains, price + math.log(high))
    while high > low * 1.05:
        middle = math.sqrt(low * high)
        tried = _best(gains, price + math.log(middle))
        low, high = (middle, high) if len(tried) >= most else (low, middle)
        found = tried if len(tried) < most else found
    return [places[i] for i in found]


def _valleys(alive: np.ndarray, total: np.ndarray) -> list[int]:
    """Both ends, and the positions at which no more is alive than right before and right after. Not those
    from which a position with less alive is near: one with fewer bytes made on the way than are alive here.
    Of neighbours between which nothing is made, one."""
    inner = (alive[1:-1] <= alive[:-2]) & (alive[1:-1] <= alive[2:])
    found = [0]
    for p in np.flatnonzero(inner) + 1:
        if total[p] > total[found[-1]] and total[p] < total[-1]:
            found.append(int(p))
    places = np.asarray([*found, len(alive) - 1])
    here, way = alive[places], total[places]
    near = np.abs(way[:, None] - way[None, :]) < here[:, None]
    shadowed = (near & (here[None, :] < here[:, None])).any(axis=1)
    shadowed[[0, -1]] = False
    return [int(p) for p in places[~shadowed]]


def _best(gains: np.ndarray, price: np.ndarray) -> Sequence[int]:
    """The inner places on the best path from the first to the last."""
    count = len(price)
    value = np.full(count, -np.inf)
    value[0] = 0.0
    before = np.zeros(count, dtype=np.int64)
    for j in range(1, count):
        paths = value[:j] + gains[:j, j]
        i = int(np.argmax(paths))
        before[j] = i
        value[j] = paths[i] - (price[j] if j < count - 1 else 0.0)
    found = []
    at = int(before[-1])
    while at:
        found.append(at)
        at = int(before[at])
    return found[::-1]
