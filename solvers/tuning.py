"""The solvers' tuning in one place: numbers that decide how fast plans are found and how much is lost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """What may be changed without a plan becoming wrong."""

    #: longer chains are planned thinned, by `deep_thin`, unless a loss is asked for: an exact frontier takes
    #: minutes to hours there
    exact_layers: int = 128
    #: the loss of time aimed at there
    deep_thin: float = 0.02
    #: the share of its time that a schedule not proved optimal may lose to become one of fewer different runs
    regular_loss: float = 0.01
    #: how many smaller points of a frontier are looked at where fragmentation is predicted
    smaller_points: int = 16
    #: what packing needs more by less than this share is not fragmentation, but small buffers' alignment,
    #: which `Profile.table_bytes` has room for
    alignment_share: float = 0.001


TUNING = Tuning()
