"""How large everything is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from experiments import record


@dataclass(frozen=True)
class Config:
    """Sizes of the default run; `calibrated`: networks and depths that the model of the device is held
    against, `calibrated_shares` of the way from the least budget to the largest; `layers`: longest chain that
    is planned; `yard`: depth of the budgets' network; `kinds`, `blocks`, ... `rows`: of precision;
    `per_point`: seconds after which a point counts as failed."""

    minutes: float = 7.5
    per_point: float = 170.0
    calibrated: tuple[tuple[str, int], ...] = (("gpt", 6), ("revnet", 16), ("resnet", 16))
    calibrated_shares: tuple[float, ...] = (1.0, 0.5, 0.1)
    model: str = "revnet"
    pool_gib: float = 8.0
    shares: tuple[float, ...] = (0.92, 0.8, 0.65)
    depths: tuple[int, ...] = (16, 64, 256, 512)
    methods: tuple[str, ...] = ("backprop_scan", "plan", "recompute", "checkpoint_scan")
    refine: int = 1
    width: int = 64
    batch: int = 256
    resolution: int = 64
    layers: int = 64
    others: tuple[str, ...] = ("revnet", "gpt")
    yard: int = 16
    budgets: int = 4
    length: int = 512
    text_width: int = 512
    text_batch: int = 8
    kinds: tuple[str, ...] = ("maxmin", "ordinary")
    blocks: tuple[int, ...] = (16, 64)
    features: int = 256
    rows: int = 4096
    rounds: int = 5
    repeats: int = 3
    max_error: float = 1e-4
    thin: float = 0.02
    seed: int = 0
    out: Path = record.RESULTS / "gpu"


@dataclass(frozen=True)
class Small(Config):
    """Toy sizes."""

    per_point: float = 600.0
    minutes: float = 60.0
    calibrated: tuple[tuple[str, int], ...] = (("mlp", 1),)
    calibrated_shares: tuple[float, ...] = (1.0,)
    pool_gib: float = 0.004
    depths: tuple[int, ...] = (4, 8)
    methods: tuple[str, ...] = ("backprop_scan", "plan")
    refine: int = 0
    width: int = 8
    batch: int = 64
    resolution: int = 16
    others: tuple[str, ...] = ("mlp",)
    yard: int = 3
    budgets: int = 2
    kinds: tuple[str, ...] = ("slope_0.8",)
    blocks: tuple[int, ...] = (4,)
    features: int = 32
    rows: int = 128
    rounds: int = 3
    repeats: int = 1
