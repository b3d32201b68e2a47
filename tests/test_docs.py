"""The Markdown of the repository: line length, links, and versions that are stated twice."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "results/**/*.md")
    for path in ROOT.glob(pattern)
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
)
LENGTH = 110


def prose(text: str) -> Iterator[tuple[int, str]]:
    """Numbered lines but those of code blocks, formulas and tables; links count by their text, images not at
    all."""
    fenced = False
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and not line.lstrip().startswith("|") and not re.fullmatch(r"\s*`[^`]*`\S?", line):
            line = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", line)
            yield number, re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", line)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_is_wrapped(page: Path) -> None:
    long = {number: len(line) for number, line in prose(page.read_text()) if len(line) > LENGTH}
    assert not long, f"{page.relative_to(ROOT)}: lines of more than {LENGTH} characters: {long}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http", "mailto")):
            name, _, anchor = target.partition("#")
            to = page.parent / name if name else page
            assert to.exists(), f"{page.relative_to(ROOT)}: `{target}` does not exist"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", to.read_text(), re.MULTILINE)
                anchors = [re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings]
                assert anchor in anchors, f"{page.relative_to(ROOT)}: `{target}` has no such heading"


def test_ruff_has_one_version() -> None:
    """That of pre-commit is that of `make lint`."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (pinned,) = (one.removeprefix("ruff==") for one in extras["dev"] if one.startswith("ruff=="))
    assert f"rev: v{pinned}\n" in (ROOT / ".pre-commit-config.yaml").read_text()


def test_modules_named_in_contributing_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for name in re.findall(r"`((?:mwplan|solvers|tests|experiments|docs)/[a-z0-9_./]+\.(?:py|md))[`:]", text):
        assert (ROOT / name).exists(), f"CONTRIBUTING.md names {name}, which does not exist"
