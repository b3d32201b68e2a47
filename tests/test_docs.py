"""The Markdown of the repository and its site: line length, links, the navigation, the reference, and
versions that are stated twice. MkDocs is not needed."""

from __future__ import annotations

import re
import runpy
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import mwplan as mw

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


HOOKS = runpy.run_path(str(ROOT / "docs" / "_tools" / "hooks.py"))
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def in_nav(entry: Any) -> Iterator[str]:
    """The sources that the site's navigation names."""
    if isinstance(entry, str):
        yield entry
    for inner in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
        yield from in_nav(inner)


def sources() -> dict[str, Path]:
    """All files of the site by the name that MkDocs knows them by."""
    inside = [path for path in (ROOT / "docs").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    return {HOOKS["place"](path): path for path in (*inside, *HOOKS["outside"]())}


def linked(path: Path) -> list[Path]:
    """The files that a page links to."""
    found: list[Path] = []
    HOOKS["rewrite_links"](path.read_text(), path, lambda to: str(found.append(to)))
    return found


def test_every_page_is_in_the_navigation_once() -> None:
    pages = {
        name
        for name in sources()
        if name.endswith(".md") or (name.startswith("tutorials/") and name[-3:] == ".py")
    }
    named = list(in_nav(SITE["nav"]))
    assert len(named) == len(set(named))
    assert set(named) == pages


def test_links_of_the_site_lead_to_its_files() -> None:
    """Also those of files that lie outside of docs/."""
    known = {path.resolve() for path in sources().values()}
    for name, path in sources().items():
        if name.endswith(".md"):
            lost = [to for to in linked(path) if to.resolve() not in known]
            assert not lost, f"{path.relative_to(ROOT)} links to what the site does not have: {lost}"


def test_links_are_rewritten_for_the_site() -> None:
    def link(to: Path) -> str:
        return str(HOOKS["place"](to))

    text = "[a](../results/README.md#demo) [b](https://x.org/y) [c](#here) ![d](../README.md)\n"
    wanted = "[a](results/README.md#demo) [b](https://x.org/y) [c](#here) ![d](index.md)\n"
    assert HOOKS["rewrite_links"](text, ROOT / "docs" / "faq.md", link) == wanted
    code = "```\n[a](../b.md)\n```\n"
    assert HOOKS["rewrite_links"](code, ROOT / "docs" / "faq.md", link) == code


def test_every_public_name_is_in_the_reference_once() -> None:
    spaces = {
        "layers": mw.layers.__all__,
        "targets": mw.targets.__all__,
        "adapters.flax": mw.adapters.flax.__all__,
    }
    public = {f"mwplan.{name}" for name in mw.__all__ if name not in ("adapters", "layers", "targets")}
    public |= {f"mwplan.{space}.{name}" for space, names in spaces.items() for name in names}
    # Described among the profiles, from where they are handed on.
    public -= {f"mwplan.targets.{name}" for name in ("Device", "GpuChip", "TpuChip")}
    text = "\n".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    named = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    assert len(named) == len(set(named))
    assert set(named) == public


def test_figures_of_results_stand_with_their_command() -> None:
    """The gallery shows every figure, and names the experiment that drew it, or `make demo`."""
    gallery = (ROOT / "docs" / "gallery.md").read_text()
    for path in (ROOT / "results").rglob("*.png"):
        name = path.relative_to(ROOT).as_posix()
        assert f"](../{name})" in gallery, f"docs/gallery.md does not show {name}"
        command = "make demo" if path.parent.name == "demo" else f"python -m experiments.{path.parent.name}"
        after = gallery[gallery.index(f"](../{name})") :].split("\n## ")[0]
        assert command in after, f"docs/gallery.md does not say how {name} was made"


def test_ruff_has_one_version() -> None:
    """That of pre-commit is that of `make lint`."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (pinned,) = (one.removeprefix("ruff==") for one in extras["dev"] if one.startswith("ruff=="))
    assert f"rev: v{pinned}\n" in (ROOT / ".pre-commit-config.yaml").read_text()


def test_the_version_is_one() -> None:
    """That of the package, its metadata, its citation and the last release among the changes."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    releases = re.findall(r"^## (\d\S*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert project["version"] == citation["version"] == mw.__version__ == releases[0]


def test_the_paper_cites_what_it_lists() -> None:
    cited = set(re.findall(r"@([a-z]+\d{4}\w*)", (ROOT / "paper" / "paper.md").read_text()))
    listed = set(re.findall(r"^@\w+\{([^,]+),", (ROOT / "paper" / "paper.bib").read_text(), re.MULTILINE))
    assert cited == listed


def test_modules_named_in_contributing_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for name in re.findall(r"`((?:mwplan|solvers|tests|experiments|docs)/[a-z0-9_./]+\.(?:py|md))[`:]", text):
        assert (ROOT / name).exists(), f"CONTRIBUTING.md names {name}, which does not exist"
