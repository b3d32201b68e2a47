"""The command line as a user meets it, and the main job in small."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from typer.testing import CliRunner

import mwplan as mw
from mwplan.app import cli, train_result
from mwplan.layers import Dense, LeakyReLU
from tests.chains import random_profile


def network() -> tuple[mw.Chain, Any]:
    """A network for `mwplan explain tests.test_cli:network`."""
    return mw.Chain([Dense.init(jax.random.key(0), 8, 8), LeakyReLU(0.5)]), jnp.ones((4, 8))


def needs_an_argument(depth: int) -> tuple[mw.Chain, Any]:
    """Not what the command line can call."""
    return mw.Chain([LeakyReLU(0.5)] * depth), jnp.ones((4, 8))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "profile.json"
    path.write_text(random_profile(random.Random(1), 4).to_json())
    return path


def run(*args: str) -> Any:
    return CliRunner().invoke(cli.app, list(args), catch_exceptions=False)


def test_plan_prints_and_saves(saved: Path, tmp_path: Path) -> None:
    to = tmp_path / "schedule.json"
    text = run("plan", str(saved), "--budget", "1MB", "--to", str(to)).output
    assert "optimal" in text
    schedule = mw.Schedule.from_json(to.read_text())
    again = mw.Schedule.from_json(run("plan", str(saved), "--budget", "1MB", "--json").output)
    assert (again.runs, again.time_ns, again.status) == (schedule.runs, schedule.time_ns, mw.Status.OPTIMAL)


def wide() -> tuple[mw.Chain, Any]:
    """Activations of 4 MiB."""
    return mw.Chain([jnp.sin] * 6), jax.ShapeDtypeStruct((1 << 20,), jnp.float32)


def test_plan_with_memory_on_the_host() -> None:
    network = ("plan", "tests.test_cli:wide", "--device", "h100", "--json", "--budget")
    lean = mw.Schedule.from_json(
        run(*network, "20MiB", "--forbid", "recompute", "--host-budget", "1GiB", "--link-rate", "64GB").stdout
    )
    assert mw.Strategy.OFFLOAD in lean.strategies
    assert 0 < lean.host_bytes < 1 << 30
    generous = mw.Schedule.from_json(run(*network, "1GiB", "--host-budget", "1GiB").stdout)
    assert mw.Strategy.OFFLOAD not in generous.strategies


def test_frontier_prints_draws_and_speaks_json(saved: Path, tmp_path: Path) -> None:
    picture = tmp_path / "frontier.png"
    assert "predicted time" in run("frontier", str(saved), "--plot", str(picture)).output
    assert picture.read_bytes().startswith(b"\x89PNG")
    points = json.loads(run("frontier", str(saved), "--json").output)
    assert [p["time_ns"] for p in points] == sorted((p["time_ns"] for p in points), reverse=True)


def test_report_writes_a_page(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mwplan.report.page.plotly", lambda: "")
    to = tmp_path / "plan.html"
    budget = "1MB"
    assert "drag the budget" in run("report", str(saved), "--to", str(to), "--budget", budget).output
    assert '"budget":1000000' in to.read_text()


def test_explain_and_profile_take_a_module(tmp_path: Path) -> None:
    text = run("explain", "tests.test_cli:network").output
    assert "exact" in text
    assert "divide" in text
    to = tmp_path / "p.json"
    run("profile", "tests.test_cli:network", "--to", str(to))
    assert len(mw.Profile.from_json(to.read_text())) == 2


def test_plans_for_a_device_that_is_not_here(tmp_path: Path) -> None:
    net, to = "tests.test_cli:network", tmp_path / "p.json"
    assert "estimated" in run("profile", net, "--device", "a100", "--to", str(to)).output
    assert mw.Profile.from_json(to.read_text()).device == "a100"
    schedule = mw.Schedule.from_json(run("plan", net, "--device", "h100", "--json").stdout)
    assert schedule.budget_bytes == 80 * 10**9
    assert json.loads(run("frontier", net, "--device", "laptop", "--json").stdout)


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["plan", "PROFILE"], "--budget"),
        (["plan", "PROFILE", "--budget", "1MB", "--device", "h100"], "saved profile already"),
        (["plan", "tests.test_cli:network", "--device", "tpu"], "h100, h200, a100"),
        (["plan", "PROFILE", "--budget", "2 bananas"], "2 bananas"),
        (["plan", "PROFILE", "--budget", "1MB", "--host-budget", "1MB"], "profile.offloading"),
        (["plan", "PROFILE", "--budget", "1MB", "--link-rate", "fast"], "--link-rate='fast'"),
        (["plan", "PROFILE", "--budget", "1 B"], "least-memory schedule needs"),
        (["plan", "missing.json", "--budget", "1GB"], "does not exist"),
        (["explain", "no.such.module:net"], "cannot be imported"),
        (["explain", "nothing"], "MODULE:NAME"),
        (["explain", "PROFILE"], "needs the layers"),
        (
            ["plan", "tests.test_cli:needs_an_argument", "--budget", "1GB"],
            "missing a required argument: 'depth'",
        ),
        (
            ["profile", "tests.test_cli:network", "--to", "no/such/folder/p.json"],
            "no/such/folder does not exist",
        ),
        (
            ["plan", "PROFILE", "--budget", "1MB", "--to", "no/such/folder/s.json"],
            "no/such/folder does not exist",
        ),
        (["frontier", "PROFILE", "--plot", "tests"], "is a folder"),
        (["frontier", "PROFILE", "--rows", "0"], "at least 2"),
        (["report", "PROFILE", "--to", "plan.png"], "HTML file"),
        (["train", "--batch", "100000"], "training images"),
        (["train", "--epochs", "0"], "at least 1"),
    ],
)
def test_errors_are_one_message_and_status_2(
    args: list[str],
    complaint: str,
    saved: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["mwplan", *(str(saved) if a == "PROFILE" else a for a in args)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert complaint in " ".join(capsys.readouterr().err.split())


def test_the_main_job_in_small(tmp_path: Path) -> None:
    """Two epochs of a shallow network: everything that `make demo` reports, and the files it writes."""
    result = run(
        "train",
        "--epochs",
        "2",
        "--depth",
        "2",
        "--batch",
        "256",
        "--forbid",
        "recompute",
        "--out",
        str(tmp_path),
    )
    assert "test accuracy" in result.output
    got = train_result.TrainResult.from_json((tmp_path / "training.json").read_text())
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    room = got.budget_bytes - got.fixed_bytes
    assert got.measured_temporary_bytes <= room < got.backprop_temporary_bytes
    # What is alive, plus fragmentation; in most schedules there is none
    # (experiments.prediction).
    assert 0.9 < got.measured_temporary_bytes / got.predicted_temporary_bytes < 1.35
    assert max(got.gradient_error_first, got.gradient_error_last) < 1e-4
    assert got.losses_planned == pytest.approx(got.losses_plain, rel=0.05)
    assert got.losses_planned[-1] < got.losses_planned[0]
    # The default budget is a fifth of backpropagation's temporaries; where that is too little, the output
    # says so.
    plain = got.backprop_temporary_bytes
    assert ("1.25 times the least" in " ".join(result.output.split())) == (room > plain // 5)
    assert "1.25 times the least" in cli._budget_note(
        dataclasses.replace(got, backprop_temporary_bytes=4 * room)
    )
    assert not cli._budget_note(dataclasses.replace(got, backprop_temporary_bytes=6 * room))
    asked = dataclasses.replace(got.config, budget="1GiB")
    assert not cli._budget_note(dataclasses.replace(got, config=asked, backprop_temporary_bytes=room))
