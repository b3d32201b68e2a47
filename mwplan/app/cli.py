"""The command line: profile, plan, frontier, explain, train."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mwplan.common.errors import ArgumentError, MwplanError
from mwplan.common.sizes import parse_bytes, show_bytes, show_ns
from mwplan.plans.schedule import Strategy
from mwplan.targets.devices import DEVICES

if TYPE_CHECKING:
    from mwplan.app.train_result import TrainResult
    from mwplan.network.chain import Chain
    from mwplan.plans.profiles import Profile

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Plans the gradient of a deep network within a memory budget, and runs the plan in JAX.",
)
out = Console()
err = Console(stderr=True)

_CODE = "MODULE:NAME, a function without arguments that returns (chain, x)"
Network = Annotated[str, typer.Argument(help=f"a saved profile (a .json file), or {_CODE}")]
Code = Annotated[str, typer.Argument(metavar="MODULE:NAME", help=f"{_CODE}; a profile does not hold layers")]
Forbid = Annotated[list[Strategy] | None, typer.Option(help="a strategy not to use; may be repeated")]
MaxError = Annotated[float, typer.Option(help="largest predicted relative error of a rebuilt cotangent")]
OnDevice = Annotated[
    str | None,
    typer.Option("--device", help=f"estimate for this device, do not measure here: {', '.join(DEVICES)}"),
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr with one row a phase."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err) as bar:
        rows: dict[str, Any] = {}

        def advance(phase: str, done: int, total: int) -> None:
            if phase not in rows or bar.tasks[rows[phase]].finished:
                rows[phase] = bar.add_task(phase, total=total)
            bar.update(rows[phase], completed=done, total=total)

        yield advance


def _network(source: str) -> tuple[Chain, Any]:
    """The chain and input that MODULE:NAME returns."""
    module, _, name = source.partition(":")
    if not name:
        raise ArgumentError(f"`{source}` is neither a .json file nor {_CODE}")
    sys.path.insert(0, "")
    try:
        made = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ArgumentError(f"`{source}` cannot be imported: {error}") from error
    if callable(made):
        try:
            inspect.signature(made).bind()
        except TypeError as error:
            raise ArgumentError(
                f"`{source}` cannot be called without arguments ({error}): it must be {_CODE}"
            ) from error
        made = made()
    if not isinstance(made, tuple) or len(made) != 2:
        raise ArgumentError(f"`{source}` returned {type(made).__name__}: it must return a pair (chain, x)")
    from mwplan.network.chain import check_chain

    return check_chain(made[0]), made[1]


def _check_target(option: str, path: Path | None) -> None:
    """Refuses a file that cannot be written, before anything is measured. Folders are not made: a name may be
    misspelt."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise ArgumentError(f"`{option} {path}`: the folder {path.parent} does not exist: make it first")
    if path.is_dir():
        raise ArgumentError(f"`{option} {path}` is a folder: name a file in it")


def _allowed(forbid: list[Strategy] | None) -> frozenset[Strategy]:
    return frozenset(Strategy) - frozenset(forbid or ())


def _profile(source: str, device: str | None = None) -> Profile:
    from mwplan.plans.profiles import Profile
    from mwplan.profiling import estimating, measure

    if source.endswith(".json") or Path(source).is_file():
        if not Path(source).is_file():
            raise ArgumentError(f"`{source}` does not exist: save a profile there with `mwplan profile`")
        if device is not None:
            raise ArgumentError(f"`{source}` is a saved profile already: leave `--device {device}` out")
        return Profile.from_json(Path(source).read_text())
    chain, x = _network(source)
    with _bar() as advance:
        if device is not None:
            return estimating.estimate(
                chain,
                x,
                device=device,
                progress=lambda done, total, name: advance("estimating layers", done, total),
            )
        return measure.profile(chain, x, progress=lambda done, total, what: advance(what, done, total))


@app.command()
def profile(
    network: Network,
    to: Annotated[Path, typer.Option(help="where to save it")],
    device: OnDevice = None,
) -> None:
    """Measure every layer on this device, or estimate it for another, and save the profile."""
    from mwplan.common import serial

    _check_target("--to", to)
    found = _profile(network, device)
    serial.write_atomically(to, found.to_json())
    out.print(f"{len(found)} layers on {found.device}, {found.source}; saved to {to}")
    out.print(_backpropagation(found))


def _backpropagation(profile: Profile) -> str:
    """What `jax.grad` would take, in words."""
    total = profile.fixed_bytes + profile.stored_bytes
    return (
        f"backpropagation, everything stored: {show_bytes(profile.stored_bytes)} temporaries, "
        f"{show_bytes(total)} in all"
    )


@app.command()
def plan(
    network: Network,
    budget: Annotated[
        str | None,
        typer.Option(
            help="device bytes of the gradient step: 2GiB, 300MB, 1_000_000; by default the memory of "
            "--device"
        ),
    ] = None,
    device: OnDevice = None,
    max_error: MaxError = 1e-4,
    forbid: Forbid = None,
    host_budget: Annotated[
        str | None, typer.Option(help="bytes of the host's memory to send residuals to, as --budget")
    ] = None,
    link_rate: Annotated[
        str, typer.Option(help="with --host-budget: what copies to the host and back get a second")
    ] = "20GB",
    to: Annotated[Path | None, typer.Option(help="save the schedule as JSON")] = None,
    as_json: AsJson = False,
) -> None:
    """The fastest schedule within a budget, with its proof."""
    from mwplan import planning
    from mwplan.common import serial
    from mwplan.profiling import roofline

    _check_target("--to", to)
    room: str | int
    if budget is not None:
        room = budget
    elif device is not None:
        room = roofline.device_of(device).memory_bytes
    else:
        raise ArgumentError("`--budget` is missing: give it, or a `--device` whose memory it shall be")
    found, rate = _profile(network, device), parse_bytes(link_rate, "--link-rate")
    schedule = planning.plan(
        found if host_budget is None else found.offloading(rate),
        room,
        max_error=max_error,
        allowed=_allowed(forbid),
        host_budget=host_budget,
    )
    if to is not None:
        serial.write_atomically(to, schedule.to_json())
    print(schedule.to_json() if as_json else schedule)


@app.command()
def frontier(
    network: Network,
    device: OnDevice = None,
    max_error: MaxError = 1e-4,
    forbid: Forbid = None,
    plot: Annotated[Path | None, typer.Option(help="draw it into this PNG")] = None,
    rows: Annotated[int, typer.Option(help="rows of the table at most")] = 20,
    as_json: AsJson = False,
) -> None:
    """Every budget at once: least time against memory."""
    from mwplan import planning
    from mwplan.common import plots, serial

    _check_target("--plot", plot)
    if rows < 2:
        raise ArgumentError(
            f"`--rows {rows}` must be at least 2: the schedule of least memory and the fastest"
        )
    found = planning.frontier(_profile(network, device), max_error=max_error, allowed=_allowed(forbid))
    if plot is not None:
        serial.write_atomically(plot, plots.png(found.plot().figure))  # type: ignore[arg-type]
    if as_json:
        print(json.dumps([{"total_bytes": need, "time_ns": time} for need, time in found.points]))
        return
    fastest = min((time for _, time in found.points), default=1)
    table = Table(title=f"{len(found.points)} schedules that no other beats", title_justify="left")
    for name in ("budget", "predicted time", "relative"):
        table.add_column(name, justify="right")
    shown = found.points
    if len(shown) > rows:
        last = len(shown) - 1
        shown = tuple(shown[round(i * last / (rows - 1))] for i in range(rows))
    for need, time in shown:
        table.add_row(show_bytes(need), show_ns(time), f"{time / fastest:.2f}")
    out.print(table)
    out.print(_backpropagation(found.profile))


@app.command()
def report(
    network: Network,
    to: Annotated[Path, typer.Option(help="the HTML file to write: one that needs nothing else")],
    budget: Annotated[
        str | None, typer.Option(help="the budget of the plan that is shown first; any can be chosen there")
    ] = None,
    device: OnDevice = None,
    max_error: MaxError = 1e-4,
    forbid: Forbid = None,
    plans: Annotated[int, typer.Option(help="budgets to choose from, each planned")] = 24,
) -> None:
    """A page to look at: every budget's plan by layer, its memory over a step, its peak and proof."""
    from mwplan import planning
    from mwplan.report import page

    page.check_target(to)
    found = _profile(network, device)
    every = planning.frontier(
        found, max_error=max_error, allowed=_allowed(forbid), thin=planning.default_thin(found)
    )
    schedule = None if budget is None else every.at(budget)
    name = network.rpartition("/")[2] if network.endswith(".json") else network
    every.report(to, schedule, plans=plans, title=f"Memory plans of {name}")
    out.print(f"wrote {to}: open it in a browser, and drag the budget", soft_wrap=True)


@app.command()
def explain(network: Code) -> None:
    """Which strategies each layer has, at what price, and why not the others."""
    import jax

    from mwplan.network.operator import explain as explain_layer

    if network.endswith(".json"):
        raise ArgumentError(f"`{network}`: `explain` needs the layers, which no profile holds: give {_CODE}")
    chain, x = _network(network)
    seen = set()
    for position, layer in enumerate(chain.layers, start=1):
        explained = explain_layer(layer, x)
        if str(explained) not in seen:
            out.print(f"layer {position}", style="bold")
            out.print(explained)
            seen.add(str(explained))
        x = jax.eval_shape(lambda layer, x: layer(x), layer, x)


@app.command()
def train(
    budget: Annotated[
        str | None,
        typer.Option(
            help="device bytes of the gradient step; by default room for a fifth of backpropagation's "
            "temporaries, "
            "or 1.25 times the least that any schedule needs where that is more"
        ),
    ] = None,
    max_error: MaxError = 1e-4,
    forbid: Forbid = None,
    batch: Annotated[int, typer.Option(help="images a step")] = 512,
    epochs: Annotated[int, typer.Option(help="passes over the training images")] = 60,
    depth: Annotated[int, typer.Option(help="convolutions at each of the two resolutions")] = 12,
    seed: Annotated[int, typer.Option(help="of weights, batches and split")] = 0,
    to: Annotated[Path, typer.Option("--out", help="folder for training.json and training.png")] = Path(
        "results/demo"
    ),
    as_json: AsJson = False,
) -> None:
    """Train on handwritten digits within a budget that backpropagation exceeds."""
    from mwplan.app import training
    from mwplan.app.train_result import TrainConfig

    config = TrainConfig(
        budget=budget,
        max_error=max_error,
        batch=batch,
        epochs=epochs,
        depth=depth,
        seed=seed,
        forbid=tuple(forbid or ()),
    )
    with _bar() as advance:
        result = training.train(
            config, advance, lambda text: err.print(text, markup=False, highlight=False, soft_wrap=True)
        )
    files = training.write(result, to)
    if as_json:
        print(result.to_json())
        return
    out.print(_training_table(result))
    out.print(_budget_note(result), end="")
    out.print(f"wrote {files[0]} and {files[1]}")


def _training_table(result: TrainResult) -> Table:
    """What was predicted and measured, beside backpropagation's."""
    table = Table(title="planned and plain training, side by side", title_justify="left")
    for name in ("", "plan", "backpropagation", "ratio"):
        table.add_column(name, justify="left" if not name else "right")

    def row(name: str, planned: float, plain: float, show: Callable[[float], str]) -> None:
        table.add_row(name, show(planned), show(plain), f"{planned / plain:.2f}")

    def size(value: float) -> str:
        return show_bytes(int(value))

    room = result.budget_bytes - result.fixed_bytes
    table.add_row("temporaries, budget", size(room), "", "")
    table.add_row("temporaries, predicted", size(result.predicted_temporary_bytes), "", "")
    row("temporaries, measured", result.measured_temporary_bytes, result.backprop_temporary_bytes, size)
    fixed = result.fixed_bytes
    row(
        "all device memory",
        fixed + result.measured_temporary_bytes,
        fixed + result.backprop_temporary_bytes,
        size,
    )
    table.add_row("gradient, predicted", f"{result.predicted_step_seconds * 1e3:.1f} ms", "", "")
    row("step", result.planned_step_seconds, result.backprop_step_seconds, lambda s: f"{s * 1e3:.1f} ms")
    row(
        "compilation", result.planned_compile_seconds, result.backprop_compile_seconds, lambda s: f"{s:.1f} s"
    )
    for when, planned, plain in (
        ("first", result.gradient_error_first, result.backprop_error_first),
        ("last", result.gradient_error_last, result.backprop_error_last),
    ):
        table.add_row(f"gradient error to float64, {when} step", f"{planned:.1e}", f"{plain:.1e}", "")
    table.add_row("largest reported discrepancy", f"{max(result.discrepancies, default=0.0):.1e}", "", "")
    table.add_row("times planned again", str(len(result.replans)), "", "")
    table.add_row("final loss", f"{result.losses_planned[-1]:.4f}", f"{result.losses_plain[-1]:.4f}", "")
    table.add_row("test accuracy", f"{result.accuracy_planned:.2%}", f"{result.accuracy_plain:.2%}", "")
    return table


def _budget_note(result: TrainResult) -> str:
    """A line where the default budget is not the fifth that the help promises; otherwise nothing."""
    from mwplan.app.training import BUDGET_FRACTION, LEAST_FACTOR

    fifth = int(BUDGET_FRACTION * result.backprop_temporary_bytes)
    if result.config.budget is not None or result.budget_bytes - result.fixed_bytes <= fifth:
        return ""
    return (
        f"A fifth of backpropagation's temporaries ({show_bytes(fifth)}) is too little here: the budget is "
        f"{LEAST_FACTOR} times the least that any "
        f"schedule needs, {show_bytes(result.budget_bytes)} with {show_bytes(result.fixed_bytes)} of "
        "parameters, gradients and input.\n"
    )


def main() -> None:
    """Runs the command line; an error of mwplan is one message and exit status 2."""
    try:
        app()
    except MwplanError as error:
        err.print(f"error: {error}", style="red", markup=False, highlight=False)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
