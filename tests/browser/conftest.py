from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from agentrun.brokers.server import NatsServer
from tests.browser.site import Site, Tabs, Talk

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def chromium() -> str | None:
    """The browser to test with; None: playwright's own download."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


@pytest.fixture(scope="package")
def site(nats_server: NatsServer) -> Iterator[Site]:
    """A gateway with the page and two workers; each test takes a session of its own."""
    site = Site(nats_server)
    try:
        yield site
    finally:
        site.end()


# Playwright keeps an event loop in this thread as long as it runs: what begins one of its own begins before. For the
# same reason it ends with this package, which therefore has to be one.
@pytest.fixture(scope="package")
def browser(site: Site) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def tabs(browser: Browser, site: Site) -> Iterator[Tabs]:
    """Opens tabs, and sees in the end that none of them met an error or asked another host."""
    with ExitStack() as stack:
        tabs = Tabs(browser, site, stack)
        yield tabs
        tabs.check()


@pytest.fixture
def talk(tmp_path: Path) -> Iterator[Talk]:
    """A message whose answer lasts as long as the test wants; it ends with the test."""
    talk = Talk(tmp_path / "enough")
    yield talk
    talk.end()
