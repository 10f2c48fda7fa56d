"""What the browser tests run against: real processes, and tabs of a real browser."""

from __future__ import annotations

import os
import re
import signal
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect

from agentrun.brokers.server import NatsServer
from agentrun.client import Event
from tests.e2e.processes import Cli, Running, new_cli

PATIENCE = 15_000
STATIC = "agentrun/gateway/static"
T = TypeVar("T")


class Site:
    """A gateway and two workers on a namespace of their own.

    Attributes:
        url: The page's address.
    """

    def __init__(self, server: NatsServer) -> None:
        self._server = server
        self._thread = ThreadPoolExecutor(1)
        self.cli: Cli = self._away(lambda: new_cli(server.url))
        self._workers = {name: self.start_worker(name) for name in ("one", "two")}
        self.gateway = self.start_gateway()
        self.url = self.address_of(self.gateway)

    def _away(self, work: Callable[[], T]) -> T:
        """Do what needs an event loop in another thread: the browser has one in ours."""
        return self._thread.submit(work).result()

    def start_worker(self, name: str, agent: str = "tests.browser.agents:echo") -> Running:
        return self.cli.worker(name, agent=agent)

    def start_gateway(self, *flags: object, port: int = 0, env: dict[str, str] | None = None) -> Running:
        flags = ("--page", "--list-sessions", "--agent", "echo", "--port", port, *(flags or ("--insecure",)))
        gateway = self.cli.start("gateway", *flags, env=env)
        gateway.until("gateway on")
        return gateway

    @property
    def port(self) -> int:
        port = urlsplit(self.url).port
        assert port is not None
        return port

    def address_of(self, gateway: Running) -> str:
        return gateway.until(r"gateway on (http://\S+?),?\s")[1]

    @contextmanager
    def broker_away(self) -> Iterator[None]:
        """The broker answers nobody while the context is open."""
        assert self._server.pid is not None
        os.kill(self._server.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self._server.pid, signal.SIGCONT)

    def restart_gateway(self, between: Callable[[], object] = lambda: None) -> None:
        """Kill the gateway, do something, and start it again at the same address."""
        self.gateway.signal(signal.SIGKILL)
        self.gateway.process.wait()
        between()
        self.gateway = self.start_gateway(port=self.port)

    def kill_worker(self, name: str) -> None:
        """Kill a worker as a crash would, and start another of its name."""
        self._workers[name].signal(signal.SIGKILL)
        self._workers[name].process.wait()
        self._workers[name] = self.start_worker(name)

    def send(self, session: str, text: str, id: str, **more: Any) -> None:
        agent = more.pop("agent", "echo")
        self._away(lambda: self.cli.ask(lambda c: c.session(session, agent=agent).send(text, id=id, **more)))

    def log(self, session: str) -> list[Event]:
        return self._away(lambda: self.cli.log(session))

    def answer(self, session: str) -> str:
        """The last turn's answer as it is stored."""
        return self.log(session)[-1].data.message.text

    def until_started(self, session: str, attempts: int) -> None:
        """Wait until a session's turns were begun so often."""
        self._away(lambda: self.cli.events_until(session, "turn.started", attempts))

    def end(self) -> None:
        self.cli.end()
        self._thread.shutdown()


class Talk:
    """A message whose answer goes on, a word every 40 ms, until the test has done what it does in mid-answer."""

    def __init__(self, path: Path) -> None:
        self.text = f"talk {path}"
        self._path = path

    def end(self) -> None:
        """Let the answer come to its end, a few words later."""
        self._path.touch()

    @staticmethod
    def whole(text: str) -> str:
        """The text, which must be every word from the first on, in order."""
        assert text == "".join(f"w{i} " for i in range(text.count(" ")))
        return text


class Tab:
    """A tab that shows one session."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.problems: list[str] = []
        self.hosts: set[str] = set()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda m: self.problems.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: self.problems.append(str(e)))
        page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))

    def open(self, session: str) -> Tab:
        self.page.goto(f"{self.url}/?session={session}")
        return self.live()

    def live(self) -> Tab:
        expect(self.connection).to_have_text("Live", timeout=PATIENCE)
        return self

    @property
    def connection(self) -> Locator:
        return self.page.locator("#connection .words")

    def type(self, text: str) -> None:
        self.page.get_by_role("textbox", name="Message", exact=True).fill(text)

    def send(self, text: str) -> None:
        self.type(text)
        self.page.keyboard.press("Enter")

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    def turn(self, number: int = -1) -> Locator:
        return self.page.locator(".turn:not(.sending)").nth(number)

    def until(self, state: str, number: int = -1) -> Tab:
        """Wait until a turn, the last one if not said otherwise, stands so."""
        expect(self.turn(number)).to_have_attribute("data-state", state, timeout=PATIENCE)
        return self

    def said(self, number: int = -1) -> str:
        """The text of a turn's answer, as it stands in the document."""
        return self.turn(number).evaluate("t => [...t.querySelectorAll('.text')].map(e => e.textContent).join('')")

    def said_at_rest(self) -> str:
        """The last answer's text, once a second has brought nothing new."""
        said = None
        while said != (now := self.said()):
            said = now
            self.page.wait_for_timeout(1000)
        return now

    def until_said(self, text: str) -> Tab:
        """Wait until the last answer has come so far."""
        self.page.wait_for_function(
            "text => [...document.querySelectorAll('.turn:last-child .text')].some(e => e.textContent.includes(text))",
            arg=text,
        )
        return self

    def rows(self, title: str) -> Locator:
        """Rows of the timeline that are in the document."""
        return self.page.locator("#rows li").filter(has=self.page.locator(".what", has_text=re.compile(f"^{title}$")))


class Tabs:
    """Opens tabs, each in a browser context of its own: another device."""

    def __init__(self, browser: Browser, site: Site, stack: ExitStack) -> None:
        self.session = f"s-{uuid.uuid4().hex[:8]}"
        self._browser = browser
        self._site = site
        self._stack = stack
        self._tabs: list[Tab] = []
        self.expected: tuple[str, ...] = ()
        """What the browser may report: failed requests, where a test makes them fail."""

    def device(self, name: str | None = None, **options: Any) -> BrowserContext:
        context = self._browser.new_context(**{"viewport": {"width": 1360, "height": 860}, **options})
        self._stack.callback(context.close)
        if name is not None:
            context.add_init_script(f"localStorage.setItem('agentrun.device', {name!r}.replace(/.*/, JSON.stringify))")
        return context

    def blank(self, context: BrowserContext | None = None, url: str | None = None) -> Tab:
        """A tab that shows nothing yet."""
        tab = Tab((context or self.device()).new_page(), url or self._site.url)
        self._tabs.append(tab)
        return tab

    def open(self, session: str | None = None, *, name: str | None = None, **options: Any) -> Tab:
        """A tab on another device, with the session of this test or another."""
        return self.blank(self.device(name, **options)).open(session or self.session)

    def check(self) -> None:
        for tab in self._tabs:
            problems = [p for p in tab.problems if not any(expected in p for expected in self.expected)]
            assert not problems, problems
            assert tab.hosts <= {urlsplit(tab.url).netloc}, tab.hosts
