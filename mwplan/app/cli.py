"""The command line: profile, plan, frontier, report, explain, train."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from mwplan.app import sources
from mwplan.app.sources import CODE, LossSource
from mwplan.app.waiting import err, phases, waiting
from mwplan.common.errors import ArgumentError, MwplanError
from mwplan.common.sizes import parse_bytes, show_bytes, show_ns
from mwplan.plans.schedule import Strategy
from mwplan.targets.devices import DEVICES

if TYPE_CHECKING:
    from mwplan.app.train_result import TrainResult
    from mwplan.plans.profiles import Profile

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Plans the gradient of a deep network within a memory budget, and runs the plan in JAX.",
)
out = Console()

Network = Annotated[str, typer.Argument(help=f"a saved profile (a .json file), or {CODE}")]
Code = Annotated[str, typer.Argument(metavar="MODULE:NAME", help=f"{CODE}; a profile does not hold layers")]
Forbid = Annotated[list[Strategy] | None, typer.Option(help="a strategy not to use; may be repeated")]
MaxError = Annotated[float, typer.Option(help="largest predicted relative error of a rebuilt cotangent")]
OnDevice = Annotated[
    str | None,
    typer.Option("--device", help=f"estimate for this device, do not measure here: {', '.join(DEVICES)}"),
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]


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


def _next(*lines: str) -> None:
    """What one does next."""
    out.print("next", style="bold")
    for line in lines:
        out.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)


def _is_saved(network: str) -> bool:
    return network.endswith(".json") or Path(network).is_file()


@app.command()
def profile(
    network: Network,
    to: Annotated[Path, typer.Option(help="where to save it")],
    device: OnDevice = None,
    as_json: AsJson = False,
) -> None:
    """Measure every layer on this device, or estimate it for another, and save the profile."""
    from mwplan.common import serial

    _check_target("--to", to)
    found = sources.profile(network, device)
    serial.write_atomically(to, found.to_json())
    if as_json:
        print(found.to_json())
        return
    what, *rest = str(found).splitlines()[:-1]
    out.print("\n".join([what, *rest, f"saved to {to}"]), markup=False, highlight=False, soft_wrap=True)
    name = shlex.quote(str(to))
    _next(
        f"mwplan frontier {name}                       what every budget costs",
        f"mwplan plan {name} --budget 2GiB             the fastest schedule within one",
        f"mwplan report {name} --to plan.html          all of it, to look at",
    )


def _backpropagation(profile: Profile) -> str:
    """What `jax.grad` would take, in words."""
    total = profile.fixed_bytes + profile.stored_bytes
    return (
        f"backpropagation: {show_bytes(profile.stored_bytes)} temporaries by prediction, with all that "
        f"`jax.vjp` keeps, {show_bytes(total)} in all"
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
    if budget is not None:
        parse_bytes(budget, "--budget")
    room: str | int
    if budget is not None:
        room = budget
    elif device is not None:
        room = roofline.device_of(device).memory_bytes
    else:
        raise ArgumentError("`--budget` is missing: give it, or a `--device` whose memory it shall be")
    rate, found = parse_bytes(link_rate, "--link-rate"), sources.profile(network, device)
    with waiting("planning"):
        schedule = planning.plan(
            found if host_budget is None else found.offloading(rate),
            room,
            max_error=max_error,
            allowed=_allowed(forbid),
            host_budget=host_budget,
        )
    if to is not None:
        serial.write_atomically(to, schedule.to_json())
    if as_json:
        print(schedule.to_json())
        return
    print(schedule)
    quoted = f'budget="{room}"' if isinstance(room, str) else f"budget={room}"
    compiles = (
        f"mw.fit_function(loss, params, ..., {quoted}) or mw.fit(loss, chain, x, ..., {quoted})"
        "    compiles it and measures"
    )
    saved = f'mw.value_and_grad(loss, mw.Schedule.from_json(open("{to}").read()))    the step of a chain'
    again = shlex.join(["mwplan", "report", network, "--to", "plan.html", "--budget", str(room)])
    _next(compiles, *([] if to is None else [saved]), f"{again}    looks at it")


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
    measured = sources.profile(network, device)
    with waiting("solving for every budget"):
        found = planning.frontier(
            measured, max_error=max_error, allowed=_allowed(forbid), thin=planning.default_thin(measured)
        )
    if not found.points:
        raise found.infeasible(1, 1)
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
    middle = shown[len(shown) // 2][0]
    _next(
        shlex.join(["mwplan", "plan", network, "--budget", f"{middle}B"]) + "    one of them, layer by layer",
        shlex.join(["mwplan", "report", network, "--to", "plan.html"]) + "    all of them, to look at",
    )


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
    as_json: AsJson = False,
) -> None:
    """A page to look at: every budget's plan by layer, its memory over a step, its peak and proof."""
    from mwplan import planning
    from mwplan.report import page

    page.check_target(to)
    if plans < 1:
        raise ArgumentError(f"`--plans {plans}` must be at least 1")
    if budget is not None:
        parse_bytes(budget, "--budget")
    found = sources.profile(network, device)
    with waiting("solving for every budget"):
        every = planning.frontier(
            found, max_error=max_error, allowed=_allowed(forbid), thin=planning.default_thin(found)
        )
        schedule = None if budget is None else every.at(budget)
        name = Path(network).name if _is_saved(network) else network
        every.report(to, schedule, plans=plans, title=f"Memory plans of {name}")
    if as_json:
        print(json.dumps({"to": str(to)}))
        return
    out.print(f"wrote {to}", highlight=False, soft_wrap=True)
    _next(f"open {to} in a browser, and drag the budget")


@app.command()
def explain(network: Code, as_json: AsJson = False) -> None:
    """Which strategies each layer has, at what price, and why not the others; of a loss, its pieces."""
    import jax

    from mwplan.network.operator import explain as explain_layer

    if _is_saved(network):
        raise ArgumentError(f"`{network}`: `explain` needs the layers, which no profile holds: give {CODE}")
    found = sources.network(network)
    if isinstance(found, LossSource):
        _explain_loss(network, found, as_json)
        return
    x = found.x
    seen: set[str] = set()
    rows: list[dict[str, object]] = []
    for position, layer in enumerate(found.chain.layers, start=1):
        explained = explain_layer(layer, x)
        rows.append({"position": position, **dataclasses.asdict(explained)})
        if not as_json and str(explained) not in seen:
            out.print(f"layer {position}", style="bold")
            out.print(explained)
            seen.add(str(explained))
        x = jax.eval_shape(lambda layer, x: layer(x), layer, x)
    if as_json:
        print(json.dumps(rows))
        return
    _next(shlex.join(["mwplan", "profile", network, "--to", "profile.json"]) + "    what each takes here")


def _explain_loss(network: str, found: LossSource, as_json: bool) -> None:
    """The pieces of a loss."""
    if as_json:
        pieces = found.cut.plan.pieces
        rows = [{"name": one.label, "times": one.depth, "makes_bytes": one.made_bytes} for one in pieces]
        print(json.dumps(rows))
        return
    print(found.cut)
    out.print(
        "Each piece can be stored, recomputed, or passed with its whole cotangent kept; vijps and inversion "
        "need the layers of mwplan.layers, in a chain.",
    )
    _next(shlex.join(["mwplan", "plan", network, "--budget", "2GiB"]) + "    the fastest schedule within it")


@app.command()
def train(
    budget: Annotated[
        str | None,
        typer.Option(
            help="device bytes of the gradient step; by default room for 0.15 of backpropagation's "
            "temporaries, or 1.4 times the least that any schedule needs where that is more"
        ),
    ] = None,
    max_error: MaxError = 1e-4,
    forbid: Forbid = None,
    batch: Annotated[int, typer.Option(help="images a step")] = 512,
    epochs: Annotated[int, typer.Option(help="passes over the training images")] = 40,
    depth: Annotated[int, typer.Option(help="convolutions at each of the two resolutions")] = 16,
    seed: Annotated[int, typer.Option(help="of weights, batches and split")] = 0,
    to: Annotated[
        Path, typer.Option("--out", help="folder for training.json, training.png and plan.html")
    ] = Path("results/demo"),
    as_json: AsJson = False,
) -> None:
    """Train on handwritten digits within a budget that backpropagation exceeds."""
    from mwplan.app import training
    from mwplan.app.telling import made_of
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
    with phases() as advance:
        trained = training.train(
            config, advance, lambda text: err.print(text, markup=False, highlight=False, soft_wrap=True)
        )
    files, result = training.write(trained, to), trained.result
    if as_json:
        print(result.to_json())
        return
    out.print(_training_table(result))
    out.print(made_of(result))
    out.print(f"wrote {', '.join(map(str, files))}", highlight=False, soft_wrap=True)
    if len(files) == 2:
        _next('pip install -e ".[report]", for a page that shows the plan at every budget')
    else:
        _next(f"open {files[2]} in a browser, and drag the budget; {files[1]} is the whole at a glance")


def _training_table(result: TrainResult) -> Table:
    """What was predicted and measured, beside recomputation and backpropagation."""
    from mwplan.app.telling import side_by_side_rows

    head, *rows = side_by_side_rows(result)
    table = Table(title="planned and plain training, side by side", title_justify="left")
    for name in head:
        table.add_column(name, justify="right" if name else "left")
    for row in rows:
        table.add_row(*row)
    return table


def main() -> None:
    """Runs the command line; an error of mwplan is one message and exit status 2."""
    try:
        app()
    except MwplanError as error:
        err.print(f"error: {error}", style="red", markup=False, highlight=False)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
