"""README's Python, block by block as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.slow
def test_the_code_runs_and_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    """In one namespace, as a reader would. Every line printed begins as one in README does; the figures
    differ from machine to machine."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
    namespace: dict[str, object] = {"__name__": "readme"}
    ran = 0
    for (kind, code), (after, shown) in zip(blocks, [*blocks[1:], ("python", "")]):
        if kind != "python":
            continue
        exec(compile(code, str(README), "exec"), namespace)
        ran += 1
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
    assert ran == 4
