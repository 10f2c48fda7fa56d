"""How the page is served: to whom, with which headers; and with tokens."""

from __future__ import annotations

import re
import secrets
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.message import Message
from pathlib import Path

import pytest
from playwright.sync_api import expect

from agentrun.gateway import mint
from tests.browser.site import PATIENCE, Site, Tabs

STATIC = Path(__file__).parents[2] / "agentrun" / "gateway" / "static"


def get(url: str, **headers: str) -> tuple[int, Message, bytes]:
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def test_every_file_is_served_and_nothing_else(site: Site) -> None:
    types = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    for file in STATIC.iterdir():
        path = "" if file.name == "index.html" else f"page/{file.name}"
        status, headers, body = get(f"{site.url}/{path}")
        assert (status, body) == (200, file.read_bytes())
        assert headers["content-type"].startswith(types[file.suffix])
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-cache"
        # Not sent again while it is the same, and then with the same rules: browsers take those of the 304.
        status, again, body = get(f"{site.url}/{path}", **{"If-None-Match": headers["etag"]})
        assert (status, body) == (304, b"")
        assert (again["content-security-policy"], again["etag"]) == (policy, headers["etag"])
    for path in (
        "page/",
        "page/index.html",
        "page/../app.py",
        "page/%2e%2e/app.py",
        "page/..%2fapp.py",
        "page//app.js",
    ):
        assert get(f"{site.url}/{path}")[0] == 404


def test_the_page_asks_for_nothing_inline(site: Site) -> None:
    html = get(site.url)[2].decode()
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:|https?://", html)
    for script in re.findall(r"<script[^>]*>(.*?)</script>", html):
        assert script == ""
    for file in STATIC.glob("*.js"):
        assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", file.read_text())


@pytest.fixture(scope="module")
def secured(site: Site) -> Iterator[tuple[str, str]]:
    """A gateway that wants tokens: its address, and the secret that tokens are signed with."""
    secret = secrets.token_urlsafe(48)
    gateway = site.start_gateway("--audience", "agentrun", env={"AGENTRUN_GATEWAY_SECRET": secret})
    yield site.address_of(gateway), secret
    gateway.end()


def test_a_token_is_asked_for_kept_and_handed_on(tabs: Tabs, secured: tuple[str, str]) -> None:
    url, secret = secured
    tabs.expected = ("401",)
    rights = ["read", "send", "cancel"]
    good = mint(secret, user="ann", sessions=[tabs.session], rights=rights)
    tab = tabs.blank(url=url)
    tab.page.goto(f"{url}/?session={tabs.session}")
    dialog = tab.page.get_by_role("dialog", name="A token, please")
    expect(dialog).to_be_visible(timeout=PATIENCE)
    tab.page.get_by_label("Token", exact=True).fill("nonsense")
    tab.page.keyboard.press("Enter")
    expect(dialog).to_be_visible(timeout=PATIENCE)
    tab.page.get_by_label("Token", exact=True).fill(good)
    tab.page.keyboard.press("Enter")
    tab.live()
    tab.send("count 1000 30")
    tab.until_said("w5 ")
    expect(tab.turn().locator(".from")).to_contain_text("ann")
    tab.button("Second device").click()
    expect(tab.page.locator("#share-note")).to_contain_text("The link holds your token")
    link = tab.page.get_by_label("Address of this session").input_value()
    tab.button("Close").click()
    other = tabs.blank(url=url)
    other.page.goto(link)
    other.until_said("w5 ")
    assert "token" not in other.page.url
    assert other.page.evaluate("localStorage.length + sessionStorage.length") > 0
    assert good not in other.page.evaluate("JSON.stringify(localStorage)")
    other.button("Stop").click()
    tab.until("cancelled")
    expect(tab.turn().locator(".state")).to_have_text(re.compile(r"^Stopped by ann \(from .+\)$"))
    assert tab.said() == other.until("cancelled").said()


def test_what_a_token_does_not_allow_is_said(tabs: Tabs, secured: tuple[str, str]) -> None:
    url, secret = secured
    tabs.expected = ("403",)
    reader = mint(secret, user="bob", sessions=[tabs.session], rights=["read"])
    tab = tabs.blank(url=url)
    tab.page.goto(f"{url}/?session={tabs.session}#token={reader}")
    tab.live()
    tab.send("hello")
    expect(tab.page.locator(".sending .state")).to_contain_text("Not sent:", timeout=PATIENCE)
    tab.button("Discard").click()
    expect(tab.page.locator(".sending")).to_have_count(0)
    tab.button("New session").click()
    expect(tab.connection).to_contain_text("Refused", timeout=PATIENCE)
