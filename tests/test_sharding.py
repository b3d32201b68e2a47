"""Planned steps on a mesh: eight virtual CPU devices, in a program of their own (tests/sharded.py says
why)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def figures() -> dict[str, float]:
    """What tests/sharded.py found."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.sharded"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"},
    )
    assert run.returncode == 0, run.stderr[-5000:]
    return json.loads(run.stdout)


def test_gradients_on_meshes_are_those_of_one_device(figures: dict[str, float]) -> None:
    """Data-parallel and parameter-sharded by `NamedSharding`, and `jax.shard_map`; every kind of run, stacked
    chains too."""
    assert figures["devices"] == 8
    checks = {name: error for name, error in figures.items() if ": " in name and "memory" not in name}
    checks = {name: error for name, error in checks.items() if "profile" not in name}
    assert len(checks) == 44
    assert figures["refused"] == 1  # gradients consumed within a `shard_map` that tracks what varies
    for name, error in checks.items():
        assert error < 1e-5, name  # the networks are float32; reports too are below their tolerance


def test_a_profile_of_sharded_arrays_is_of_one_device(figures: dict[str, float]) -> None:
    """As of the shard alone, and each device's part of the compiled step needs what the schedule says."""
    assert figures["profile: activations"] == figures["profile: fixed"] == 1
    assert figures["profile: parameter-sharded fixed"] == figures["profile: explicit axes"] == 1
    for label in ("stored", "recomputed", "walked"):
        predicted, measured = figures[f"memory: {label} predicted"], figures[f"memory: {label} measured"]
        assert measured < 1.02 * figures[f"memory: {label} alone"], label
        assert 0.85 * predicted < measured < 1.05 * predicted, label
        assert abs(figures[f"memory: {label} fixed"]) < 1024, (
            label
        )  # the loss, the report, the result's table
