"""The experiment for a GPU, at toy sizes on whatever device there is."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import jax
import pytest
from rich.console import Console

from experiments import gpu, sweep

QUIET = Console(file=io.StringIO())


def drive(steps: gpu.Steps, answer: Any) -> list[sweep.Point]:
    """The points of a generator whose records `answer(point)` makes up."""
    points = []
    got = None
    while True:
        try:
            points.append(next(steps) if got is None else steps.send(got))
        except StopIteration:
            return points
        got = answer(points[-1])


def test_a_ladder_ends_where_memory_does() -> None:
    config = gpu.Config(depths=(16, 32, 64, 128), pool_gib=4, refine=2)
    points = drive(gpu.ladder(config, "checkpoint_scan"), lambda point: {"ran": point["depth"] <= 50})
    assert [point["depth"] for point in points] == [16, 32, 64, 48, 56]
    assert all(point["pool_bytes"] == 4 << 30 for point in points)

    def planned(point: sweep.Point) -> dict[str, Any]:
        known = {"plan": ["a"] if point["depth"] < 64 else [], "recompute": []}
        return {"ran": True, "schedules": known}

    points = drive(gpu.ladder(config, "plan"), planned)
    assert [(point["kind"], point["depth"]) for point in points][:5] == [
        ("plan", 16), ("step", 16), ("plan", 32), ("step", 32), ("plan", 64),
    ]  # fmt: skip
    assert max(point["depth"] for point in points) == 64
    assert all(point["schedules"] == ["a"] for point in points if point["kind"] == "step")


def test_a_planned_step_is_measured_beside_the_allocator() -> None:
    """A plan and its step: bytes, times, and the allocator's peak, or null where the backend has none."""
    config = gpu.Small(model="mlp", width=32, batch=256, resolution=8, depths=(3,))
    points = gpu.ladder(config, "plan")
    planned = gpu.measure(json.loads(json.dumps(next(points))))
    assert planned["ran"]
    made = gpu.measure(json.loads(json.dumps(points.send(planned))))
    assert made["ran"]
    assert made["temporary_bytes"] > 0
    assert len(made["seconds"]) == config.rounds
    known = jax.local_devices()[0].memory_stats() is not None
    assert (made["memory"]["peak_bytes"] is not None) == known
    assert (made["allocator"]["ran"] is not None) == known
    rows = gpu.laddered(
        config, [{"point": {"kind": "step", "model": "mlp", "method": "plan", "depth": 3}, **made}]
    )
    assert gpu.deepest(rows)["plan"]["deepest"] == 3
    gpu.draw_ladder(config, rows)
    json.dumps(rows)


def test_residuals_on_the_host_beside_stored_ones() -> None:
    """The same gradients; bytes in the host's memory where the device has its own."""
    (point,) = gpu.offloaded(gpu.Small(width=32, batch=256, resolution=8))
    found = gpu.measure(json.loads(json.dumps(point)))
    assert found["ran"]
    assert found["gradient_difference"] < 1e-5
    assert found["store"]["host_bytes"] == 0
    assert (found["offload"]["host_bytes"] > 0) == (jax.default_backend() != "cpu")
    QUIET.print(gpu.offload_table({"point": point, **found}))


def test_the_model_of_the_device_is_held_against_it() -> None:
    """Every program is compiled and timed; what an attached device does not tell is null."""
    (point,) = gpu.calibrated(gpu.Small(width=32, batch=256, resolution=8))
    found = gpu.measure(json.loads(json.dumps(point)))
    assert found["ran"]
    rows = gpu.calibration.flat([{"point": point, **found}])
    assert [row["program"] for row in rows if "predicted_bytes" in row] == ["plan 1.00"]
    sizes = [row["attached_bytes"] for row in rows]
    assert sizes == sorted(sizes)
    assert all(row["seconds"] > 0 and row["attached_kernels"] for row in rows)
    known = jax.local_devices()[0].memory_stats() is not None
    assert any(row["allocated_bytes"] for row in rows) == known
    QUIET.print(gpu.calibration.table(rows))
    json.dumps([rows, gpu.calibration.rates(rows)])


def test_rates_are_those_that_explain_the_times() -> None:
    """Twice the modelled arithmetic and half of the traffic; launches cost nothing."""
    shares = [{"arithmetic": 1e6, "traffic": 2e6, "launches": 1e5}, {"arithmetic": 3e6}, {"traffic": 1e6}]
    rows = [
        {
            "attached_shares_ns": one,
            "seconds": (2 * one.get("arithmetic", 0) + one.get("traffic", 0) / 2) / 1e9,
        }
        for one in shares
    ]
    found = gpu.calibration.rates(rows)
    assert found == pytest.approx({"arithmetic": 2, "traffic": 0.5, "launches": 0, "rms": 0}, abs=1e-6)
    assert gpu.calibration.rates([{"attached_shares_ns": None, "seconds": 1.0}]) is None


def test_running_out_of_memory_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(point: sweep.Point) -> dict[str, Any]:
        raise RuntimeError(point["text"])

    monkeypatch.setattr(gpu.points, "step", full)
    found = gpu.measure(
        {"kind": "step", "text": "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes"}
    )
    assert not found["ran"]
    assert "RESOURCE_EXHAUSTED" in found["reason"]
    with pytest.raises(RuntimeError, match="a bug"):
        gpu.measure({"kind": "step", "text": "a bug"})


def test_points_run_apart_within_the_time_and_are_kept(tmp_path: Path) -> None:
    """A crash is reported and the point run again; what was measured is read; without time nothing
    begins."""
    config = gpu.Small(out=tmp_path)
    point = {"kind": "nonsense", "pool_bytes": 1 << 30}
    first = gpu.Runner(config, gpu.Clock(600), QUIET)(point)
    assert not first["ran"]
    assert "KeyError" in first["reason"]
    with pytest.raises(gpu.OutOfTimeError):
        gpu.Runner(config, gpu.Clock(0), QUIET)(point)
    kept = {"key": sweep.key(point), "point": point, "ran": True}
    with sweep.Records(tmp_path / "records.jsonl").appending() as append:
        append(kept)
    assert gpu.Runner(config, gpu.Clock(0), QUIET)(point) == kept


@pytest.mark.slow
def test_all_of_it_in_small(tmp_path: Path) -> None:
    gpu.main(gpu.Small(out=tmp_path))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["complete"]
    assert len(summary["calibration"]) == 5
    assert summary["deepest"]["plan"]["deepest"] == 8
    assert summary["budgets"]
    assert {row["matmul"] for row in summary["precision"]} == {"highest", None}
    for name in ("ladder", "mlp_3", "precision"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
