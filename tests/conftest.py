"""What every test of the suite runs under."""

from __future__ import annotations

import os
import shutil
import tempfile

import jax
import pytest
from jaxtyping import install_import_hook

import tests.shapes

# Before anything imports the package: its array annotations are checked at each call.
install_import_hook("mwplan", f"{tests.shapes.__name__}.checked")

if shutil.which("nvidia-smi") is None:
    # Most of the suite's time is compilation. LLVM's part takes half as long without optimisations; what XLA
    # makes of a program, its buffers too, stays the same. The older emitters of fused loops, which JAX 0.10
    # still has, take half as long again: of 1,294 programs of test_stack, test_planning and test_fitting,
    # 1,284 have the same bytes of temporaries with both, and the others differ by 8 to 384 bytes.
    flags = ["--xla_backend_optimization_level=0"]
    if jax.__version_info__ < (0, 11):
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()


# What is kept on disk is the tests' own, and gone with them: figures of earlier runs would hide changes.
_CACHE = tempfile.TemporaryDirectory(prefix="mwplan-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name


@pytest.fixture(scope="session", autouse=True)
def _whole_float32() -> None:
    """Where there is a GPU: products of float32 operands as they are. JAX's default there has ten bits, and
    the tests compare digits.

    Asked for once tests run: whoever starts JAX's CPU client while they are collected forestalls
    `experiments.zoo`.
    """
    if jax.default_backend() != "cpu":
        jax.config.update("jax_default_matmul_precision", "highest")
