"""What is kept on disk: profiles of layers that were measured before, under the names of their programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

import mwplan as mw
from mwplan.common import cache
from mwplan.profiling import bench
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


def test_a_second_profile_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    chain, x = mw.Chain([lambda x: jnp.sin(x) * 2, lambda x: x @ jnp.ones((8, 8))]), jnp.ones((64, 8))
    first = mw.profile(chain, x, repeats=1)

    def refuse(*args: Any) -> Any:
        raise AssertionError("compiled")

    with monkeypatch.context() as patch:
        patch.setattr(bench, "_compiled", refuse)
        assert mw.profile(chain, x, repeats=1) == first
        with pytest.raises(AssertionError, match="compiled"):
            mw.profile(chain, x, repeats=1, cache=False)
        with pytest.raises(AssertionError, match="compiled"):
            mw.profile(mw.Chain([lambda x: jnp.sin(x) * 3]), x, repeats=1)


def test_a_bar_is_drawn_where_it_is_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    for progress, drawn in ((None, False), (False, False), (True, True)):
        with shown(progress, "profiling") as tell:
            tell(1, 2, "layers")
        assert ("profiling layers" in capfd.readouterr().err) is drawn
    said: list[int] = []
    with shown(lambda done, of, what: said.append(done), "profiling") as tell:
        tell(1, 2, "layers")
    assert said == [1]
