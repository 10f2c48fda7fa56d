"""The page's modules by themselves, in the browser: the fold against Python's, text, the timeline's rows."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from playwright.sync_api import Browser, Page, Route

from agentrun import wire
from agentrun.history import History, TurnView

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "unit"))

from session_logs import Log, sessions  # noqa: E402

STATIC = ROOT / "agentrun" / "gateway" / "static"
thorough = settings(
    max_examples=80,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)

FOLD = """
([items, again]) => {
  const session = new modules.session.Session()
  for (const item of items) session.apply(item)
  for (const item of items.slice(again)) session.apply(item)
  const plain = (view) => ({
    ...Object.fromEntries(names.map((name) => [name, view[name]])),
    parts: view.parts,
    questions: [...view.questions.values()].map((q) => ({
      event: q.event, offset: q.offset, answer: q.answer, answer_offset: q.answer_offset, resumed: q.resumed,
    })),
  })
  return { offset: session.offset, turns: [...session.turns.values()].map(plain) }
}
"""
DELTAS = ("text.delta", "reasoning.delta", "tool.input.delta", "tool.progress")
NAMES = (
    "id", "offset", "agent", "request", "state", "attempt", "charged", "worker", "last_out", "usage", "error",
    "finish_reason", "by", "reason", "rolled_back", "ended", "ended_at", "consumed_by", "steers", "stop",
    "interrupted_by", "rollback", "replaced_by", "suspended_until", "retry_at", "incomplete", "tokens",
)  # fmt: skip


@pytest.fixture(scope="module")
def page(browser: Browser) -> Iterator[Page]:
    """An empty page that has loaded the modules."""

    def serve(route: Route) -> None:
        name = route.request.url.rpartition("/")[2]
        if name.endswith(".js"):
            route.fulfill(path=STATIC / name, content_type="text/javascript")
        else:
            route.fulfill(body="<!doctype html><title>modules</title>", content_type="text/html")

    context = browser.new_context()
    page = context.new_page()
    page.route("**/*", serve)
    page.goto("http://modules.test/")
    page.evaluate(
        """async (names) => {
          window.names = names
          window.modules = {}
          for (const name of ['session', 'rows', 'text', 'message']) modules[name] = await import(`./${name}.js`)
        }""",
        list(NAMES),
    )
    yield page
    context.close()


def items(log: Log, limit: int = 1 << 30) -> list[dict[str, Any]]:
    """The log as the gateway gives it; events larger than ``limit`` in chunks."""
    found: list[dict[str, Any]] = []
    for _, event in log:
        if isinstance(event, wire.UnknownEvent):
            bodies = [event.raw]
        elif isinstance(event, wire.TurnRequested | wire.TurnAnswer | wire.TurnCancel | wire.Snapshot | wire.Gap):
            bodies = [wire.encode(event)]
        else:
            bodies = wire.split(event, limit)
        for body in bodies:
            found.append({"offset": len(found) + 1, "time": 100.0 + len(found), "event": json.loads(body)})
    return found


def python_fold(items: list[dict[str, Any]]) -> dict[str, Any]:
    history = History()
    for item in items:
        try:
            event = wire.decode(json.dumps(item["event"]).encode())
        except wire.InvalidInput:
            event = wire.UnknownEvent("", b"{}")
        history.apply(item["offset"], event, time=item["time"])
    return {"offset": history.offset, "turns": [plain(view) for view in history.turns.values()]}


def plain(view: TurnView) -> dict[str, Any]:
    shown: dict[str, Any] = {name: getattr(view, name) for name in NAMES}
    shown["parts"] = view.message.parts
    shown["questions"] = [
        {
            "event": q.event,
            "offset": q.offset,
            "answer": q.answer,
            "answer_offset": q.answer_offset,
            "resumed": q.resumed,
        }
        for q in view.questions.values()
    ]
    return msgspec.to_builtins(shown)


def normal(value: Any) -> Any:
    """Without what is left out when it has its default: it says the same whether it is there or not."""
    if isinstance(value, dict):
        return {
            k: normal(v) for k, v in value.items() if v not in (None, "", False, {}) or k in ("output", "input", "data")
        }
    return [normal(v) for v in value] if isinstance(value, list) else value


def test_the_fold_is_the_one_of_python(page: Page) -> None:
    folded = 0

    @seed(3)
    @thorough
    @given(sessions(), st.integers(600, 2000), st.data())
    def check(log: Log, limit: int, data: st.DataObject) -> None:
        nonlocal folded
        # As it is met by a reader: in chunks, not to its end yet, and without some of the deltas, which expire.
        given = items(log, limit)
        given = [item for item in given if item["event"]["type"] not in DELTAS or data.draw(st.integers(0, 3))]
        del given[data.draw(st.integers(0, len(given))) :]
        again = data.draw(st.integers(0, len(given)))
        assert normal(page.evaluate(FOLD, [given, again])) == normal(python_fold(given))
        folded += 1

    check()
    assert folded >= 80


def requested(turn: str, **more: Any) -> dict[str, Any]:
    return {"type": "turn.requested", "turn": turn, "agent": "a", "input": turn, **more}


def started(turn: str, attempt: int = 1, **more: Any) -> dict[str, Any]:
    return {"type": "turn.started", "turn": turn, "attempt": attempt, "worker": f"w{attempt}", "lease": "l", **more}


def text(turn: str, said: str, attempt: int = 1, **more: Any) -> dict[str, Any]:
    return {"type": "text.delta", "turn": turn, "attempt": attempt, "text": said, **more}


def message(said: str) -> dict[str, Any]:
    return {"role": "assistant", "parts": [{"type": "text", "text": said}]}


def at_offsets(*events: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"offset": i, "time": 100.0 + i, "event": event} for i, event in enumerate(events, 1)]


@pytest.mark.parametrize(
    "events",
    [
        pytest.param(
            [requested("a"), started("a"), requested("b", replaces="a"), requested("c"), requested("d", replaces="a")],
            id="replaces",
        ),
        pytest.param(
            [
                requested("a"),
                started("a"),
                text("a", "Hel"),
                started("a", 2, resumes_from=9, message=message("Hello")),
                text("a", "!", 2),
                text("a", "late", 1),
                started("a", 3, message=message("Hello!")),
                {"type": "tool.progress", "turn": "a", "attempt": 3, "call": "c", "data": 1},
                text("a", "new", 3),
                {"type": "turn.released", "turn": "a", "attempt": 3},
                {"type": "turn.expired", "turn": "a", "attempt": 0, "turn_offset": 1, "reason": "late"},
                text("a", "more", 3),
            ],
            id="attempts",
        ),
        pytest.param([requested("a", replaces="b"), requested("b", replaces="b")], id="replaces-itself"),
        pytest.param(
            [
                {"type": "gap", "from": 1, "to": 1, "reason": "trimmed"},
                text("a", "lo", 3),
                {"type": "turn.completed", "turn": "a", "attempt": 3, "turn_offset": 1, "message": message("Hello")},
            ],
            id="trimmed",
        ),
        pytest.param(
            [
                requested("a"),
                started("a"),
                text("a", "?", index=4),
                {"type": "snapshot", "turn": "a", "attempt": 1, "from": 4, "to": 4, "message": message("Hello wor")},
                text("a", "ld", index=9, count=2),
                {"type": "gap", "from": 6, "to": 6},
                started("a", 2, resumes_from=6),
                text("a", "!", 2),
            ],
            id="snapshot-and-gap",
        ),
        pytest.param(
            [
                requested("a"),
                started("a"),
                {
                    "type": "input.required",
                    "turn": "a",
                    "attempt": 1,
                    "request": "r",
                    "kind": "choice",
                    "choices": ["x"],
                },
                {"type": "turn.answer", "turn": "a", "request": "r", "value": "red"},
                {"type": "input.rejected", "turn": "a", "attempt": 1, "offset": 4, "code": "invalid", "reason": "no"},
                {"type": "turn.answer", "turn": "a", "request": "r", "value": "x", "user": "u"},
                {"type": "turn.suspended", "turn": "a", "attempt": 1, "requests": ["r"], "message": message("so far")},
                {"type": "turn.resumed", "turn": "a", "attempt": 1, "request": "r", "answer": 6},
            ],
            id="answers",
        ),
        pytest.param(
            [
                requested("a"),
                started("a"),
                {"type": "text.delta", "turn": "a", "attempt": 1},
                {"type": "tool.call", "turn": "a", "attempt": 1, "call": "c", "name": 7, "input": {}},
                {"type": "unusable"},
                {"type": "new.kind", "turn": "a"},
                {"type": "toString"},
                text("a", "said"),
            ],
            id="not-usable",
        ),
    ],
)
def test_the_fold_of_what_random_logs_have_not(page: Page, events: list[dict[str, Any]]) -> None:
    given = at_offsets(*events)
    for end in range(len(given) + 1):
        assert normal(page.evaluate(FOLD, [given[:end], 0])) == normal(python_fold(given[:end]))


def test_text_is_kept_character_by_character(page: Page) -> None:
    pieces = st.sampled_from(
        ["`", "``", "```", "```py", "~~~", "\n", "\n\n", "**", "a", " ", "# ", "- x", "<b>", "é😀", "`c`", "**d**"]
    )

    @seed(4)
    @thorough
    @given(st.lists(pieces, max_size=30))
    def check(pieces: list[str]) -> None:
        shown = page.evaluate(
            """(pieces) => {
              const grown = new modules.text.TextView()
              let text = ''
              for (const piece of pieces) grown.grow((text += piece))
              grown.update(text, true)
              const whole = new modules.text.TextView()
              whole.update(text, true)
              const [one, two] = [grown.element, whole.element]
              return [one.textContent, two.textContent, one.innerHTML === two.innerHTML]
            }""",
            pieces,
        )
        assert shown == ["".join(pieces), "".join(pieces), True]

    check()


def test_fences_and_markup_look_like_it(page: Page) -> None:
    html = page.evaluate(
        """(text) => {
          const view = new modules.text.TextView()
          view.update(text, true)
          return [...view.element.querySelectorAll('pre, strong, code')].map((e) => [e.tagName, e.textContent])
        }""",
        "# Title\nSome **bold** and `code <b>`.\n```python\nif a < b:\n    pass\n```\nend",
    )
    assert html == [
        ["STRONG", "Title"],
        ["STRONG", "bold"],
        ["CODE", "code <b>"],
        ["PRE", "if a < b:\n    pass\n"],
        ["CODE", "if a < b:\n    pass\n"],
    ]


def rows(page: Page, *events: dict[str, Any]) -> list[list[Any]]:
    return page.evaluate(
        """(items) => {
          const timeline = new modules.rows.Timeline()
          for (const item of items) timeline.add(item)
          return timeline.rows.map((row) => [row.range, row.title, row.note, row.superseded])
        }""",
        at_offsets(*events),
    )


def test_a_run_of_deltas_is_one_row_and_a_takeover_is_said(page: Page) -> None:
    assert rows(
        page,
        requested("a", device="phone"),
        started("a"),
        *(text("a", f"w{i} ", count=2) for i in range(500)),
        started("a", 2, resumes_from=502),
        text("a", "end", 2),
        {"type": "turn.cancelled", "turn": "a", "attempt": 2, "turn_offset": 1, "by": "ann", "reason": "from desk"},
    ) == [
        ["1", "Sent", "phone: a", False],
        ["2", "Started", "by w1", False],
        ["3–502", "Text", "1000 tokens · " + " ".join(f"w{i}" for i in range(25)) + "…", False],
        ["503", "Taken over", "w1 was lost; w2 goes on after 502", False],
        ["504", "Text", "1 token · end", False],
        ["505", "Stopped", "by ann, from desk", False],
    ]


def test_what_does_not_count_any_more_is_marked(page: Page) -> None:
    error = {"code": "c", "message": "no"}
    found = rows(
        page,
        requested("a"),
        started("a"),
        text("a", "old"),
        {"type": "turn.retrying", "turn": "a", "attempt": 1, "error": error, "after": 1},
        started("a", 2),
        text("a", "new", 2),
        {"type": "turn.completed", "turn": "a", "attempt": 2, "turn_offset": 1, "message": message("new")},
        requested("b", replaces="a"),
        started("b"),
        text("b", "other"),
        requested("c", on_busy="rollback"),
        {"type": "turn.cancelled", "turn": "b", "attempt": 1, "turn_offset": 8, "by": "c", "rolled_back": True},
        {"type": "unusable"},
        {"type": "new.kind"},
    )
    assert [(title, note) for _, title, note, gone in found if gone] == [
        ("Text", "1 token · old"),
        ("Text", "1 token · new"),
        ("Text", "1 token · other"),
    ]
    assert found[3][1:3] == ["Retry", "no · again in 1 s"]
    assert found[4][1:3] == ["Started over", "by w2"]
    assert found[11][1:3] == ["Stopped", "by the message at 11, taken back"]
    assert [title for _, title, _, _ in found[12:]] == ["Unusable record", "new.kind"]
