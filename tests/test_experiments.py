"""The experiments' machinery at toy sizes: networks, alternatives, sweeps that resume, Dask."""

from __future__ import annotations

import concurrent.futures as cf
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mwplan as mw
from experiments import alternatives, deep, fragments, precision, reading, sweep, training, zoo
from mwplan.common.errors import ArgumentError
from mwplan.plans.schedule import Schedule
from tests.helpers import relative_error, segments

SMALL = {"depth": 2, "width": 8, "batch": 4, "resolution": 8}
#: Sizes that a model needs to be more than these. The Cayley convolutions' solves need threads of their own:
#: see zoo.py.
OWN: dict[str, dict[str, int]] = {
    "fragmental": {"resolution": 128},
    "lipschitz": {"depth": 1},
    "strided": {"depth": 3},
}


def small(model: str) -> zoo.Config:
    return zoo.Config(**{"model": model, **SMALL, **OWN.get(model, {})})


@pytest.mark.parametrize("model", zoo.MODELS)
def test_zoo_gradients(model: str) -> None:
    chain, x, labels, loss = zoo.build(small(model))
    want = mw.jit(jax.grad(lambda net: loss(net(x), labels)))(chain)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(want))
    runs = segments(chain, 3)
    got = mw.jit(jax.grad(lambda net: loss(mw.apply(Schedule(runs=runs), net, x), labels)))(chain)
    assert relative_error(got, want) < 1e-3, runs


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_the_library_s(causal: bool) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (3, 8, 16))
    layer = zoo.Attention(
        mw.layers.Dense.init(keys[1], 16, 48), mw.layers.Dense.init(keys[2], 16, 16), heads=2, causal=causal
    )
    q, k, v = jnp.split(layer.qkv(x).reshape(3, 8, 2, -1), 3, axis=-1)
    want = layer.out(jax.nn.dot_product_attention(q, k, v, is_causal=causal).reshape(x.shape))
    np.testing.assert_allclose(layer(x), want, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("model", zoo.MODELS)
def test_zoo_plans(model: str) -> None:
    chain, x, labels, loss = zoo.build(small(model))
    frontier = mw.frontier(mw.profile(chain, x, repeats=1))
    want = mw.jit(jax.grad(lambda net: loss(net(x), labels)))(chain)
    for budget, _ in frontier.points[:: max(1, len(frontier.points) // 3)]:
        schedule = frontier.at(budget)
        got = mw.jit(jax.grad(lambda net, s=schedule: loss(mw.apply(s, net, x), labels)))(chain)
        assert relative_error(got, want) < 1e-3, str(schedule)


def test_zoo_data_fills_the_batch_and_is_learnable() -> None:
    for model in zoo.MODELS:
        found = zoo.data(small(model))
        assert len(found.x) == len(found.labels) >= 512
        assert found.labels.dtype == np.int32
    text = zoo.data(small("gpt"))
    np.testing.assert_array_equal(text.x[:, 1:], text.labels[:, :-1])


def test_zoo_rejects_unknown_models() -> None:
    with pytest.raises(ArgumentError, match="is none of strided"):
        zoo.Config(model="vgg")


@pytest.mark.parametrize("model", ["revnet", "strided", "gpt"])
def test_grouped_blocks_are_the_same_network(model: str) -> None:
    config = {"model": model, **SMALL, "depth": 9}
    one, joined = zoo.build(zoo.Config(**config)), zoo.build(zoo.Config(**config, group=4))
    assert len(joined.chain) < len(one.chain)
    np.testing.assert_array_equal(one.chain(one.x), joined.chain(joined.x))


def test_alternatives_gradients() -> None:
    """Every method on one chain: the same gradient; what does not apply says why; what has a budget keeps
    it."""
    config = zoo.Config(model="mlp", depth=4, width=16, batch=256, resolution=8)
    study = alternatives.Study(budgets=2, rounds=3, ties=2, repeats=1, yardstick=3, try_settings=False)
    record = alternatives.measure(json.loads(json.dumps(alternatives.point(config, study))))
    assert {row["method"] for row in record["rows"]} == set(alternatives.METHODS)
    ran = [row for row in record["rows"] if "total_bytes" in row]
    for row in record["rows"]:
        if row not in ran:
            assert row["reason"], row
            continue
        assert row["error"] < 1e-4, row
        assert len(row["seconds"]) in (3, 5)
        if row["method"] in alternatives.BUDGETED:
            assert row["total_bytes"] <= row["budget_bytes"], row
    assert {
        "equinox",
        "recompute",
        "recompute_checkpoint",
        "rotor_checkpoint",
        "plan",
        "invert",
        "moonwalk",
    } <= {row["method"] for row in ran}
    assert len(record["yardstick"]) == 2
    assert reading.fastest(reading.fitting(record, ("plan",), 2**40)) is not None
    json.dumps(record)


def test_ties_are_the_fastest_and_what_it_hardly_beats() -> None:
    def timed(*seconds: float) -> alternatives.Compiled:
        candidate = alternatives.Candidate(
            lambda chain, x: x, mw.Chain([mw.layers.LeakyReLU(0.5)]), None, seconds
        )
        return alternatives.Compiled(candidate, None, (), 0, 0.0, "default", seconds=list(seconds))

    fast, close, slow, seldom = timed(1.0, 1.0, 3.0), timed(1.0, 1.05, 1.1), timed(2.0, 2.0, 2.1), timed(1.0)
    assert alternatives.ties([[slow, close, fast, seldom], [slow], [], [timed()]]) == [close, fast, slow]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="XLA:CPU's reports")
def test_further_rounds_count_against_a_base_that_did_not_run_in_them() -> None:
    # Equal programs, twice as fast as the base; one was unlucky in the rounds of both, and all further rounds
    # are slow.
    def row(*seconds: float) -> dict[str, Any]:
        return {"seconds": list(seconds), "program": None}

    base = row(2.0, 2.0, 2.0)
    lucky, unlucky = row(*[1.0] * 3, *[3.0] * 20), row(*[1.21] * 3, *[3.0] * 20)
    record = {"rows": [base, lucky, unlucky, {"seconds": None}]}
    for one in (lucky, unlucky):
        assert reading.over(record, one, base) == pytest.approx(0.55)
    assert reading.over(record, base, base) == 1.0
    assert reading.relative(unlucky, base) == pytest.approx(0.605)


def test_what_does_not_apply_says_why() -> None:
    chain, x, labels, loss = zoo.build(zoo.Config(model="mlp", depth=1, width=4, batch=2, resolution=8))
    problem = alternatives.Problem(chain, x, labels, loss)
    with pytest.raises(alternatives.NotApplicableError, match="no block of this chain repeats"):
        alternatives.backprop_scan(problem, None)


def square(point: dict[str, Any]) -> dict[str, Any]:
    """Work that leaves a trace of each call."""
    with Path(point["log"]).open("a") as log:
        log.write(f"{point['x']}\n")
    if point["x"] == point.get("bad"):
        raise ValueError("bad point")
    return {"y": point["x"] ** 2}


def points_in(folder: Path, count: int = 4) -> list[dict[str, Any]]:
    return [{"x": x, "log": str(folder / "log")} for x in range(count)]


def calls(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "log").read_text().split()]


def test_sweep_goes_on_after_a_truncated_record(tmp_path: Path) -> None:
    points, path = points_in(tmp_path), tmp_path / "records.jsonl"
    first = sweep.run(points, square, path, executor="serial")
    assert [one["y"] for one in first] == [0, 1, 4, 9]
    assert {"versions", "device", "commit"} <= set(first[0]["provenance"])
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])  # killed while the last record was written
    (tmp_path / "log").unlink()
    again = sweep.run(points, square, path, executor="serial")
    assert [one["y"] for one in again] == [0, 1, 4, 9]
    assert len(calls(tmp_path)) == 1
    assert path.read_bytes().count(b"\n") == 4
    sweep.run(points, square, path, executor="serial")
    assert len(calls(tmp_path)) == 1


def test_sweep_keeps_what_worked_and_refuses_a_damaged_file(tmp_path: Path) -> None:
    points = [{**one, "bad": 1} for one in points_in(tmp_path)]
    path = tmp_path / "records.jsonl"
    with pytest.raises(sweep.SweepError, match=r"1 of 4 points failed.*ValueError: bad point"):
        sweep.run(points, square, path, executor="threads", workers=2)
    assert len(sweep.Records(path).read()) == 3
    path.write_bytes(b"{oops\n" + path.read_bytes())
    with pytest.raises(sweep.SweepError, match="line 1, is not JSON"):
        sweep.run(points, square, path, executor="serial")


def test_sweep_one_writer_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    with sweep.Records(path).appending(), pytest.raises(sweep.SweepError, match="another sweep"):
        sweep.run(points_in(tmp_path), square, path, executor="serial")


def test_sweep_in_processes_and_by_name(tmp_path: Path) -> None:
    found = sweep.run(points_in(tmp_path, 1), square, tmp_path / "a.jsonl")
    assert found[0]["y"] == 0
    found = sweep.run(points_in(tmp_path), square, tmp_path / "b.jsonl", executor=f"{__name__}:Threads")
    assert [one["y"] for one in found] == [0, 1, 4, 9]
    with pytest.raises(ArgumentError, match="is none of processes"):
        sweep.run(points_in(tmp_path), square, tmp_path / "c.jsonl", executor="slurm")


class Threads(cf.ThreadPoolExecutor):
    """An executor that a name finds."""


# Dask's own clean-up at the end of a cluster that lives in this process.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_sweep_on_a_dask_cluster(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=1,
        threads_per_worker=1,
        processes=False,
        protocol="tcp://",
        host="127.0.0.1",
        dashboard_address=None,
    ) as cluster:
        address = cluster.scheduler_address.removeprefix("tcp://")
        path = tmp_path / "records.jsonl"
        found = sweep.run(points_in(tmp_path), square, path, executor=f"dask://{address}")
    assert [one["y"] for one in found] == [0, 1, 4, 9]
    assert len(sweep.Records(path).read()) == 4


def test_options_of_the_command_line() -> None:
    from experiments import memory_vs_depth

    config = sweep.parse(memory_vs_depth.Config, None, ["--depths", "4", "8", "--executor", "serial"])
    assert config.depths == (4, 8)
    assert config.models == memory_vs_depth.Config().models
    assert "executor" not in sweep.plain(config)


def test_fragments_of_one_convolution() -> None:
    """Smaller fragments for larger blocks, down to the halo; stable where the first tap dominates, and not
    for ordinary weights."""
    sizes = {"channels": 4, "samples": 512, "rounds": 3, "seed": 0}
    rows = {
        weights: {
            row["option"]: row
            for row in fragments.measure({"weights": weights, "length": 128, **sizes})["rows"]
        }
        for weights in ("dominant", "ordinary")
    }
    shares = [rows["dominant"][name]["fragment"] for name in ("whole", "block_4", "block_16", "block_64")]
    assert shares == [1.0, 0.5, 0.125, 0.03125]
    assert rows["dominant"]["halo"]["fragment"] == 2 / 128
    assert rows["dominant"]["block_64"]["local_error"] < 1e-5
    assert (rows["ordinary"]["block_64"]["local_error"] or 1.0) > 1e-2
    assert all(row["reverse"] > 0 and row["rebuild"] > 0 for row in rows["dominant"].values())


def test_precision_of_one_network() -> None:
    """What was predicted, what the step reported and the truth, for pure Moonwalk and a plan; with steps,
    over training."""
    sizes = {"kind": "slope_0.8", "width": 16, "batch": 64, "repeats": 1, "seed": 0, "tolerances": [1e-4]}
    rows = {row["name"]: row for row in precision.measure({"depth": 4, "steps": 0, **sizes})["rows"]}
    assert set(rows) == {"pure moonwalk", "max_error 1e-04", "backpropagation"}
    assert rows["pure moonwalk"]["temporary_bytes"] < rows["backpropagation"]["temporary_bytes"]
    assert 0 < rows["pure moonwalk"]["error"] < 1e-4
    assert rows["max_error 1e-04"]["predicted_error"] <= 1e-4
    followed = precision.measure({**sizes, "depth": 2, "steps": 2, "every": 1, "rate": 0.1})["rows"]
    losses = [row["loss"] for row in followed if row["name"] == "pure moonwalk"]
    assert len(losses) == 3
    assert losses[2] < losses[0]


def test_training_in_small(tmp_path: Path) -> None:
    """A few steps of one network: the records, the summary and the figure."""
    config = training.Config(
        models=("mlp",),
        depths=(4,),
        widths=(32,),
        resolutions=(8,),
        batches=(256,),
        steps=4,
        checks=2,
        repeats=1,
        executor="serial",
        out=tmp_path,
    )
    training.main(config)
    (row,) = json.loads((tmp_path / "summary.json").read_text())["rows"]
    assert row["planned_bytes"] <= row["budget_bytes"] < row["backprop_bytes"]
    assert row["worst_gradient_error"] < 1e-4
    assert row["median_loss_distance"] < 1e-3
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_deep_in_small(tmp_path: Path) -> None:
    """The experiment's figures at toy depths: a step within a fraction of backpropagation's temporaries, and
    its gradient."""
    sizes = {"compiled": 8, "depth": 64, "fraction": 0.5, "batch": 2, "size": 8, "channels": 4}
    figures = deep.main(deep.Config(**sizes, turns=1, repeats=1, executor="serial", out=tmp_path))  # type: ignore[arg-type]
    assert figures["measured_bytes"] <= figures["room_bytes"] < 0.51 * figures["backpropagation_bytes"]
    assert figures["gradient_error"] < 1e-4
    assert json.loads((tmp_path / "deep.json").read_text())["compile_ratio"] > 0
    assert (tmp_path / "deep.png").stat().st_size > 0
