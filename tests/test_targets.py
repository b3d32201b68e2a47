"""Targets: what a compiler made of a program, read from its text, and programs compiled for devices that are
not here."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import mwplan as mw
from mwplan import targets
from mwplan.common import cache, platforms
from mwplan.layers import Conv2D, MaxMin
from mwplan.targets import hlo, kernels, plugins, program
from mwplan.targets.hlo import Array
from tests.compilers import GPU, TPU

TEXT = """
HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[64,32]{1,0})->f32[64,32]{1,0}}

FileNames
1 "f.py"

%fused_tanh (p0: f32[64,32], p1: f32[10,64,32], p2: s32[]) -> f32[64,32] {
  %p0 = f32[64,32]{1,0} parameter(0)
  %p1 = f32[10,64,32]{2,1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %row = f32[1,64,32]{2,1,0} dynamic-slice(%p1, %p2, %zero, %zero), dynamic_slice_sizes={1,64,32}
  %flat = f32[64,32]{1,0} bitcast(%row)
  %t = f32[64,32]{1,0} tanh(%flat)
  ROOT %sum = f32[64,32]{1,0} add(%p0, %t)
}

%fused_put (q0: f32[10,64,32], q1: f32[64,32], q2: s32[]) -> f32[10,64,32] {
  %q0 = f32[10,64,32]{2,1,0} parameter(0)
  %q1 = f32[64,32]{1,0} parameter(1)
  %q2 = s32[] parameter(2)
  %one = f32[1,64,32]{2,1,0} bitcast(%q1)
  %none = s32[] constant(0)
  ROOT %put = f32[10,64,32]{2,1,0} dynamic-update-slice(%q0, %one, %q2, %none, %none)
}

%body (arg: (s32[], f32[64,32], f32[10,64,32])) -> (s32[], f32[64,32], f32[10,64,32]) {
  %arg = (s32[], f32[64,32]{1,0}, f32[10,64,32]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = f32[64,32]{1,0} get-tuple-element(%arg), index=1
  %all = f32[10,64,32]{2,1,0} get-tuple-element(%arg), index=2
  %step = s32[] constant(1)
  %next = s32[] add(%i, %step)
  %made = f32[64,32]{1,0} fusion(%x, %all, %i), calls=%fused_tanh, metadata={op_name="f/while/tanh"}
  %kept = f32[10,64,32]{2,1,0} fusion(%all, %made, %i), kind=kLoop, calls=%fused_put
  ROOT %out = (s32[], f32[64,32]{1,0}, f32[10,64,32]{2,1,0}) tuple(%next, %made, %kept)
}

%until (arg.1: (s32[], f32[64,32], f32[10,64,32])) -> pred[] {
  %arg.1 = (s32[], f32[64,32]{1,0}, f32[10,64,32]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%arg.1), index=0
  %end = s32[] constant(10)
  ROOT %less = pred[] compare(%i.1, %end), direction=LT
}

ENTRY %main (x.1: f32[64,32], w: f32[32,32], all.1: f32[10,64,32]) -> f32[64,32] {
  %x.1 = f32[64,32]{1,0} parameter(0)
  %w = f32[32,32]{1,0} parameter(1)
  %all.1 = f32[10,64,32]{2,1,0} parameter(2)
  %start = s32[] constant(0)
  %product = f32[64,32]{1,0} dot(%x.1, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %two = (s32[], f32[64,32]{1,0}, /*index=2*/f32[10,64,32]{2,1,0}) tuple(%start, %product, %all.1)
  %loop = (s32[], f32[64,32], f32[10,64,32]) while(%two), condition=%until, body=%body, metadata={op_name="f"}
  ROOT %y = f32[64,32]{1,0} get-tuple-element(%loop), index=1
}
"""
SIZE = 4 * 64 * 32


def test_kernels_of_a_text() -> None:
    found, (loop,) = kernels.kernels(hlo.read(TEXT))
    assert (loop.trips, loop.known, loop.scope) == (10, True, "f")
    by = {one.name: one for one in found}
    product = by["product"]
    assert (product.kind, product.read_bytes, product.written_bytes) == ("product", SIZE + 4 * 32 * 32, SIZE)
    assert product.flop == (("tf32", 2.0 * 64 * 32 * 32),)
    made, kept = by["made"], by["kept"]
    # Of the stack it reads a row, and puts one there: the rest stays where it is.
    assert (made.read_bytes, made.written_bytes, made.times) == (2 * SIZE + 4, SIZE, 10)
    assert (kept.read_bytes, kept.written_bytes) == (SIZE + 4, SIZE)
    assert dict(made.flop) == {"float32": 64 * 32 * (1 + kernels.TRANSCENDENTAL)}
    assert (made.kind, kept.kind, made.scope) == ("elementwise", "move", "f/while/tanh")
    assert by["less"].times == 11
    assert {one.name for one in found} == {"product", "next", "made", "kept", "less"}
    (again, *_) = [one for one in kernels.together([*found, *found]) if one.name == "made"]
    assert again.times == 20


def test_trips_that_are_noted_or_unknown() -> None:
    noted = TEXT.replace('metadata={op_name="f"}', 'backend_config={"known_trip_count":{"n":"7"}}')
    (loop,) = kernels.kernels(hlo.read(noted))[1]
    assert (loop.trips, loop.known) == (7, True)
    unknown = TEXT.replace("%end = s32[] constant(10)", "%end = s32[] get-tuple-element(%arg.1), index=0")
    (loop,) = kernels.kernels(hlo.read(unknown))[1]
    assert (loop.trips, loop.known) == (kernels.UNKNOWN_TRIPS, False)


def test_not_a_program() -> None:
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.read("HloModule empty")


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("f32[64,32]{1,0}", 4 * 64 * 32),
        ("pred[]", 1),
        ("bf16[3,5]{1,0:T(8,128)(2,1)}", 2 * 8 * 128),
        ("f32[3,5]{0,1:T(8,128)}", 4 * 8 * 128),
        ("f32[130,9,3]{2,0,1:T(8,128)S(1)}", 4 * 9 * 136 * 128),
        ("f32[64]{0:T(128)}", 4 * 128),
        ("s4[10]{0:E(4)}", 5),
        ("f8e4m3fn[16]", 16),
    ],
)
def test_bytes_with_padding(text: str, nbytes: int) -> None:
    (one,) = hlo.arrays(text)
    assert one.nbytes == nbytes
    assert one.space == ("S(1)" in text)


def f(weights: Any, x: Any) -> Any:
    def body(x: Any, _: Any) -> Any:
        return jnp.tanh(x @ weights[0]), None

    for w in weights:
        x = jnp.tanh(x @ w)
    return jnp.sum(jax.lax.scan(body, x, None, length=9)[0])


def conv(x: Any, w: Any) -> Any:
    names = ("NHWC", "HWIO", "NHWC")
    return jnp.sum(jnp.tanh(jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=names)))


WEIGHTS = [jax.ShapeDtypeStruct((256, 256), jnp.float32)] * 3
X = jax.ShapeDtypeStruct((128, 256), jnp.float32)
CONV = jax.ShapeDtypeStruct((8, 16, 16, 32), jnp.float32), jax.ShapeDtypeStruct((3, 3, 32, 64), jnp.float32)
STEP = jax.value_and_grad(f)


def products(compiled: targets.Compiled) -> float:
    kinds = ("tf32", "half")
    return sum(one.times * count for one in compiled.kernels for kind, count in one.flop if kind in kinds)


def check(target: str | None) -> targets.Compiled:
    """Products are counted to the last one, loops by their trips, and convolutions with both gradients."""
    compiled = targets.compile(STEP, WEIGHTS, X, target=target, cached=False)
    one = 2 * 128 * 256 * 256
    # 12 forward, as many for weights, all but the first for inputs.
    assert products(compiled) == pytest.approx((12 + 12 + 11) * one, rel=1e-6)
    assert [loop.trips for loop in compiled.loops] == [9, 9]
    assert all(loop.known for loop in compiled.loops)
    assert compiled.temporary_bytes == compiled.executable.memory_analysis().temp_size_in_bytes
    gradients = targets.compile(jax.grad(conv, (0, 1)), *CONV, target=target, cached=False)
    assert products(gradients) == pytest.approx(3 * 2 * 8 * 16 * 16 * 64 * 9 * 32, rel=1e-6)
    assert sum(k.times for k in gradients.kernels if k.kind == "convolution") == 3
    return compiled


def test_the_attached_device(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = check(None)
    here = targets.attached()
    assert (here.attached, here.platform) == (True, jax.default_backend())
    assert compiled.target == here.name
    if here.device is None:
        with pytest.raises(mw.ArgumentError, match="rates"):
            _ = compiled.modelled_ns
    assert "temporaries" in str(compiled)


def traffic_at_least(compiled: targets.Compiled) -> None:
    """No program moves less than its arguments once and its results once."""
    assert compiled.moved_bytes >= compiled.argument_bytes + compiled.output_bytes - 1024


@GPU
@pytest.mark.parametrize("name", ["h200", "a100", "b200", "rtx4090", "h100"])
def test_gpus(name: str) -> None:
    compiled = check(name)
    traffic_at_least(compiled)
    device = targets.DEVICES[name]
    shares = compiled.shares_ns
    assert compiled.modelled_ns == pytest.approx(sum(shares.values()), abs=1)
    assert shares["launches"] == pytest.approx(compiled.launches * device.launch_ns)
    by_hand = sum(
        k.times * max(device.arithmetic_ns(dict(k.flop)), device.traffic_ns(k.moved_bytes))
        for k in compiled.kernels
    )
    assert sum(shares.values()) - shares["launches"] == pytest.approx(by_hand)
    assert compiled.cycles == 0


@GPU
def test_a_gpu_by_its_figures() -> None:
    chip = mw.GpuChip(product="half", compute_capability=(9, 0), cores=66, l2_bytes=25 << 20, clock_hz=1.5e9)
    half = dataclasses.replace(targets.DEVICES["h200"], name="half", bytes_per_s=2.4e12, chip=chip)
    whole = targets.compile(STEP, WEIGHTS, X, target="h200")
    assert targets.compile(STEP, WEIGHTS, X, target=half).modelled_ns > whole.modelled_ns


@TPU
@pytest.mark.parametrize("name", ["v5e", "v5p", "v6e"])
def test_tpus(name: str) -> None:
    compiled = targets.compile(STEP, WEIGHTS, X, target=name, cached=False)
    assert [loop.trips for loop in compiled.loops] == [9, 9]
    chip = targets.DEVICES[name].chip
    assert isinstance(chip, mw.TpuChip)
    assert compiled.shares_ns["cycles"] == pytest.approx(1e9 * compiled.cycles / chip.clock_hz)
    assert compiled.modelled_ns >= compiled.shares_ns["cycles"]
    big = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
    product = targets.compile(jnp.matmul, big, big, target=name, cached=False)
    # The compiler's cycles are those of a product near the peak that the data sheet says.
    peak_ns = 1e9 * 2 * 4096**3 / targets.DEVICES[name].half_flop_per_s
    assert 1 <= product.modelled_ns / peak_ns < 1.6


@TPU
def test_a_tpus_memory() -> None:
    large = jax.ShapeDtypeStruct((1 << 15, 1 << 15), jnp.float32)
    with pytest.raises(mw.TargetMemoryError, match="v5e") as caught:
        targets.compile(
            lambda *a: [jnp.sort(x @ x, axis=0) for x in a], *[large] * 4, target="v5e", cached=False
        )
    assert (caught.value.needed_bytes or 0) > 16 << 30


@TPU
def test_storing_everything_on_a_tpu_is_backpropagation() -> None:
    """In time and in bytes: bits packed and unpacked, no layout forced, nothing kept from fusing."""

    def make(key: Any) -> mw.Chain:
        convolutions = [Conv2D.he(one, 64, 64, 1) for one in jax.random.split(key, 3)]
        return mw.Chain([layer for one in convolutions for layer in (one, MaxMin())])

    def loss(y: Any) -> Any:
        return jnp.mean(y**2)

    net, x = jax.eval_shape(make, jax.random.key(0)), jax.ShapeDtypeStruct((2048, 16, 16, 64), jnp.float32)
    profile = mw.estimate(net, x, device="v5e", compiled=False)
    schedule = mw.frontier(profile).at(1 << 34)
    assert {run.kind for run in schedule.runs} == {mw.RunKind.STORE}
    plain = targets.compile(jax.value_and_grad(lambda net, x: loss(net(x))), net, x, target="v5e")
    step = targets.compile(mw.value_and_grad(loss, schedule), net, x, target="v5e")
    assert step.temporary_bytes <= 1.02 * plain.temporary_bytes
    assert step.cycles <= 1.05 * plain.cycles  # packing


# -- what a program is written for


def test_programs_are_written_for_the_target() -> None:
    seen = []

    def ask(x: Any) -> Any:
        seen.append(platforms.platform())
        return x

    jitted = jax.jit(ask)
    jitted.lower(X)
    with platforms.lowering_for("gpu"):
        jitted.lower(X)  # traced again
    assert seen == [jax.default_backend(), "gpu"]
    assert mw.compiler_options("gpu") == {}


def test_what_depends_on_where_a_step_runs() -> None:
    gpu, tpu = targets.target_of("h200"), targets.target_of("v5e")
    assert (gpu.platform, gpu.product_bits, gpu.host_memory, gpu.pooled_memory) == ("gpu", 10, True, True)
    assert (tpu.platform, tpu.product_bits, tpu.padded_arrays) == ("tpu", 7, True)
    assert gpu.compiler_options == {}
    if (cpu := targets.attached()).platform == "cpu":
        assert cpu.compiler_options == mw.compiler_options("cpu")
        assert (cpu.host_memory, cpu.pooled_memory, cpu.product_bits) == (False, False, 23)


# -- bad input


def test_unknown_devices() -> None:
    with pytest.raises(mw.ArgumentError, match=r"h100, h200.*mw\.Device"):
        targets.compile(STEP, WEIGHTS, X, target="h300")
    with pytest.raises(mw.ArgumentError, match="chip"):
        targets.compile(STEP, WEIGHTS, X, target="laptop")
    with pytest.raises(mw.ArgumentError, match=r"8\.9"):
        mw.GpuChip(product="old", compute_capability=(3, 5), cores=10, l2_bytes=1, clock_hz=1e9)
    with pytest.raises(mw.ArgumentError, match="callable"):
        targets.compile(3, X)  # type: ignore[arg-type]
    with pytest.raises(mw.ArgumentError, match="no array"):
        targets.compile(lambda x: x, 3.0)


def test_a_compiler_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    plugins.place.cache_clear()
    for name, extra in (("h200", "mwplan[targets]"), ("v5e", "mwplan[tpu]")):
        assert not targets.installed(name)
        with pytest.raises(mw.CompilerMissingError) as caught:
            targets.compile(STEP, WEIGHTS, X, target=name)
        assert extra in str(caught.value)
    assert "JAX_PLATFORMS=cpu" in str(caught.value)


def test_versions_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "_installed", lambda name: True)
    monkeypatch.setattr(plugins, "_version", lambda name: "0.1.0")
    why = plugins.missing(targets.DEVICES["h200"])
    assert why is not None
    assert "jax-cuda12-plugin" in why
    assert "0.1.0" in why
    assert "pip install" in why


@GPU
def test_programs_that_only_a_cpu_runs() -> None:
    with pytest.raises(mw.TargetError, match=r"h200"):
        targets.compile(jax.scipy.linalg.schur, jax.ShapeDtypeStruct((8, 8), jnp.float32), target="h200")
    with pytest.raises(ZeroDivisionError):  # what is wrong with the program itself stays what it is
        targets.compile(lambda x: x / (1 // 0), X, target="h200")


# -- on disk


def test_results_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = targets.compile(STEP, WEIGHTS, X)
    assert first.executable is not None
    (file,) = cache.folder(program.KIND).rglob("*.json")
    monkeypatch.setattr(program, "built", lambda *args: pytest.fail("compiled again"))
    again = targets.compile(STEP, WEIGHTS, X)
    assert again.executable is None
    for name in ("temporary_bytes", "moved_bytes", "flop", "launches", "loops"):
        assert getattr(again, name) == getattr(first, name)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file.write_text(file.read_text()[:-40])  # what cannot be read is made again
    assert targets.compile(STEP, WEIGHTS, X).executable is not None
    assert targets.compile(STEP, WEIGHTS, X).executable is None
    assert targets.compile(STEP, [*WEIGHTS, *WEIGHTS], X).executable is not None
    assert targets.compile(STEP, WEIGHTS, X, cached=False).executable is not None
    assert not [path for path in cache.folder(program.KIND).rglob(".*") if path.is_file()]


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert targets.compile(STEP, WEIGHTS, X).executable is not None


def test_keys_tell_texts_apart() -> None:
    assert cache.key("ab", "c") != cache.key("a", "bc")


def test_arrays_are_written_as_types() -> None:
    assert str(Array("f32", (2, 3))) == "f32[2,3]"
