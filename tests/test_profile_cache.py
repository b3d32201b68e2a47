"""What is kept on disk: profiles of layers that were measured before, under the names of their programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import mwplan as mw
from mwplan.common import cache
from mwplan.compilers import digests
from mwplan.profiling import bench, estimating, growth
from mwplan.profiling.progress import shown


@dataclass(frozen=True)
class Kept:
    """Something to keep."""

    bytes: int
    names: tuple[str, ...]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_what_is_kept_is_found() -> None:
    name, one = cache.key("a", "b"), Kept(3, ("x",))
    assert cache.known(name, Kept, kind="things", schema=1) is None
    assert cache.found(name, Kept, lambda: one, kind="things", schema=1) == one
    assert cache.found(name, Kept, pytest.fail, kind="things", schema=1) == one  # type: ignore[arg-type]
    assert cache.known(name, Kept, kind="things", schema=2) is None
    assert cache.key("ab", "") != name != cache.key("b", "a")


def test_half_a_file_is_none(folder: Path) -> None:
    name = cache.key("a")
    cache.keep(name, Kept(3, ()), kind="things", schema=1)
    (path,) = (folder / "mwplan" / "things").rglob("*.json")
    path.write_text(path.read_text()[:20])
    assert cache.known(name, Kept, kind="things", schema=1) is None


def test_where_nothing_can_be_written_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    cache.keep(cache.key("a"), Kept(3, ()), kind="things", schema=1)
    assert cache.known(cache.key("a"), Kept, kind="things", schema=1) is None


def refuse(*args: Any) -> Any:
    raise AssertionError("made again")


def test_a_second_profile_neither_lowers_nor_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = jnp.ones((8, 8))
    chain, x = mw.Chain([lambda x: jnp.sin(x) * 2, lambda x: x @ weights]), jnp.ones((64, 8))
    first = mw.profile(chain, x, repeats=1)
    monkeypatch.setattr(bench, "_compiled", refuse)
    monkeypatch.setattr(bench.Handle, "lowered", refuse)
    monkeypatch.setattr(bench.Joint, "lowered", property(refuse))
    assert mw.profile(chain, x, repeats=1) == first
    others = [lambda x: jnp.sin(x) * 3, lambda x: jnp.sin(x) * 2.0**0.5, lambda x: x @ (2 * weights)]
    for one, settings in [*((one, {}) for one in others), (others[0], {"cache": False})]:
        with pytest.raises(AssertionError, match="made again"):
            mw.profile(mw.Chain([one]), x, repeats=1, **settings)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="made again"), jax.default_matmul_precision("bfloat16"):
        mw.profile(chain, x, repeats=1)


def test_errors_are_measured_anew_for_other_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for the same ones, in another object, neither of a profile nor of an estimate; and of an inverse
    too."""
    key = jax.random.key(0)
    chain = mw.Chain([mw.layers.Dense.init(key, 8, 8), mw.layers.LeakyReLU(0.5)])
    again, other = jax.tree.map(jnp.copy, chain), jax.tree.map(lambda a: a + 0.1, chain)
    x = jax.random.normal(key, (64, 8))

    def estimated(chain: mw.Chain, x: jax.Array) -> mw.Profile:
        return mw.estimate(chain, x, device="laptop")

    def profiled(chain: mw.Chain, x: jax.Array) -> mw.Profile:
        return mw.profile(chain, x, repeats=1)

    for make in (profiled, estimated):
        first = make(chain, x)
        with monkeypatch.context() as patch:
            patch.setattr(growth, "measure", refuse)
            patch.setattr(growth, "measure_inverse", refuse)
            assert make(again, x) == first
            for changed in ((other, x), (chain, -x)):
                with pytest.raises(AssertionError, match="made again"):
                    make(*changed)


def test_a_second_estimate_prices_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    net = jax.eval_shape(lambda: mw.Chain([mw.layers.Dense.init(jax.random.key(0), 8, 8), jnp.tanh]))
    x = jax.ShapeDtypeStruct((64, 8), jnp.float32)
    first = mw.estimate(net, x, device="laptop")
    monkeypatch.setattr(estimating, "measure_layer", refuse)
    assert mw.estimate(net, x, device="laptop") == first
    for device, shape, cached in (
        ("h100", x, True),
        ("laptop", x.update(shape=(32, 8)), True),
        ("laptop", x, False),
    ):
        with pytest.raises(AssertionError, match="made again"):
            mw.estimate(net, shape, device=device, compiled=False, cache=cached)


def test_a_program_s_name_tells_it_from_others() -> None:
    x, table = jnp.ones((4, 8)), jnp.arange(8.0)

    def named(function: Any, *args: Any) -> str | None:
        return digests.digest(jax.make_jaxpr(function)(*args or (x,)))

    def both(x: jax.Array) -> Any:
        y, pull = jax.vjp(lambda x: jax.nn.relu(jax.nn.softmax(x)), x)
        return jax.lax.scan(lambda c, a: (c + a, c), y, pull(y)[0][None])

    assert named(both) == named(both) is not None
    # Calls are what they call, whatever their names and rules.
    assert named(lambda x: jax.jit(jnp.sin)(x)) == named(lambda y: jax.jit(lambda z: jnp.sin(z))(y))
    kinds = [
        lambda x: x + table,
        lambda x: x + 2 * table,
        lambda x: x + 1,
        lambda x: x + 2,
        lambda x: x.sum(0),
        lambda x: x.sum(1),
        lambda x: jax.lax.scan(lambda c, a: (c + a, c), x[0], x)[0],
        lambda x: jax.lax.scan(lambda c, a: (c - a, c), x[0], x)[0],
        lambda x: jnp.sin(x) + jnp.cos(x),
        lambda x: jnp.cos(x) - jnp.sin(x),
        lambda x: jax.random.normal(jax.random.key(1), (3,)),
        lambda x: jax.random.normal(jax.random.key(2), (3,)),
        lambda x: jax.checkpoint(jnp.sin)(x),
        jnp.sin,
    ]
    names = [*map(named, kinds), named(jnp.sin, x.astype(jnp.bfloat16)), named(jnp.sin, x[:2])]
    assert None not in names
    assert len({*names}) == len(names)
    assert named(lambda x: jax.pure_callback(lambda a: a, x, x)) is None


def test_a_bar_is_drawn_where_it_is_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    for progress, drawn in ((None, False), (False, False), (True, True)):
        with shown(progress, "profiling") as tell:
            tell(1, 2, "layers")
        assert ("profiling layers" in capfd.readouterr().err) is drawn
    said: list[int] = []
    with shown(lambda done, of, what: said.append(done), "profiling") as tell:
        tell(1, 2, "layers")
    assert said == [1]
