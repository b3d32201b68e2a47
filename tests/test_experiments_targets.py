"""`experiments.targets`: networks, alternatives, records, and a toy run where a compiler is installed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import pytest

import mwplan as mw
from experiments.targets import __main__ as command
from experiments.targets import networks, reading, study
from mwplan.network.chain import boundaries
from tests.compilers import GPU

PLAN = {"predicted_bytes": 100, "predicted_ns": 1000}
MADE = {"temporary_bytes": 110, "modelled_ns": 1100, "moved_bytes": 5, "launches": 3}


def row(method: str, share: float, **more: Any) -> dict[str, Any]:
    point = study.Point(network="gpt", target="h200", method=method, share=share)
    return dataclasses.asdict(point) | MADE | (PLAN if share >= 0 else {}) | more


@pytest.mark.parametrize("name", ["gpt", "resnet50", "vit-b", "lipschitz"])
def test_networks_are_shapes(name: str) -> None:
    shapes = networks.network(name).shapes()
    leaves = jax.tree.leaves((shapes.chain, shapes.x, shapes.labels))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    last = boundaries(shapes.chain, shapes.x)[-1]
    assert jax.eval_shape(shapes.loss, last, shapes.labels).shape == ()


def test_bf16_is_bf16() -> None:
    shapes = networks.network("gpt-bf16").shapes()
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(shapes.chain)} == {"bfloat16"}


@pytest.mark.parametrize("method", study.ALTERNATIVES)
def test_alternatives_have_the_same_gradient(method: str) -> None:
    shapes = networks.network("mlp-small").shapes()
    config = networks.zoo.Config(model="mlp", depth=4, width=32, batch=64, resolution=8)
    made = networks.zoo.build(config)
    want = jax.jit(jax.grad(lambda net: shapes.loss(net(made.x), made.labels)))(made.chain)
    got = jax.jit(jax.grad(study.alternative(method, shapes)))(made.chain, made.x, made.labels)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert jax.numpy.allclose(one, other, atol=1e-6)


def test_reading(tmp_path: Path) -> None:
    """Bad news stays: what does not fit, and what an alternative beats."""
    rows = [
        row("backprop", -1.0, temporary_bytes=200, modelled_ns=900),
        row("checkpoint", -1.0, temporary_bytes=100, modelled_ns=1000),
        row("tied", 0.5),
        row("tied", 0.0, temporary_bytes=90),
        {
            k: v
            for k, v in row("sqrt", -1.0, out_of_memory="no", needed_bytes=1 << 34).items()
            if k not in MADE
        },
    ]
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in [rows[0], *rows]) + '{"network": "cut')
    assert reading.read(path) == rows
    assert [reading.beaten(one, rows) for one in rows[2:4]] == [True, False]
    (found,) = reading.summary(rows)
    assert found["points"] == 2
    assert found["bytes, compiled / predicted"] == [0.9, 1.0, 1.1]
    assert found["beaten by an alternative"] == 1
    text = reading.markdown(rows)
    assert "does not fit: 16.00 GiB" in text
    assert "plan 50%, tied" in text
    assert len(list(reading.tables(rows))) == 1
    assert reading.draw(rows).axes[0].get_title() == "gpt, h200"


def test_bad_input() -> None:
    with pytest.raises(mw.ArgumentError, match="gpt"):
        networks.network("gpt5")


def test_a_target_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command.targets, "installed", lambda name: False)
    command.main(command.Config(networks=("mlp-small",), targets=("h200",), out=tmp_path))
    assert "left out h200" in capsys.readouterr().out


@GPU
def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = command.Config(networks=("mlp-small",), targets=("h200",), shares=(1.0,), out=tmp_path)
    command.main(config)
    rows = reading.read(tmp_path / "records.jsonl")
    assert len(rows) == len(study.ALTERNATIVES) + len(study.ARRANGEMENTS)
    assert (tmp_path / "targets.png").exists()
    assert "mlp-small for h200" in (tmp_path / "table.md").read_text()
    monkeypatch.setattr(study, "compute", lambda point: pytest.fail("computed again"))
    command.main(config)
