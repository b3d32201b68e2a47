"""XLA's compilers for devices that are not here: which are installed, and how they are started.

A GPU's compiler comes with JAX's CUDA plugin, a TPU's with `libtpu`; neither needs a device, a driver, cuDNN
or cuBLAS. Processes run on the CPU all the while: `JAX_PLATFORMS=cpu` in the environment tells JAX not to
look for devices. Without it the CUDA plugin says at length that it found none (it is told not to where this
module is the first to start JAX)."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

import jax

from mwplan.common.errors import CompilerMissingError
from mwplan.targets.devices import Device, GpuChip, TpuChip

_CUDA = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
_INSTALL_GPU = "pip install 'mwplan[targets]'"
_INSTALL_TPU = "pip install 'mwplan[tpu]'` in an environment of its own, and set `JAX_PLATFORMS=cpu"


def missing(device: Device) -> str | None:
    """Why nothing can be compiled for `device` here, and what to do about it; None where everything is."""
    if isinstance(device.chip, GpuChip):
        return _missing_gpu()
    if isinstance(device.chip, TpuChip):
        return _missing_tpu()
    return (
        f"nothing is known of the chip of `Device({device.name!r})`: give its `chip`, a `mw.GpuChip(...)` or "
        "a `mw.TpuChip(...)`, or attach the device"
    )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _missing_gpu() -> str | None:
    plugin = next((name for name in _CUDA if _installed(name)), None)
    if plugin is None:
        return f"XLA's compiler for NVIDIA GPUs is not installed: `{_INSTALL_GPU}`"
    package = f"jax-{plugin.removeprefix('jax_plugins.xla_')}-plugin"
    ours, theirs = importlib.metadata.version("jaxlib"), _version(package)
    if theirs and _release(theirs) != _release(ours):
        return (
            f"{package} is of version {theirs} and jaxlib of {ours}: they must be the same, "
            f"`pip install {package}=={ours} {package.replace('plugin', 'pjrt')}=={ours}`"
        )
    return None


def _missing_tpu() -> str | None:
    if not _installed("libtpu"):
        return f"XLA's compiler for TPUs is not installed: `{_INSTALL_TPU}`"
    if "cpu" not in str(getattr(jax.config, "jax_platforms", "") or "").split(",") and not _started():
        return (
            "libtpu is installed, and without a TPU it may end the process that looks for one: set "
            "`JAX_PLATFORMS=cpu` in the environment before Python starts"
        )
    return None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _release(version: str) -> str:
    return re.split(r"[^0-9.]", version)[0].strip(".")


def _started() -> bool:
    from jax._src import xla_bridge

    return xla_bridge.backends_are_initialized()


@functools.cache
def place(device: Device) -> Any:
    """A `jax.Device` of the kind of `device`, which programs can be compiled for, and nothing else.

    **Raises:** `CompilerMissingError` where its compiler is not installed or does not start; the message says
    what to do."""
    why = missing(device)
    if why is not None:
        raise CompilerMissingError(f"cannot compile for {device.name}: {why}")
    try:
        if isinstance(device.chip, TpuChip):
            from jax.experimental import topologies

            topology = topologies.get_topology_desc(platform="tpu", topology_name=device.chip.topology)
            return topology.devices[0]
        assert isinstance(device.chip, GpuChip)
        return _gpu(device.chip.config(device.bytes_per_s, device.memory_bytes))
    except CompilerMissingError:
        raise
    except Exception as error:  # whatever a plugin raises
        raise CompilerMissingError(
            f"cannot compile for {device.name}: it does not start "
            f"({type(error).__name__}: {_first(error)}). Versions: {version(device)}; with the CUDA plugin "
            "they must be equal, and JAX's own `[tpu]` extra says which libtpu it wants"
        ) from error


def _gpu(config: str) -> Any:
    from jax._src import xla_bridge

    with _quiet():
        xla_bridge.backends()  # the plugin registers itself once, at the first look
        if "cuda" not in xla_bridge._topology_factories:  # it looked for a GPU, and gave up
            name = next(name for name in _CUDA if _installed(name))
            importlib.import_module(name).initialize()
        topology = xla_bridge.make_pjrt_topology("cuda", "", target_config=config, topology="1x1x1")
    return topology._make_compile_only_devices()[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the plugin's words about GPUs that are not there."""
    logger = logging.getLogger("jax._src.xla_bridge")
    level = logger.level
    names = {"TF_CPP_MIN_LOG_LEVEL": "2", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    before = {name: os.environ.get(name) for name in names}
    if not os.path.exists("/dev/nvidia0"):
        logger.setLevel(logging.CRITICAL)
        os.environ.update({name: value for name, value in names.items() if before[name] is None})
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


def _first(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:300]


def version(device: Device | None) -> str:
    """The versions of what compiles for `device` (None: for what is attached)."""
    parts = [f"jax {jax.__version__}", f"jaxlib {importlib.metadata.version('jaxlib')}"]
    chip = device.chip if device is not None else None
    names = (
        ("libtpu",)
        if isinstance(chip, TpuChip)
        else ("jax-cuda12-plugin", "jax-cuda13-plugin")
        if chip
        else ()
    )
    parts += [f"{name} {_version(name)}" for name in names if _version(name)]
    return ", ".join(parts)
