"""What the page promises, seen in a real browser: the answer is complete and exact, whatever happens meanwhile."""

from __future__ import annotations

import re

from playwright.sync_api import expect

from tests.browser.cable import Cable
from tests.browser.site import PATIENCE, Site, Tabs, Talk

SOME = "w12 "
GONE = ("Failed to load resource", "ERR_")


def test_reload_in_mid_answer(tabs: Tabs, site: Site, talk: Talk) -> None:
    tab = tabs.open()
    tab.send(talk.text)
    tab.until_said(SOME)
    tab.page.reload()
    tab.until_said(SOME)
    talk.end()
    tab.until("completed")
    assert tab.said() == talk.whole(site.answer(tabs.session))
    assert tab.page.locator(".turn").count() == 1


def test_a_second_device_joins_in_mid_answer(tabs: Tabs, site: Site, talk: Talk) -> None:
    one, two = tabs.open(), tabs.blank()
    one.send(talk.text)
    one.until_said(SOME)
    one.button("Second device").click()
    two.page.goto(one.page.get_by_label("Address of this session").input_value())
    two.until_said(SOME)
    expect(two.turn()).to_have_attribute("data-state", "running")
    talk.end()
    for tab in (one, two):
        tab.until("completed")
        assert tab.said() == talk.whole(site.answer(tabs.session))
    expect(two.turn().locator(".bubble")).to_have_text(talk.text)


def test_stop_from_a_second_device(tabs: Tabs, site: Site) -> None:
    one, two = tabs.open(name="desk"), tabs.open(name="phone")
    one.send("count 1000 30")
    two.until_said(SOME)
    two.button("Stop").click()
    one.until("cancelled")
    two.until("cancelled")
    stored = site.log(tabs.session)[-1]
    assert stored.type == "turn.cancelled"
    assert one.said() == two.said() == stored.data.message.text
    receipt = two.page.locator("#note")
    expect(receipt).to_have_text(re.compile(rf"^Stopped at offset {stored.offset}, \d+\.\d ms$"))
    for tab in (one, two):
        expect(tab.turn().locator(".state")).to_have_text("Stopped (from phone)")
        expect(tab.rows("Stopped").locator(".note")).to_have_text("from phone")


def test_a_worker_killed_in_mid_answer(tabs: Tabs, site: Site, talk: Talk) -> None:
    tab = tabs.open()
    tab.send(talk.text)
    tab.until_said(SOME)
    name = tab.rows("Started").locator(".note").inner_text().removeprefix("by ")
    site.kill_worker(name)
    taken_over = tab.rows("Taken over").locator(".note")
    other = {"one": "two", "two": "one"}[name]
    expect(taken_over).to_have_text(
        re.compile(rf"^{name} was lost; ({other}|{name}) goes on after \d+$"), timeout=PATIENCE
    )
    talk.end()
    tab.until("completed")
    assert tab.said() == talk.whole(site.answer(tabs.session))
    expect(tab.turn().locator(".notices li")).to_have_text(re.compile(rf"^Worker {name} was lost in mid-answer;"))


def test_the_gateway_killed_and_restarted_in_mid_answer(tabs: Tabs, site: Site, talk: Talk) -> None:
    tabs.expected = GONE
    one, two = tabs.open(), tabs.open()
    one.send(talk.text)
    two.until_said(SOME)
    site.restart_gateway(lambda: expect(one.connection).to_have_text("Reconnecting …", timeout=PATIENCE))
    for tab in (one, two):
        tab.live()
    talk.end()
    for tab in (one, two):
        tab.until("completed")
        assert tab.said() == talk.whole(site.answer(tabs.session))


def test_offline_and_online_in_mid_answer(tabs: Tabs, site: Site, talk: Talk) -> None:
    tabs.expected = GONE
    cable = Cable(site.port)
    try:
        tab = tabs.blank(url=cable.url).open(tabs.session)
        tab.send(talk.text)
        tab.until_said(SOME)
        cable.drop_streams()
        tab.page.context.set_offline(True)
        expect(tab.connection).to_have_text("Offline, will go on from here", timeout=PATIENCE)
        so_far = tab.said()
        tab.page.context.set_offline(False)
        tab.live()
        talk.end()
        tab.until("completed")
        assert len(so_far) < len(tab.said())
        assert tab.said() == talk.whole(site.answer(tabs.session))
        tab.page.context.close()
    finally:
        cable.end()


def test_a_stream_that_died_without_a_word(tabs: Tabs, site: Site, talk: Talk) -> None:
    cable = Cable(site.port)
    try:
        tab = tabs.blank(url=cable.url).open(tabs.session)
        tab.send(talk.text)
        tab.until_said(SOME)
        cable.drop_streams()
        so_far = tab.said_at_rest()
        # The person looks at the page again.
        tab.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        tab.page.wait_for_function("n => document.querySelector('.turn .text').textContent.length > n", arg=len(so_far))
        talk.end()
        tab.until("completed").live()
        assert tab.said() == talk.whole(site.answer(tabs.session))
        tab.page.context.close()
    finally:
        cable.end()


def test_the_broker_away_in_mid_answer(tabs: Tabs, site: Site, talk: Talk) -> None:
    tabs.expected = ("503", *GONE)
    gateway = site.start_gateway("--insecure", "--outage", "1s")
    tab = tabs.blank(url=site.address_of(gateway)).open(tabs.session)
    tab.send(talk.text)
    tab.until_said("w3 ")
    with site.broker_away():
        expect(tab.connection).to_have_text("Broker away, waiting for it …", timeout=PATIENCE)
        so_far = tab.said()
    tab.live()
    talk.end()
    tab.until("completed")
    assert len(so_far) < len(tab.said())
    assert tab.said() == talk.whole(site.answer(tabs.session))
    gateway.end()


def test_what_is_sent_while_the_gateway_is_away_is_sent_once(tabs: Tabs, site: Site) -> None:
    tabs.expected = GONE
    tab = tabs.open()

    def send_and_leave() -> None:
        tab.send("hello there")
        expect(tab.page.locator(".sending .state")).to_contain_text("Not sent yet", timeout=PATIENCE)
        expect(tab.page.locator(".sending .bubble")).to_have_text("hello there")

    site.restart_gateway(send_and_leave)
    tab.until("completed").live()
    assert tab.said() == "hello there"
    assert [event.type for event in site.log(tabs.session)].count("turn.requested") == 1
    assert tab.page.locator(".sending").count() == 0


def test_an_approval_is_answered_on_one_device_and_seen_on_both(tabs: Tabs) -> None:
    one, two = tabs.open(), tabs.open()
    one.send("approve 20 5")
    for tab in (one, two):
        expect(tab.button("Approve")).to_be_visible(timeout=PATIENCE)
        expect(tab.turn().locator(".state")).to_have_text("Waits for your answer")
    two.button("Approve").click()
    for tab in (one, two):
        tab.until("completed")
        expect(tab.page.locator(".question .outcome")).to_have_text("Approved")
        expect(tab.button("Approve")).to_be_hidden()
        assert tab.said() == "I need approval. " + "".join(f"w{i} " for i in range(20))
        card = tab.turn().locator("details.tool")
        expect(card.locator(".tool-state")).to_have_text("done")


def test_a_second_message_waits_interrupts_or_steers(tabs: Tabs) -> None:
    tab = tabs.open()
    tab.send("steer 1000 30")
    tab.until_said(SOME)
    tab.page.get_by_label("Steer").check(force=True)
    tab.send("left")
    expect(tab.turn(0)).to_contain_text("[steered: left]", timeout=PATIENCE)
    tab.until("consumed", 1)
    tab.page.get_by_label("Interrupt").check(force=True)
    tab.send("count 3 20")
    tab.until("cancelled", 0)
    expect(tab.turn(0).locator(".state")).to_have_text("Stopped by a later message")
    tab.until("completed", 2)
    assert tab.said(2) == "w0 w1 w2 "
