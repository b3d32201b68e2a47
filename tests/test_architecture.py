"""The house: wings whose imports run one way, no circles, files and functions of a size that one can read."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent

#: From the ground up: a wing imports none that comes after it.
WINGS = (
    "common", "plans", "report", "network", "layers", "adapters", "compilers", "solvers", "targets",
    "execution", "profiling", "planning", "fitting", "functions", "app",
)  # fmt: skip
LEVELS, LINES, FUNCTION_LINES = 8, 500, 80


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of the package by its name; not its own `__init__`, which hands on names."""
    found = {}
    for path in sorted((ROOT / "mwplan").rglob("*.py")) + sorted((ROOT / "solvers").glob("*.py")):
        top = ROOT / "mwplan" if (ROOT / "mwplan") in path.parents else ROOT
        parts = path.relative_to(top).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if name:
            found[name] = path
    return found


def imported(path: Path) -> Iterator[str]:
    """The modules of the package that one imports, anywhere in it: also in functions, and for types alone."""
    known = modules()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mwplan"):
            base = (node.module or "").removeprefix("mwplan").removeprefix(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".strip(".")
                yield inner if inner in known else base
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("mwplan."):
                    yield alias.name.removeprefix("mwplan.")


def levels(arrows: dict[str, set[str]]) -> dict[str, int]:
    """The level of each: 1 where it imports nothing, else one above the highest that it imports."""
    found: dict[str, int] = {}

    def level(name: str, under: tuple[str, ...] = ()) -> int:
        assert name not in under, f"a circle of imports: {' -> '.join((*under[under.index(name) :], name))}"
        if name not in found:
            found[name] = 1 + max((level(to, (*under, name)) for to in sorted(arrows[name])), default=0)
        return found[name]

    for name in arrows:
        level(name)
    return found


def test_imports_run_one_way() -> None:
    between: dict[str, set[str]] = {wing: set() for wing in WINGS}
    within: dict[str, set[str]] = {name: set() for name in modules()}
    for name, path in modules().items():
        wing = name.split(".")[0]
        assert wing in WINGS, (
            f"{path} stands in no wing: add its folder to `WINGS`, above all that it imports"
        )
        for to in imported(path):
            if to and to != name and not name.startswith(f"{to}."):
                within[name].add(to)
                if (other := to.split(".")[0]) != wing:
                    between[wing].add(other)
                    assert WINGS.index(other) < WINGS.index(wing), f"{path} imports {to}, from a wing above"
    of_wings, of_modules = levels(between), levels(within)
    for wing in WINGS:
        print(
            f"level {of_wings[wing]}: {wing} imports {', '.join(sorted(between[wing])) or 'nothing of ours'}"
        )
    print(f"wings on {max(of_wings.values())} levels; longest path of modules {max(of_modules.values())}")
    assert max(of_wings.values()) <= LEVELS


def sources() -> list[Path]:
    """Every Python file of the repository, once."""
    return [
        path
        for top in ("mwplan", "solvers", "experiments", "tests")
        for path in (ROOT / top).rglob("*.py")
        if (ROOT / "mwplan" / "solvers") not in path.parents
    ]


def test_files_and_functions_are_short() -> None:
    files = {path: path.read_text().count("\n") for path in sources()}
    functions = {
        f"{path.relative_to(ROOT)}: {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    largest, longest = max(files, key=files.__getitem__), max(functions, key=functions.__getitem__)
    print(f"the largest file: {largest.relative_to(ROOT)}, {files[largest]} lines")
    print(f"the longest function: {longest}, {functions[longest]} lines")
    print(
        f"lines of the package and its solvers: {sum(n for p, n in files.items() if 'tests' not in p.parts)}"
    )
    assert not {str(path.relative_to(ROOT)): n for path, n in files.items() if n > LINES}
    assert not {name: n for name, n in functions.items() if n > FUNCTION_LINES}
