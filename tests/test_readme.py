"""The Python of README and of the documentation's pages, block by block as it stands there."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from mwplan import targets

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
#: Pages whose examples are of a size that takes minutes.
SLOW = {"README.md", "docs/functions.md", "docs/getting-started.md", "docs/networks.md"}
WORDS = 900
#: Tutorials that measure layers, or their errors, of many kinds.
SLOW_TUTORIALS = {"beyond_recomputation", "transformer"}
TUTORIALS = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in SLOW_TUTORIALS else [])
    for path in sorted((ROOT / "docs" / "tutorials").glob("*.py"))
]


#: Every page with Python in it.
PAGES = [
    pytest.param(path, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
    for path in (README, *sorted((ROOT / "docs").rglob("*.md")))
    if "```python" in path.read_text() and (name := path.relative_to(ROOT).as_posix())
]


@pytest.mark.parametrize("page", PAGES)
def test_the_code_runs_and_prints_what_it_says(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one namespace, as a reader would. Every line printed begins as one on the page does; the figures
    differ from machine to machine."""
    blocks = BLOCK.findall(page.read_text())
    namespace: dict[str, object] = {"__name__": "page"}
    for (kind, code), (after, shown) in zip(blocks, [*blocks[1:], ("python", "")]):
        if kind != "python":
            continue
        exec(compile(code, str(page), "exec", dont_inherit=True), namespace)
        printed = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
        assert bool(printed) == (after == "")  # what is printed is shown after it
        said = {line.split()[0] for line in shown.splitlines() if line.strip()}
        # The plan's letters may be others, and so may what a note on top of the plan says.
        new = [
            line
            for line in printed
            if line.split()[0] not in said | {"fragmentation", "more"} and "|" not in line
        ]
        assert not new, new


@pytest.mark.parametrize("tutorial", TUTORIALS)
def test_tutorials_run(tutorial: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As plain Python: the site's notebooks are made of the same files."""
    runpy.run_path(str(tutorial), run_name="tutorial")
    printed = capsys.readouterr().out
    assert printed.strip()
    if tutorial.stem == "devices_elsewhere" and not targets.installed("h200"):
        assert "skipped: no compiler for h200" in printed  # skips are seen


def test_the_readme_is_short() -> None:
    """Words outside of blocks of code."""
    words = len(BLOCK.sub("", README.read_text()).split())
    assert words <= WORDS, f"README.md has {words} words: move what a newcomer can do without to docs/"
