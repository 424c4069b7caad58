"""The report of a pipeline's job in a browser, from the command line: pictures with their prompts, worst first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from tests.tiny_pipelines import save_sd

Cli = Callable[..., Any]
PROMPTS = (
    "red heart",
    "owl",
    "red apple",
    "a very long prompt that takes several lines below its picture",
    "cat",
    "sun",
)
SETS = (
    *("sampler.num_inference_steps=2", "calibration.seeds=2", "evaluation.seeds=3", "evaluation.sqnr_seeds=1"),
    "evaluation.grid=3",
)


def heard(page: Page) -> list[str]:
    """Return where what a page complains of, and what it asks for, will be."""
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: wrong.append(request.url))
    return wrong


@pytest.mark.usefixtures("without_ray")
def test_pictures_and_their_prompts_worst_first(cli: Cli, browser: Browser, tmp_path: Path) -> None:
    save_sd(tmp_path / "sd")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    words = [word for each in SETS for word in ("--set", each)]
    words = ["run", "minmax-w8a8", "--model", str(tmp_path / "sd"), "--prompts", str(tmp_path / "prompts.txt"), *words]
    for shown in ("first", "worst"):
        answer = cli(*words, "--set", f"evaluation.shown={shown}", "--json")
        assert answer.code == 0, answer.err
        file = tmp_path / f"{shown}.html"
        assert cli("report", answer.json["job"], "--out", file).code == 0
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        wrong = heard(page)
        page.goto(file.as_uri())
        sizes = page.locator(".samples img").evaluate_all(
            "(all) => all.map((each) => [each.naturalWidth, each.height])"
        )
        assert [width for width, _ in sizes] == [3 * 64 + 2 * 2] * 3  # loaded: three pictures, and gaps
        assert all(100 < height < 300 for _, height in sizes)
        prompts = page.locator(".samples .prompts span").all_inner_texts()
        seeds = page.locator(".samples .seeds span").all_inner_texts()
        worst = [(each["prompt"], str(each["seed"])) for each in answer.json["metrics"]["worst_prompts"]]
        told = [(prompt, str(seed)) for seed, prompt in enumerate(PROMPTS[1::2])]
        assert list(zip(prompts, seeds, strict=True)) == (worst if shown == "worst" else told)
        assert sorted(worst) == sorted(told)
        middle = "(all) => all.map((each) => each.getBoundingClientRect()).map((box) => (box.left + box.right) / 2)"
        above, below = (page.locator(f".samples .{name} span").evaluate_all(middle) for name in ("seeds", "prompts"))
        assert above == pytest.approx(below, abs=3), "each prompt is below its picture"
        page.set_viewport_size({"width": 390, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert [url for url in wrong if not url.startswith(("file:", "data:"))] == []
        page.close()
