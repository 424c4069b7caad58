"""A search's report in a browser: what is drawn, and what pointer and keyboard do. One page for all tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from orchestrator.report.search_render import render_search
from tests.orchestrator.report.searches import failed_model, layer_names, model_report, search_report


@dataclass
class Opened:
    """A page, and what went wrong on it or was asked of others."""

    page: Page
    model: object
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def opened(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    """The report of three models, one of which failed, in a browser without a screen."""
    file = Path(tmp_path_factory.mktemp("report"), "search.html")
    first = model_report()
    file.write_text(render_search(search_report(first, model_report("digits", 1), failed_model())), encoding="utf-8")
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    found = Opened(page, first)
    page.on("console", lambda message: found.errors.append(message.text))
    page.on("pageerror", lambda error: found.errors.append(str(error)))
    page.on("request", lambda request: found.requests.append(request.url))
    page.goto(file.as_uri())
    yield found
    page.close()


@pytest.fixture(autouse=True)
def nothing_wrong(opened: Opened) -> Iterator[Page]:
    """Each test starts without an open window, and ends without an error or a look outside."""
    yield opened.page
    opened.page.evaluate("document.querySelectorAll('dialog[open]').forEach((each) => each.close())")
    assert opened.errors == []
    assert [url for url in opened.requests if not url.startswith(("file:", "data:"))] == []


def test_all_plots_are_drawn(opened: Opened) -> None:
    section = opened.page.locator("#model-0")
    assert section.locator(".pareto svg").count() == 1
    marks = section.locator(".pareto a.mark")
    assert marks.count() == 28
    # Drawn: each has a place on the page, within its chart.
    chart = section.locator(".pareto svg").bounding_box()
    assert chart is not None
    for index in range(marks.count()):
        box = marks.nth(index).bounding_box()
        assert box is not None
        assert chart["x"] <= box["x"] <= chart["x"] + chart["width"]
        assert chart["y"] <= box["y"] <= chart["y"] + chart["height"]
    assert section.locator(".predictions a.mark").count() == 28
    layers = len(layer_names())
    assert section.locator(".sensitivity g.mark").count() == 6 * layers
    assert section.locator(".heat tbody tr:not(.unit)").count() == layers
    assert section.locator(".heat td").count() == 9 * layers
    assert opened.page.locator("section.model").count() == 3
    assert opened.page.get_by_text("weights of conv_in <b>hold NaN</b>").count() == 2


def test_hovering_names_the_point_and_the_cell(opened: Opened) -> None:
    page = opened.page
    tip = page.locator("#tip")
    page.locator("#model-0 .pareto a.mark.uniform").first.hover()
    assert tip.inner_text().startswith("point 10: uniform 3 bits, 2.1")
    assert tip.is_visible()
    page.locator("#model-0 .heat td").nth(9 + 2).hover()
    assert tip.inner_text().startswith("down_blocks.0.resnets.0.conv1: ")
    assert "point 3: emoji32-search@1" in tip.inner_text()
    page.locator("h1").hover()
    assert tip.is_hidden()


def test_a_click_opens_the_samples_of_the_point(opened: Opened) -> None:
    page = opened.page
    page.locator("#model-0 .pareto a.mark.release").first.click()
    window = page.locator("dialog[open]")
    assert window.count() == 1
    assert window.locator("h3").inner_text() == "Point 3: emoji32-search@1"
    sizes = window.locator("img").evaluate_all("(all) => all.map((each) => [each.naturalWidth, each.naturalHeight])")
    assert sizes == [[4 * 18 - 2, 16]] * 3
    window.get_by_role("button", name="Close").click()
    assert window.count() == 0


def test_a_point_without_samples_says_where_they_are(opened: Opened) -> None:
    page = opened.page
    page.locator("#model-0 .pareto a.mark.screened").first.click()
    window = page.locator("dialog[open]")
    assert "they are kept of points that are measured in full" in window.inner_text()
    page.keyboard.press("Escape")
    assert window.count() == 0


def test_the_keyboard_does_what_the_pointer_does(opened: Opened) -> None:
    page = opened.page
    page.locator("#model-0 .pareto a.mark").first.focus()
    page.keyboard.press("Tab")
    focused = page.evaluate("document.activeElement.getAttribute('aria-label')")
    tip = page.locator("#tip")
    assert tip.is_visible()
    assert tip.inner_text() == focused
    page.keyboard.press("Enter")
    window = page.locator("dialog[open]")
    assert window.count() == 1
    assert focused.startswith(window.locator("h3").inner_text().lower().partition(":")[0])
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == focused, "the focus returns"


def test_a_dark_page_is_dark_and_a_narrow_one_does_not_scroll_sideways(opened: Opened) -> None:
    page = opened.page
    colour = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(colour)
    page.emulate_media(color_scheme="dark")
    assert (light, page.evaluate(colour)) == ("rgb(255, 255, 255)", "rgb(20, 24, 28)")
    page.emulate_media(color_scheme="light")
    page.set_viewport_size({"width": 480, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 480
    # charts keep a size at which their letters can be read, and scroll by themselves
    assert page.locator("#model-0 .pareto svg").evaluate("(chart) => chart.getBoundingClientRect().width") >= 640
    page.set_viewport_size({"width": 1200, "height": 900})
