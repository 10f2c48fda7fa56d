"""The example with React and an unmodified `useChat`, built as its users build it, in a real browser."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Route, expect

from tests.browser.site import PATIENCE, Site, Tab, Tabs, Talk
from tests.e2e.processes import ROOT, Running
from tests.gateway.npm import NPM, node_binary

EXAMPLE = ROOT / "examples" / "react-chat"
WORDS = "".join(f"w{i} " for i in range(60))
SOME = "w12 "
HALF = "".join(f"w{i} " for i in range(30))


@pytest.fixture(scope="module")
def app(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the built app. Its server hands /api and /v1 on to the gateway, as the example's README says."""
    root = tmp_path_factory.mktemp("react") / "chat"
    shutil.copytree(EXAMPLE, root, ignore=shutil.ignore_patterns("node_modules", "dist"))
    (root / "node_modules").symlink_to(NPM / "node_modules")
    environment = {**os.environ, "AGENTRUN_GATEWAY": site.url, "NO_COLOR": "1"}
    vite = [str(node_binary()), "node_modules/vite/bin/vite.js"]
    built = subprocess.run(
        [*vite, "build"], cwd=root, env=environment, capture_output=True, text=True, timeout=50, check=False
    )
    assert built.returncode == 0, built.stdout + built.stderr
    server = Running(
        subprocess.Popen(
            [*vite, "preview", "--host", "127.0.0.1", "--port", "0"],
            cwd=root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    )
    try:
        yield server.until(r"(http://127\.0\.0\.1:\d+)/")[1]
    finally:
        server.end()


@pytest.fixture(scope="module")
def own_agents(site: Site) -> Iterator[None]:
    """A worker that runs `tests.browser.agents`."""
    worker = site.cli.worker("own", "tests.browser.agents:gated", agent="tests.browser.agents:asker")
    yield
    worker.end()


class Chat:
    """A tab with the app."""

    def __init__(self, tab: Tab) -> None:
        self.tab = tab
        self.page = tab.page

    def open(self, id: str) -> Chat:
        self.page.goto(f"{self.tab.url}/?chat={id}")
        expect(self.page.get_by_label("Message", exact=True)).to_be_visible(timeout=PATIENCE)
        return self

    def send(self, text: str) -> None:
        self.page.get_by_label("Message", exact=True).fill(text)
        self.page.keyboard.press("Enter")

    def send_to(self, agent: str, text: str) -> None:
        """Send to an agent that is not the gateway's default; the app knows no other."""

        def named(route: Route) -> None:
            route.continue_(post_data=json.dumps({**route.request.post_data_json, "agent": agent}))

        self.page.route("**/api/chat", named, times=1)
        self.send(text)

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    def until_said(self, text: str) -> Chat:
        expect(self.answer).to_contain_text(text, timeout=PATIENCE)
        return self

    def until_ready(self) -> Chat:
        expect(self.page.locator("form")).to_have_attribute("data-status", "ready", timeout=PATIENCE)
        return self

    @property
    def answer(self) -> Locator:
        return self.page.locator("article.assistant").last

    def said(self) -> str:
        """The text of the last answer, as it stands in the document."""
        return self.answer.evaluate("a => [...a.querySelectorAll('.text')].map(e => e.textContent).join('')")

    def roles(self) -> list[str]:
        return [c or "" for c in self.page.locator("article").evaluate_all("all => all.map(a => a.className)")]


@pytest.fixture
def chat_id() -> str:
    return f"r-{uuid.uuid4().hex[:8]}"


Open = Callable[[], Chat]


@pytest.fixture
def device(tabs: Tabs, app: str, chat_id: str) -> Open:
    """Opens the chat on another device."""
    return lambda: Chat(tabs.blank(url=app)).open(chat_id)


def test_its_packages_are_those_that_are_tested() -> None:
    wanted = json.loads((EXAMPLE / "package.json").read_text())
    tested = json.loads((NPM / "package.json").read_text())["dependencies"]
    assert (wanted["dependencies"] | wanted["devDependencies"]).items() <= tested.items()


def test_reload_in_mid_answer(device: Open, own_agents: None, tmp_path: Path) -> None:
    chat, gate = device(), tmp_path / "gate"
    chat.send_to("gated", str(gate))
    chat.until_said("w29 ")
    chat.page.reload()
    chat.until_said("w29 ")
    assert chat.said() == HALF
    expect(chat.button("Stop")).to_be_visible(timeout=PATIENCE)
    gate.touch()
    chat.until_said("w59 ").until_ready()
    assert chat.said() == WORDS
    assert chat.roles() == ["user", "assistant"]


def test_a_second_device_joins_in_mid_answer(device: Open, own_agents: None, tmp_path: Path) -> None:
    one, gate = device(), tmp_path / "gate"
    one.send_to("gated", str(gate))
    one.until_said("w29 ")
    two = device()
    two.until_said("w29 ")
    assert one.said() == two.said() == HALF
    gate.touch()
    for chat in (one, two):
        chat.until_said("w59 ").until_ready()
        assert chat.said() == WORDS
        assert chat.roles() == ["user", "assistant"]


def test_an_idle_device_shows_what_another_one_asks(device: Open) -> None:
    one, two = device(), device()
    one.send("count 5 20")
    for text, asker in (("count 20 20", two), ("count 25 20", one)):
        for chat in (one, two):
            chat.until_ready()
        asker.send(text)
        for chat in (one, two):
            expect(chat.page.locator("article.user").last).to_have_text(text, timeout=PATIENCE)
            chat.until_said("w19 ")
    for chat in (one, two):
        chat.until_ready()
        assert chat.said() == "".join(f"w{i} " for i in range(25))
        assert chat.roles() == ["user", "assistant"] * 3


def test_stop_from_a_second_device(device: Open, site: Site, chat_id: str) -> None:
    one = device()
    one.send("count 1000 30")
    one.until_said(SOME)
    two = device()
    two.until_said(SOME)
    two.button("Stop").click()
    stored = None
    for chat in (one, two):
        chat.until_ready()
        stored = stored or site.log(chat_id)[-1]
        assert stored.type == "turn.cancelled"
        # Who stops reads no further, and then shows what the log has.
        expect(chat.answer.locator(".text")).to_have_text(stored.data.message.text, timeout=PATIENCE)
    assert [event.type for event in site.log(chat_id)].count("turn.requested") == 1


@pytest.mark.parametrize("answer", ["Approve", "Deny"])
def test_approval(device: Open, site: Site, chat_id: str, answer: str) -> None:
    one = device()
    one.send("approve 5 20")
    expect(one.page.locator(".ask p")).to_have_text("Deploy?", timeout=PATIENCE)
    two = device()
    two.button(answer).click()
    said = "I need approval. " + ("w0 w1 w2 w3 w4 " if answer == "Approve" else "Then it is left undone. ")
    state = "done" if answer == "Approve" else "denied"
    for chat in (one, two):
        expect(chat.page.locator(".tool .state")).to_have_text(state, timeout=PATIENCE)
        chat.until_said(said[-5:])
        chat.until_ready()
        assert chat.said() == said
        assert chat.roles() == ["user", "assistant"]
        expect(chat.page.locator(".ask")).to_have_count(0)
    assert site.log(chat_id)[-1].type == "turn.completed"


def test_questions(device: Open, own_agents: None) -> None:
    one, two = device(), device()
    one.send_to("asker", "hello")
    one.button("there").click()
    two.page.get_by_label("Answer", exact=True).fill("because")
    two.button("Answer").click()
    for chat in (one, two):
        chat.until_said("there, because.").until_ready()
        expect(chat.page.get_by_label("Question").last.locator(".text")).to_have_text("because")
        assert chat.roles() == ["user", "assistant"]


def test_a_worker_killed_in_mid_answer(device: Open, site: Site, chat_id: str, talk: Talk) -> None:
    one, two = device(), device()
    one.send(talk.text)
    two.until_said(SOME)
    started = next(event for event in site.log(chat_id) if event.type == "turn.started")
    site.kill_worker(started.data.worker)
    site.until_started(chat_id, 2)
    talk.end()
    for chat in (one, two):
        chat.until_ready()
        assert chat.said() == talk.whole(site.answer(chat_id))


def test_the_gateway_killed_and_restarted_in_mid_answer(
    device: Open, tabs: Tabs, site: Site, chat_id: str, talk: Talk
) -> None:
    tabs.expected = ("Failed to load resource", "ERR_")
    chat = device()
    chat.send(talk.text)
    chat.until_said(SOME)
    site.restart_gateway(lambda: expect(chat.page.get_by_role("alert")).to_be_visible(timeout=PATIENCE))
    expect(chat.page.get_by_role("alert")).to_be_hidden(timeout=PATIENCE)
    talk.end()
    chat.until_ready()
    assert chat.said() == talk.whole(site.answer(chat_id))
    assert chat.roles() == ["user", "assistant"]


def test_what_is_sent_offline_is_sent_once(device: Open, tabs: Tabs, site: Site, chat_id: str) -> None:
    tabs.expected = ("Failed to load resource", "ERR_")
    chat = device()
    chat.page.context.set_offline(True)
    chat.send("hello there")
    expect(chat.page.get_by_role("alert")).to_be_visible(timeout=PATIENCE)
    chat.page.context.set_offline(False)
    chat.until_said("hello there").until_ready()
    assert chat.roles() == ["user", "assistant"]
    assert [event.type for event in site.log(chat_id)].count("turn.requested") == 1
