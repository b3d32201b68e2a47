"""What `mkdocs build` does beside its own work: files from outside `docs/`, their links, formulas as MathML.

The site holds Markdown and figures that lie where the repository needs them (README, `results/`). They are
read in place. A link is written as it works in the repository, and is rewritten here for the site. Nothing
but the two functions at the end needs MkDocs, so that the tests can use the rest without it.
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
#: What the site takes from outside `docs/`.
OUTSIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "LICENSE")
#: A link or an image of Markdown: its text, and where it leads.
LINK = re.compile(r"(!?\[(?:[^\]\[]|\[[^\]]*\])*\])\(([^)\s]+)\)")
#: Blocks of code, in which nothing is a link.
CODE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)


def outside() -> Iterator[Path]:
    """The files that the site takes from outside `docs/`."""
    yield from (ROOT / name for name in OUTSIDE)
    for pattern in ("**/*.md", "**/*.png"):
        yield from sorted((ROOT / "results").glob(pattern))


def place(path: Path) -> str:
    """Where on the site a file of the repository lies, as MkDocs names its sources."""
    name = path.relative_to(ROOT).as_posix()
    if name == "README.md":
        return "index.md"
    return name.removeprefix("docs/")


def rewrite_links(text: str, path: Path, link: Callable[[Path], str]) -> str:
    """`text` of the file at `path`, with `link` of the file in place of each link to one."""

    def one(found: re.Match[str]) -> str:
        target, _, anchor = found[2].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return found[0]
        to = Path(os.path.normpath(path.parent / target))
        return f"{found[1]}({link(to)}{'#' + anchor if anchor else ''})"

    parts = CODE.split(text)
    return "".join(part if at % 2 else LINK.sub(one, part) for at, part in enumerate(parts))


#: Formulas that `pymdownx.arithmatex` has marked.
MARKED = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">(?P<open>\\\(|\\\[)(?P<tex>.*?)(?:\\\)|\\\])</(?P=tag)>',
    re.DOTALL,
)
#: Formulas as notebooks leave them.
DOLLARS = re.compile(r"(?P<open>\$\$?)(?P<tex>[^$]+)(?P=open)")
#: HTML in which no formulas are.
VERBATIM = re.compile(r"(<(?P<tag>pre|code|style|script|svg)\b.*?</(?P=tag)>)", re.DOTALL)


def mathml(content: str, *, notebook: bool = False) -> str:
    """HTML with its formulas as MathML, which browsers draw themselves: no script, and nothing from another
    site."""
    from latex2mathml.converter import convert

    def one(found: re.Match[str]) -> str:
        shown = found["open"] in ("$$", r"\[")
        made: str = convert(html.unescape(found["tex"]).strip(), display="block" if shown else "inline")
        return f"<div class='formula'>{made}</div>" if shown else made

    if not notebook:
        return MARKED.sub(one, content)
    at, out = 0, []
    for kept in VERBATIM.finditer(content):
        out += [DOLLARS.sub(one, content[at : kept.start()]), kept[0]]
        at = kept.end()
    return "".join([*out, DOLLARS.sub(one, content[at:])])


def on_files(files: Any, config: Any) -> Any:
    """Adds what lies outside `docs/`."""
    from mkdocs.structure.files import File

    for path in outside():
        files.append(File.generated(config, place(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links as the site has them. What they do not lead to, MkDocs reports."""
    path = Path(page.file.abs_src_path)
    here = Path("/") / page.file.src_uri
    return rewrite_links(
        markdown, path, lambda to: os.path.relpath(Path("/") / place(to), here.parent).replace(os.sep, "/")
    )


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Formulas as MathML."""
    return mathml(html, notebook=page.file.src_uri.endswith(".py"))
