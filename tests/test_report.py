"""The page that one looks at: its figures, what is in the file, and the page itself in a browser."""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import mwplan as mw
from mwplan import planning
from mwplan.common.sizes import show_bytes
from mwplan.fitting.remote import RemoteFit
from mwplan.plans.holdings import Kind
from mwplan.plans.ledger import moments, replay
from mwplan.plans.schedule import LETTERS, RunKind, walk
from mwplan.report import content, page
from mwplan.report.content import CompiledPeak, Subject
from tests.chains import random_profile

#: Its frontier has schedules of several strategies.
PROFILE = random_profile(random.Random(3), 6)


def subject(**changes: Any) -> Subject:
    frontier = planning.frontier(PROFILE)
    plans = tuple(frontier.at(total) for total, _ in frontier.points)
    given = {"profile": PROFILE, "points": frontier.points, "schedules": plans, "chosen": 0}
    return Subject(**{**given, **changes})


def figures(text: str) -> dict[str, Any]:
    """What the page's script reads."""
    found = re.search(r'<script type="application/json" id="content">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    read: dict[str, Any] = json.loads(found[1])
    return read


@pytest.mark.parametrize("seed", range(12))
def test_what_is_alive_adds_up_to_what_the_ledger_says(seed: int) -> None:
    profile = random_profile(random.Random(seed), 5)
    frontier = planning.frontier(profile)
    for total, _ in frontier.points:
        runs = frontier.at(total).runs
        found, alive = replay(profile, runs), moments(profile, runs)
        assert [sum(moment.sizes) for moment in alive] == [event.live_bytes for event in found.events]
        assert min(size for moment in alive for size in moment.sizes) >= 0
        at = found.events.index(found.binding)
        listed = alive[at].holdings
        # What is saved lies where workspace was, or the inputs that the operation reads last.
        workspace = sum(one.nbytes for one in listed if one.kind is Kind.WORKSPACE)
        assert workspace == max(0, found.binding.workspace_bytes - found.binding.saving_bytes)
        rest = sum(one.nbytes for one in listed) - workspace
        assert rest == found.peak_bytes - found.binding.workspace_bytes + found.binding.saving_bytes
        assert [one.nbytes for one in listed] == sorted((one.nbytes for one in listed), reverse=True)


def test_every_plan_is_the_schedule_that_was_solved() -> None:
    one = subject()
    shown = content.content(one)
    assert len({plan["letters"] for plan in shown["plans"]}) > 2
    for plan, schedule in zip(shown["plans"], one.schedules, strict=True):
        assert plan["letters"] == "".join(LETTERS[s] for s in schedule.strategies)
        assert [lane[0][0] for lane in plan["lanes"]] == list(plan["letters"])
        assert (plan["ns"], plan["total"]) == (schedule.time_ns, schedule.total_bytes)
        events, at = plan["events"], plan["events"]["peak"]
        assert sum(events["sizes"][at]) == plan["peak"]["bytes"] == max(map(sum, events["sizes"]))
        assert events["where"][at] == plan["peak"]["where"]
        nested = max(len(lane) for lane in plan["lanes"])
        assert (nested > 1) == any(run.kind is RunKind.RECOMPUTE for run in walk(schedule.runs))


def test_long_steps_are_drawn_by_the_most_that_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "MOST_EVENTS", 5)
    one = subject()
    for plan in content.content(one)["plans"]:
        events = plan["events"]
        assert len(events["shown"]) <= 5 < events["of"]
        assert sum(events["sizes"][events["peak"]]) == plan["peak"]["bytes"]


@pytest.mark.parametrize("plans", [1, 2, 7, 100])
def test_the_frontier_chooses_plans_over_all_budgets(plans: int, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Subject] = []
    monkeypatch.setattr(page, "check_target", lambda to: Path(to))
    monkeypatch.setattr(page, "write", lambda to, one: written.append(one))
    frontier = planning.frontier(PROFILE)
    mine = frontier.at((frontier.points[0][0] + frontier.points[-1][0]) // 2)
    frontier.report("plan.html", mine, plans=plans)
    frontier.report("plan.html", plans=plans)
    for one in written:
        budgets = [schedule.budget_bytes or 0 for schedule in one.schedules]
        assert budgets == sorted(set(budgets))
        assert len(one.schedules) <= plans + 1
        assert {(s.total_bytes, s.time_ns) for s in one.schedules} <= {*frontier.points}
        assert one.recomputation == planning.frontier(PROFILE, allowed=planning.RECOMPUTATION).points
    assert written[0].schedules[written[0].chosen] == mine
    if plans == 100:
        assert len(written[1].schedules) == len(frontier.points)


def test_a_schedule_of_another_profile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "plotly", lambda: "")
    other = planning.frontier(random_profile(random.Random(5), 5))
    with pytest.raises(mw.ScheduleMismatchError):
        planning.frontier(PROFILE).report(tmp_path / "p.html", other.at(other.points[0][0]))
    assert not list(tmp_path.iterdir())


def test_a_plan_for_another_device_is_shown_with_what_its_compiler_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "plotly", lambda: "")
    schedule = planning.frontier(PROFILE).at(planning.frontier(PROFILE).points[1][0])
    fit = RemoteFit(
        target="h200", compiler="jax 1", schedule=schedule, arrangement=0, fixed_bytes=1, temporary_bytes=77,
        modelled_ns=1, bounds=(), plain_bytes=None, plain_ns=None, attempts=(),
    )  # fmt: skip
    shown = figures(fit.report(tmp_path / "plan.html", PROFILE, plans=3).read_text())
    assert shown["compiled"]["temporary_bytes"] == 77
    assert "h200" in shown["compiled"]["by"]
    assert shown["plans"][shown["chosen"]]["ns"] == schedule.time_ns


class Links(HTMLParser):
    """Whatever a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [v or "" for k, v in attrs if k in ("src", "href", "data", "action", "poster")]


def test_a_page_needs_nothing_else_and_names_break_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "plotly", lambda: "/* plotly */")
    title = "</script><b>$content & co.</b>"
    text = page.page(subject(title=title))
    assert figures(text)["title"] == title
    links = Links()
    links.feed(text)
    assert links.found == ["data:,"]
    assert "default-src 'none'" in text
    assert "<b>" not in text.split("<script")[0]


def test_a_page_is_refused_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frontier = planning.frontier(PROFILE)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(mw.MwplanError, match=r"pip install \"mwplan\[report\]\""):
        frontier.report(tmp_path / "plan.html")
    for to, complaint in (
        (tmp_path / "plan.png", "HTML"), (tmp_path / "no" / "plan.html", "does not exist"),
    ):  # fmt: skip
        with pytest.raises(mw.ArgumentError, match=complaint):
            frontier.report(to)
    monkeypatch.setattr(page, "plotly", lambda: "")
    with pytest.raises(mw.ArgumentError, match="plans"):
        frontier.report(tmp_path / "plan.html", plans=0)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window. What is missing for it is said by the skip."""
    selenium = pytest.importorskip("selenium.webdriver", reason="no selenium: pip install selenium")
    pytest.importorskip("plotly", reason="no plotly: pip install plotly")
    found = [
        next(filter(None, map(shutil.which, names)), None)
        for names in (("chromium", "chromium-browser", "google-chrome"), ("chromedriver",))
    ]
    if None in found:
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    options = selenium.ChromeOptions()
    options.binary_location = found[0]
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(found[1]))
    yield driver
    driver.quit()


def shown(browser: Any) -> dict[str, Any]:
    """What the page shows, read off its elements."""
    script = """
    const text = id => document.getElementById(id).textContent;
    const memory = document.getElementById("memory").data;
    return {
      ready: document.body.dataset.ready,
      budget: text("size"), strip: [...document.querySelectorAll("#strip .cell b:first-of-type")]
        .map(b => b.textContent).join(""),
      peak: text("where"), words: text("words"), compiled: text("compiled"),
      most: Math.max(...memory[0].x.map((_, i) => memory.filter(t => t.stackgroup)
        .reduce((sum, t) => sum + t.y[i], 0))) * 2 ** 20,
      marker: document.getElementById("frontier").data.at(-1).x[0] * 2 ** 20,
      drawn: [...document.querySelectorAll(".chart .main-svg")].length,
    };"""
    found: dict[str, Any] = browser.execute_script(script)
    return found


def test_dragging_the_budget_changes_the_plan(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    one = subject(
        compiled=CompiledPeak(temporary_bytes=12345, by="a test", alive=(("cotangent", 99),)),
        measured=(("", "plan"), ("loss", "0.1")),
        backpropagation=subject().points[-1],
        recomputation=planning.frontier(PROFILE, allowed=planning.RECOMPUTATION).points,
    )
    file = page.write(tmp_path / "plan.html", one)
    expected = content.content(one)["plans"]
    browser.get(file.as_uri())
    budget = browser.find_element(By.ID, "budget")
    assert shown(browser)["ready"] == "yes"
    assert show_bytes(one.profile.fixed_bytes + 12345) in shown(browser)["compiled"]
    for at, plan in enumerate(expected):
        if at:
            budget.send_keys(Keys.ARROW_RIGHT)
        now = shown(browser)
        assert now["strip"] == plan["letters"]
        assert now["marker"] == pytest.approx(plan["total"])
        assert now["most"] == pytest.approx(
            plan["peak"]["bytes"] + one.profile.fixed_bytes + one.profile.beside_bytes
        )
        assert plan["peak"]["where"] in now["peak"]
        assert all(text in now["words"] for _, text in plan["words"])
        assert bool(now["compiled"]) == (at == one.chosen)
        assert now["drawn"] >= 3
    # By the mouse too: to the left end.
    from selenium.webdriver import ActionChains

    width = budget.size["width"]
    drag = ActionChains(browser).move_to_element_with_offset(budget, width // 2 - 8, 0).click_and_hold()
    drag.move_by_offset(-(width - 16), 0).release().perform()
    assert shown(browser)["strip"] == expected[0]["letters"]
    browser.find_element(By.CSS_SELECTOR, "#plans tbody tr").click()
    assert shown(browser)["strip"] == expected[-1]["letters"]
    pdf = browser.execute_cdp_cmd("Page.printToPDF", {})
    assert len(pdf["data"]) > 20_000
    assert browser.get_log("browser") == []
