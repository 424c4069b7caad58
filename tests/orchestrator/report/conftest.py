"""One Chromium for all tests of pages, which are skipped where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A browser without a screen."""
    path = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser here: looked for {', '.join(_NAMES)}")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path)
        yield found
        found.close()
