"""Plain values: sizes, JSON, validation, files."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest

import mwplan as mw
from mwplan.common import serial
from mwplan.common.sizes import parse_bytes, show_bytes, show_ns
from mwplan.plans.profiles import LayerProfile, StoreOption
from tests.chains import random_profile


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("2GiB", 2**31),
        ("500 MB", 500_000_000),
        ("1.5KiB", 1536),
        ("1_000 B", 1000),
        ("2_000_000", 2_000_000),
        (7, 7),
        (" 3 B ", 3),
        ("1tib", 2**40),
    ],
)
def test_sizes_are_read(text: int | str, want: int) -> None:
    assert parse_bytes(text) == want


@pytest.mark.parametrize(
    "bad", ["2 bananas", "", "GiB", "-1GiB", 0, -5, "0", True, 1.5, None, "1e3", 2**63, "9999999 TiB", "0.1"]
)
def test_what_is_no_size_is_refused(bad: object) -> None:
    with pytest.raises(mw.ArgumentError, match=r"`budget="):
        parse_bytes(bad)  # type: ignore[arg-type]


def test_sizes_are_shown() -> None:
    assert [show_bytes(n) for n in (5, 1536, 2**31, 2**41)] == ["5 B", "1.50 KiB", "2.00 GiB", "2.00 TiB"]
    assert [show_ns(n) for n in (5, 1500, 2_500_000, 3_000_000_000)] == ["5 ns", "1.5 us", "2.5 ms", "3 s"]


@pytest.mark.parametrize("seed", range(20))
def test_profiles_survive_json(seed: int) -> None:
    profile = random_profile(random.Random(seed), 3)
    again = mw.Profile.from_json(profile.to_json())
    assert again == profile
    assert hash(again) == hash(profile)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda raw: raw | {"schema": 99}, "schema 99"),
        (lambda raw: raw | {"kind": "schedule"}, "expected a saved profile"),
        (lambda raw: raw | {"data": raw["data"] | {"surprise": 1}}, "surprise"),
        (lambda raw: raw | {"data": raw["data"] | {"fixed_bytes": 1.5}}, "fixed_bytes"),
        (lambda raw: raw | {"data": raw["data"] | {"fixed_bytes": -1}}, "not valid"),
        (lambda raw: raw | {"data": {k: v for k, v in raw["data"].items() if k != "layers"}}, "layers"),
    ],
)
def test_bad_files_are_refused(change: object, complaint: str) -> None:
    raw = json.loads(random_profile(random.Random(0), 2).to_json())
    with pytest.raises(mw.FileFormatError, match=complaint):
        mw.Profile.from_json(json.dumps(change(raw)))  # type: ignore[operator]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"profile"'])
def test_what_is_no_json_object_is_refused(text: str) -> None:
    with pytest.raises(mw.FileFormatError):
        mw.Profile.from_json(text)


@pytest.mark.parametrize("bad", [-1, 1.0, True, 2**63, float("nan"), "1"])
def test_costs_are_integers_in_range(bad: object) -> None:
    good = StoreOption(
        name="s", residual_bytes=0, keeps_input=True, keeps_output=False, forward_ns=1, backward_ns=1
    )
    with pytest.raises(mw.ArgumentError, match="integer from 0"):
        dataclasses.replace(good, residual_bytes=bad)


def test_overflowing_sums_are_refused() -> None:
    huge = StoreOption(
        name="s", residual_bytes=2**62, keeps_input=True, keeps_output=False, forward_ns=1, backward_ns=1
    )
    layer = LayerProfile(name="l", forward_ns=1, store=(huge,))
    with pytest.raises(mw.ArgumentError, match="2\\^63"):
        mw.Profile(
            layers=(layer,) * 3,
            activation_bytes=(1,) * 4,
            cotangent_bytes=(1,) * 4,
            sweep_cotangent_bytes=(1,) * 4,
        )


def test_an_empty_profile_is_refused() -> None:
    with pytest.raises(mw.ArgumentError, match="at least one layer"):
        mw.Profile(layers=(), activation_bytes=(1,), cotangent_bytes=(1,), sweep_cotangent_bytes=(1,))


def test_runs_must_cover() -> None:
    def store(at: int) -> mw.Run:
        return mw.Run(kind=mw.RunKind.STORE, start=at, stop=at + 1, options=("vjp",))

    with pytest.raises(mw.ArgumentError, match="follow one another"):
        mw.Schedule(runs=(store(0), store(2)))
    with pytest.raises(mw.ArgumentError, match="at least one layer"):
        mw.Schedule(runs=())
    with pytest.raises(mw.ArgumentError, match="cover"):
        mw.Run(kind=mw.RunKind.RECOMPUTE, start=0, stop=3, inner=(store(0),))
    with pytest.raises(mw.ArgumentError, match="one option a layer"):
        mw.Run(kind=mw.RunKind.MOONWALK, start=0, stop=3, options=("a",))
    nested = mw.Schedule(
        runs=(mw.Run(kind=mw.RunKind.RECOMPUTE, start=0, stop=2, inner=(store(0), store(1))), store(2)),
        strategies=(mw.Strategy.RECOMPUTE, mw.Strategy.RECOMPUTE, mw.Strategy.STORE),
    )
    assert mw.Schedule.from_json(nested.to_json()) == nested
    assert "RR|S" in str(nested)


def test_files_are_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "deep" / "file.json"
    serial.write_atomically(target, "first")

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        serial.write_atomically(target, "second")
    assert target.read_text() == "first"
    assert [p.name for p in target.parent.iterdir()] == ["file.json"]
