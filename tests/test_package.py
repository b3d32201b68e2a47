"""What is installed: names, lazy imports, and a wheel that works away from the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import mwplan as mw

ROOT = Path(__file__).parent.parent


def test_all_lists_the_public_names() -> None:
    public = {n for n, v in vars(mw).items() if not n.startswith("_") and not isinstance(v, types.ModuleType)}
    assert sorted(public | {"adapters", "layers", "targets"}) == mw.__all__


def test_import_loads_neither_solvers_nor_plots() -> None:
    heavy = ("ortools", "pandas", "matplotlib", "optax", "flax", "equinox")
    code = f"import mwplan, sys; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_solvers_do_not_load_jax() -> None:
    loaded = "[m for m in sys.modules if m == 'jax' or m.startswith('jax.')]"
    # The parent package imports JAX; the solvers' own modules must not, so they are loaded without it.
    code = f"""
import sys, types, pathlib
package = types.ModuleType("mwplan"); package.__path__ = [str(pathlib.Path("mwplan").absolute())]
sys.modules["mwplan"] = package
import mwplan.solvers.frontier, mwplan.solvers.integer_program, mwplan.plans.ledger
print({loaded})
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_wheel_imports_away_from_the_checkout(tmp_path: Path) -> None:
    # setuptools leaves build/ beside the sources: build from a copy of them
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("mwplan", "solvers"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path),
        str(source),
    ]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(site)
    assert "mwplan/solvers/frontier.py" in names
    assert "mwplan/py.typed" in names
    code = (
        "import mwplan, mwplan.solvers.integer_program, mwplan.layers, mwplan.adapters;"
        "from mwplan.solvers.frontier import solve_frontier; print(mwplan.__file__)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(site)},
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip().startswith(str(site))
