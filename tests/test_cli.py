"""The command line as a user meets it, and the main job in small."""

from __future__ import annotations

import io
import json
import random
import time
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console
from typer.testing import CliRunner

import mwplan as mw
from mwplan.app import cli, telling, train_result, waiting
from mwplan.layers import Dense, LeakyReLU
from mwplan.plans.schedule import LETTERS
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


def a_loss() -> tuple[Any, ...]:
    """A function that is no chain: what `jax.value_and_grad` takes, and its arguments."""

    def loss(params: dict[str, Any], x: Any) -> Any:
        return jnp.mean(jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]) ** 2)

    return loss, {"a": jnp.eye(16), "b": jnp.eye(16)}, jnp.ones((64, 16))


def no_scalar() -> tuple[Any, ...]:
    """Its loss is no number."""
    return (lambda params, x: x * params), jnp.ones(3), jnp.ones(3)


def a_number() -> tuple[int, int]:
    """Nothing to plan."""
    return 3, 4


def test_a_loss_is_planned_like_a_chain(tmp_path: Path) -> None:
    net, to = "tests.test_cli:a_loss", tmp_path / "s.json"
    said = run("plan", net, "--device", "h100", "--budget", "1MiB", "--to", str(to)).output
    assert "optimal" in said
    assert 'mw.fit_function(loss, params, ..., budget="1MiB")' in said
    loss, params, x = a_loss()
    cut = mw.cut(loss, params, x)
    schedule = mw.Schedule.from_json(to.read_text())
    assert len(schedule) == len(cut)
    # Two parameters, their gradients, the other argument, the loss.
    assert schedule.fixed_bytes == 4 * (2 * 2 * 16 * 16 + 64 * 16 + 1)
    assert cut.plan.pieces[0].label in run("explain", net).output
    assert [one["name"] for one in json.loads(run("explain", net, "--json").stdout)] == [
        piece.label for piece in cut.plan.pieces
    ]


@pytest.mark.parametrize(
    ("args", "next_one"),
    [
        (["plan", "PROFILE", "--budget", "1MB"], "--to plan.html --budget 1MB"),
        (["frontier", "PROFILE"], "mwplan plan"),
        (["explain", "tests.test_cli:network"], "mwplan profile tests.test_cli:network"),
        (
            ["profile", "tests.test_cli:network", "--device", "h100", "--to", "TO/p.json"],
            "mwplan frontier",
        ),
    ],
)
def test_every_command_says_what_comes_next(
    args: list[str], next_one: str, saved: Path, tmp_path: Path
) -> None:
    args = [str(saved) if a == "PROFILE" else a.replace("TO/", f"{tmp_path}/") for a in args]
    said = run(*args).output
    assert next_one in said[said.index("next\n") :]
    assert json.loads(run(*args, "--json").stdout)


def test_long_waits_are_shown_at_terminals_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal, after_s, shown in ((True, 0, True), (False, 0, False), (True, 60, False)):
        written = io.StringIO()
        monkeypatch.setattr(waiting, "err", Console(file=written, force_terminal=terminal))
        with waiting.waiting("planning", after_s=after_s):
            time.sleep(0.3)
        assert ("planning" in written.getvalue()) == shown
        with waiting.phases() as advance:
            advance("measuring", 1, 2)
        assert ("measuring" in written.getvalue()) == terminal


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
        (["plan", "tests.test_cli:no_scalar", "--budget", "1GB"], "scalar"),
        (["plan", "tests.test_cli:a_number", "--budget", "1GB"], "the first must be a chain"),
        (["explain", "tests.test_cli:a_number"], "the first must be a chain"),
        (["plan", "tests.test_cli:network", "--budget", "2 bananas"], "`--budget='2 bananas'`"),
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


def test_the_main_job_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch of a shallow network: everything that `make demo` reports, and the files it writes."""
    monkeypatch.setattr("mwplan.report.page.plotly", lambda: "")
    result = run(
        "train",
        "--epochs",
        "1",
        "--depth",
        "2",
        "--batch",
        "64",
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
    # What it is made of is said, whatever it is; recomputation at the same budget stands beside.
    assert "The plan that was trained" in result.output
    assert "recomputation alone" in result.output
    assert [row.budget_bytes for row in got.plans] == sorted(
        (r.budget_bytes for r in got.plans), reverse=True
    )
    assert got.plans[-1].budget_bytes == got.frontier[0][0]
    shown = json.loads(page_figures((tmp_path / "plan.html").read_text()))
    assert shown["plans"][shown["chosen"]]["letters"] == "".join(LETTERS[s] for s in got.schedule.strategies)
    assert shown["compiled"]["temporary_bytes"] == got.measured_temporary_bytes


def page_figures(text: str) -> str:
    """What the report's script reads."""
    return text.split('id="content">')[1].split("</script>")[0]


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ({"STORE": 2}, "is recomputation"),
        ({"STORE": 1, "INVERT": 1}, "holds no vijps"),
        ({"VIJP": 1, "FRAGMENT": 1}, "1 fragment, 1 vijp"),
    ],
)
def test_the_demo_says_what_its_plan_is_made_of(counts: dict[str, int], says: str) -> None:
    strategies = tuple(mw.Strategy[name] for name, n in counts.items() for _ in range(n))
    store = tuple(mw.Run(kind=mw.RunKind.STORE, start=i, stop=i + 1, options=("vjp",)) for i in range(2))
    schedule = mw.Schedule(runs=store, strategies=strategies)
    result: Any = types.SimpleNamespace(
        schedule=schedule,
        backprop_step_seconds=2.0,
        planned_step_seconds=3.0,
        recomputation_step_seconds=None,
    )
    said = telling.made_of(result)
    assert says in said
    assert "1.50" in said
    assert "does not fit" in said


def test_the_demo_says_how_far_recomputation_reaches() -> None:
    every, alone = ((110, 200), (150, 120), (300, 100)), ((160, 300), (200, 124), (300, 100))
    said = telling.reach(every, alone, 100, 10)
    assert "alone gets down to 190 B, all strategies to 140 B" in said
    assert "alone ends at 150 B, all strategies at 100 B" in said
