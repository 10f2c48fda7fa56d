"""How the page looks and is used: narrow and dark, by keyboard, by screen reader, by somebody with ill intent."""

from __future__ import annotations

import json
import re

import pytest
from playwright.sync_api import Page, expect

from tests.browser.site import PATIENCE, Site, Tab, Tabs

XSS = '<img src=x onerror="window.broken=1"><script>window.broken=1</script>'
LONG = "x" * 300
# For every element with text of its own that can be seen: its colour on what lies behind it, as WCAG has it.
CONTRAST = """
() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true })
  const paint = (colours) => {
    canvas.clearRect(0, 0, 1, 1)
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1) }
    return [...canvas.getImageData(0, 0, 1, 1).data]
  }
  const linear = (v) => v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b)
  const bad = []
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim() !== '')
    const value = ['INPUT', 'TEXTAREA', 'SELECT'].includes(element.tagName) && element.value
    const box = element.getBoundingClientRect()
    if ((!own && !value) || !element.checkVisibility({ visibilityProperty: true }) || box.width < 3) continue
    const behind = []
    for (let e = element; e; e = e.parentElement) behind.unshift(getComputedStyle(e).backgroundColor)
    const back = paint(['white', ...behind])
    const front = paint(['white', ...behind, getComputedStyle(element).color])
    const [a, b] = [light(back), light(front)].sort((x, y) => y - x)
    const ratio = (a + 0.05) / (b + 0.05)
    if (ratio < 4.5) bad.push([element.className || element.tagName, element.textContent.slice(0, 30), ratio])
  }
  return bad
}
"""

# Every control that can be seen has a name.
NAMELESS = """
() => [...document.querySelectorAll(
  'button, a[href], input, textarea, select, nav, aside, dialog, [role=group], [role=log]')]
  .filter((e) => e.checkVisibility())
  .filter((e) => {
    const by = document.getElementById(e.getAttribute('aria-labelledby'))?.textContent ?? ''
    const labels = [...(e.labels ?? [])].map((label) => label.textContent).join('')
    const own = e.matches('button, a') ? e.textContent : ''
    return (by + labels + (e.getAttribute('aria-label') ?? '') + own).trim() === ''
  })
  .map((e) => e.outerHTML.slice(0, 120))
"""


def no_sideways(page: Page) -> None:
    width, shown = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width <= shown
    scrollers = page.evaluate(
        "[...document.querySelectorAll('#conversation, #rows, #session-list, main, nav, aside')]"
        ".filter(e => e.checkVisibility() && e.scrollWidth > e.clientWidth).map(e => e.id || e.tagName)"
    )
    assert scrollers == []


def every_state(tab: Tab) -> None:
    """Turns that ended well, that were stopped, that failed, that ask; and one that waits."""
    tab.send("retry 0.05")
    tab.until("completed")
    tab.send(f"**{LONG}**\n```\n{LONG} {LONG}\n```")
    tab.until("completed", 1)
    tab.send("fail")
    tab.until("failed", 2)
    tab.send("approve 5 5")
    expect(tab.button("Approve")).to_be_visible(timeout=PATIENCE)
    tab.send("waits")
    tab.until("queued", 4)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_light_and_dark(tabs: Tabs, scheme: str) -> None:
    tab = tabs.open(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    every_state(tab)
    page = tab.page
    no_sideways(page)
    assert page.evaluate(CONTRAST) == []
    tab.button("Deny").click()
    tab.until("completed", 4)
    for opener, pane in (("Timeline", "#timeline"), ("Sessions", "#sessions")):
        tab.button(opener).click()
        expect(page.locator(pane)).to_be_visible()
        no_sideways(page)
        assert page.evaluate(CONTRAST) == []
        assert page.evaluate("document.querySelector('main').inert")
        page.keyboard.press("Escape")
        expect(page.locator(pane)).to_be_hidden()
        expect(tab.button(opener)).to_be_focused()
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", dark)[:3])) < 200) == (scheme == "dark")


def test_wide_and_the_colours_chosen(tabs: Tabs) -> None:
    tab = tabs.open(color_scheme="light")
    every_state(tab)
    page = tab.page
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.get_by_label("Colours").select_option("dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    tab.rows("Sent").first.locator("button").click()
    expect(page.locator("#detail pre")).to_contain_text('"type": "turn.requested"')
    no_sideways(page)
    assert page.evaluate(CONTRAST) == []
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.get_by_label("Colours").select_option("as the system")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == light


def test_by_keyboard_alone(tabs: Tabs) -> None:
    tab = tabs.open()
    page, keyboard = tab.page, tab.page.keyboard
    keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the message")).to_be_focused()
    keyboard.press("Enter")
    expect(page.get_by_role("textbox", name="Message", exact=True)).to_be_focused()
    keyboard.type("one")
    keyboard.press("Shift+Enter")
    keyboard.type("two")
    keyboard.press("Enter")
    tab.until("completed")
    assert tab.said() == "one\ntwo"
    keyboard.type("count 1000 30")
    keyboard.press("Enter")
    tab.until_said("w5 ")
    keyboard.press("Tab")
    expect(page.get_by_role("combobox", name="to")).to_be_focused()
    keyboard.press("Tab")
    expect(tab.button("Stop")).to_be_focused()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    keyboard.press("Enter")
    tab.until("cancelled")
    page.get_by_role("textbox", name="Message", exact=True).focus()
    keyboard.type("count 1000 30")
    keyboard.press("Enter")
    tab.until("running")
    keyboard.press("Control+.")
    tab.until("cancelled", 2)


def test_the_timeline_by_keyboard(tabs: Tabs) -> None:
    tab = tabs.open()
    tab.send("count 3 100")
    tab.until("completed")
    page, keyboard = tab.page, tab.page.keyboard
    tab.button("Close the timeline").focus()
    keyboard.press("Tab")
    focused = page.locator("#rows button:focus")
    expect(focused).to_contain_text("Sent")
    keyboard.press("ArrowDown")
    expect(focused).to_contain_text("Started")
    keyboard.press("End")
    expect(focused).to_contain_text("Completed")
    keyboard.press("Enter")
    expect(page.locator("#detail h3")).to_have_text("Completed, offset 6")
    keyboard.press("Home")
    keyboard.press("ArrowDown")
    keyboard.press("ArrowDown")
    keyboard.press("Enter")
    expect(page.locator("#detail h3")).to_have_text("Text, offsets 3–5")
    assert [json.loads(line)["offset"] for line in page.locator("#detail pre").inner_text().splitlines()] == [3, 4, 5]


def test_names_roles_and_what_is_read_out(tabs: Tabs) -> None:
    tab = tabs.open()
    page = tab.page
    announced = page.get_by_role("log", name="Announcements")
    tab.send("count 150 20")
    tab.until_said("w5 ")
    assert announced.inner_text() == ""
    expect(tab.turn().locator(".answer")).to_have_attribute("aria-busy", "true")
    tab.until("completed")
    expect(announced).to_contain_text("Completed. w0 w1 w2")
    expect(tab.turn().locator(".answer")).to_have_attribute("aria-busy", "false")
    assert page.evaluate(NAMELESS) == []
    for role, name in (("navigation", "Sessions"), ("complementary", "Timeline"), ("log", "Messages"), ("main", None)):
        assert page.get_by_role(role, name=name).count() == 1
    assert page.get_by_role("heading", level=1).inner_text() == "count 150 20"
    assert page.get_by_role("status").count() == 2
    tab.send("approve 3 3")
    expect(page.get_by_role("group", name="Deploy?")).to_be_visible(timeout=PATIENCE)
    expect(announced).to_contain_text("Question: Deploy?")
    assert page.evaluate(NAMELESS) == []
    page.reload()
    expect(page.get_by_role("group", name="Deploy?")).to_be_visible(timeout=PATIENCE)
    assert announced.inner_text() == ""  # what was there before is not news
    tab.button("Deny").click()
    tab.until("completed")
    # A pane that is opened has what closes it; a dialog keeps the focus to itself.
    tab.button("Second device").click()
    for _ in range(12):
        page.keyboard.press("Tab")
        # The browser's own controls are part of the round, and are the body to the page.
        assert page.evaluate("document.activeElement.matches('body, dialog *')")
    page.keyboard.press("Escape")
    expect(tab.button("Second device")).to_be_focused()


def test_motion_is_left_out_where_it_is_not_wanted(tabs: Tabs) -> None:
    tab = tabs.open(reduced_motion="reduce")
    tab.send("count 1000 30")
    tab.until_said("w3 ")
    assert tab.page.evaluate("document.getAnimations().length") == 0
    tab.button("Stop").click()
    tab.until("cancelled")


def test_markup_stays_text(tabs: Tabs, site: Site) -> None:
    site.start_worker("hostile", "tests.browser.hostile:hostile")
    site.send(tabs.session, XSS, "hostile-1", agent="hostile", device=XSS, user=XSS)
    tab = tabs.open()
    tab.until("completed")
    page = tab.page
    assert XSS in tab.said()
    expect(tab.turn().locator(".bubble")).to_have_text(XSS)
    for card in tab.turn().locator("details").all():
        card.locator("summary").click()
    expect(tab.turn().locator("details.tool")).to_contain_text(XSS)
    expect(page.get_by_role("heading", level=1)).to_contain_text("<img src=x")
    expect(page.locator("#session-list [aria-current]")).to_contain_text("<img src=x")
    page.locator("#rows button").first.click()
    expect(page.locator("#detail pre")).to_contain_text("onerror")
    assert page.locator("a[href^=javascript]").count() == 0
    expect(tab.turn().locator(".link")).to_have_text("Source: javascript:window.broken=1")
    assert page.evaluate("document.querySelectorAll('#turns img, #turns script, #rows img, nav li img').length") == 0
    assert page.evaluate("window.broken") is None


def test_sessions_are_listed_and_kept(tabs: Tabs, site: Site) -> None:
    tab = tabs.open()
    page = tab.page
    tab.send("first words of it")
    tab.until("completed")
    current = page.locator("#session-list [aria-current]")
    expect(current.locator(".title")).to_have_text("first words of it")
    tab.type("a draft")
    tab.button("New session").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("New session")
    tab.live()
    assert page.locator(".turn").count() == 0
    assert page.get_by_role("textbox", name="Message", exact=True).input_value() == ""
    tab.send("another one")
    tab.until("completed")
    page.locator("#session-list a").filter(has_text="first words of it").first.click()
    tab.live()
    assert tab.said() == "first words of it"
    assert page.get_by_role("textbox", name="Message", exact=True).input_value() == "a draft"
    page.go_back()
    expect(tab.turn().locator(".bubble")).to_have_text("another one")
    # On a device that has not seen it the gateway lists it, and its first words are found out.
    other = tabs.blank()
    other.page.goto(site.url)
    expect(other.page.locator("#session-list a").filter(has_text="another one")).to_have_count(1, timeout=PATIENCE)


def test_a_deleted_session_begins_again(tabs: Tabs) -> None:
    tabs.expected = ("410",)
    tab = tabs.open()
    tab.send("hello")
    tab.until("completed")
    assert tab.page.request.delete(f"{tab.url}/v1/sessions/{tabs.session}").status == 204
    expect(tab.page.locator(".turn")).to_have_count(0, timeout=PATIENCE)
    tab.live()
    tab.send("again")
    tab.until("completed")
    assert tab.said() == "again"


def test_where_no_stream_comes_through_it_polls(tabs: Tabs) -> None:
    tabs.expected = ("ERR_FAILED",)
    tab = tabs.blank()
    tab.page.route(
        re.compile("/events"),
        lambda route: route.abort() if route.request.resource_type == "eventsource" else route.continue_(),
    )
    tab.page.goto(f"{tab.url}/?session={tabs.session}")
    expect(tab.connection).to_have_text("Live, by long-polling", timeout=PATIENCE)
    tab.send("count 20 20")
    tab.until("completed")
    assert tab.said() == "".join(f"w{i} " for i in range(20))


def test_ten_thousand_events(tabs: Tabs, site: Site) -> None:
    site.send(tabs.session, "bench 10000 5000", "many")
    tab = tabs.open()
    tab.until("completed")
    page = tab.page
    words = tab.said().split()
    assert [word.partition("@")[0] for word in words] == [f"w{i}" for i in range(10000)]
    assert page.locator("#rows li").count() <= 40
    assert page.evaluate("document.querySelectorAll('*').length") < 2000
