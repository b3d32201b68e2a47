"""The solvers' tuning in one place: numbers that decide how fast plans are found and how much is lost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """What may be changed without a plan becoming wrong: every plan is replayed in the ledger whatever these
    are, and every bound stays a bound.

    Shares are of `Problem.thin`, the loss of time aimed at. `python -m experiments.solver_scaling --vary
    FIELD` solves the cases that a field matters for with other values beside its own, by turns, and prints
    seconds and losses relative to its own, one row of results/solver_scaling/tuning.jsonl for each. A field
    that it does not know says here what it was chosen for instead.

    ```python
    coarse = dataclasses.replace(TUNING, cells=96)
    solve_frontier(Problem(profile=profile, tuning=coarse))
    ```
    """

    # -- how arrays are cut: changes seconds and memory alone

    #: threads at most; chosen for where NumPy's calls are short: more of them wait for the interpreter's lock
    threads: int = 8
    #: nodes whose candidate runs are made together; fewer calls of NumPy, larger arrays
    nodes_together: int = 64
    #: groups bounded together, at most: few enough for a processor's cache; and at least: where threads take
    #: turns often, they wait for each other
    groups_most: int = 32_000
    groups_least: int = 4_000
    #: rows of tables sampled together: few enough for a processor's cache
    rows_together: int = 64
    #: rows of tables, and points of each, that there is room for from the start: untouched memory costs
    #: nothing, and copying it into larger arrays does
    room_rows: int = 100_000
    room_points: int = 64
    #: cells of a grid of needs that shows most points of a staircase to be dominated, from four times as many
    #: points on
    staircase_cells: int = 512
    #: from so many points on a table shows most of those of two or three costs to be dominated; and in how
    #: many levels of the third
    table_points: int = 256
    table_levels: int = 128
    #: points compared in pairs before halves are merged (three costs); points compared at once with all that
    #: are left (four and more)
    sweep_block: int = 32
    compare_block: int = 256
    #: groups of up to so many points are compared with others, about so many pairs of points at once
    pairs_group: int = 64
    pairs_together: int = 200_000
    #: so many cells are bounded together, at first and where that leaves groups; each divides the one before
    cell_levels: tuple[int, ...] = (16, 4, 1)

    # -- the grid of budgets at which staircases are compared first

    #: budgets of the grid; more take memory for each stretch, fewer take time where points are many
    cells: int = 384
    #: and from more than so many layers on: with few and with many different stretches, which more than
    #: `many_stretches` are, and would take gigabytes
    cells_layers: int = 400
    cells_few: int = 1024
    cells_many: int = 128
    many_stretches: int = 50_000
    #: and for stretches of identical layers
    cells_identical: int = 1024

    # -- what thinning loses

    #: stretches of fewer layers are not thinned: they have few points, and losses add up along the chain
    short_layers: int = 4
    #: what merging may lose, and the thinning after it; merging in a chain without moonwalk runs, whose
    #: labels lose too
    merge_share: float = 1.0
    merge_share_no_moonwalk: float = 1.5
    thinning_share: float = 0.5
    #: and of both, at the top level, where losses would add up along the chain
    top_share: float = 0.1
    #: what a moonwalk or invert run may lose for each of its layers
    label_share: float = 0.7
    #: of all these, in the tables of a bound, which are to prove what the others lose: of merging and
    #: thinning, and of moonwalk runs
    bound_share: float = 0.5
    bound_label_share: float = 0.0625
    #: what merging, thinning, and each layer of a moonwalk run may lose for long stretches of identical
    #: layers
    identical_merge_share: float = 2 / 3
    identical_thinning_share: float = 1 / 3
    identical_label_share: float = 1 / 6
    #: runs of several identical layers that differ by less than this share in everything count as one
    identical_run_share: float = 1.0

    # -- which tables a chain has

    #: from so many layers on, chains of identical ones have exact tables of their own
    uniform_layers: int = 48
    #: thinned chains of so many layers have tables of their own for stretches of so many identical ones
    long_layers: int = 160
    stretch_layers: int = 96
    #: RECOMPUTE runs go into such a stretch from so many layers before; one more costs two merges a length
    near_layers: int = 8
    #: binary digits of the lengths of identical layers that there are tables for
    length_bits: int = 6
    #: layers of the longest moonwalk and invert runs among identical ones
    longest_run: int = 256
    #: RECOMPUTE runs leave at least one layer in so many to what follows: else they would nest as deep as the
    #: chain is long
    recompute_share: int = 32
    #: layers of the pieces that a long stretch is cut into for a bound: a piece's tables take memory and time
    #: that grow with its square
    bound_piece: int = 320

    # -- the integer program

    #: how far above the frontier's optimum runs are given to it, one after the other until that is enough
    thresholds: tuple[float, ...] = (0.0, 0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 4.0)

    # -- schedules of fewer different runs, which compile faster

    #: the share of its time that a schedule not proved optimal may lose to become one: below what repeated
    #: measurements of a step differ by
    regular_loss: float = 0.01
    #: schedules of no more loops stay as they are; up to so many compile in half a minute or so
    few_loops: int = 8
    many_loops: int = 50
    #: what one more loop may cost of the time, between schedules of few runs
    loop_price: float = 1e-3
    #: levels of RECOMPUTE, of one group each, where two levels do not fit
    group_levels: int = 4
    #: how often a schedule that is too large by the ledger is made again for less memory
    fit_attempts: int = 4
    #: what may be lost for a tape, of more than so many layers; and how many STORE options are looked at
    tape_thin: float = 0.005
    tape_exact_layers: int = 256
    tape_options: int = 3

    # -- what a plan is taken for where nothing else is said

    #: longer chains are planned thinned, by `deep_thin`, unless a loss is asked for: an exact frontier takes
    #: minutes to hours there
    exact_layers: int = 128
    #: the loss of time aimed at there
    deep_thin: float = 0.02
    #: how many smaller points of a frontier are looked at where fragmentation is predicted: the packing of
    #: each takes as long as its replay
    smaller_points: int = 16
    #: what packing needs more by less than this share is not fragmentation, but small buffers' alignment,
    #: which `Profile.table_bytes` has room for
    alignment_share: float = 0.001


TUNING = Tuning()
