"""That the benches would see what they say they saw not."""

from __future__ import annotations

import pytest

from agentrun import wire
from agentrun.cli._bench_report import Report, quantile, spread
from agentrun.cli._bench_watch import TurnSeen, Words
from agentrun.client import Event


def count(text: str, expected: int) -> tuple[int, int, int]:
    words = Words()
    for word in text.split():
        words.word(word)
    words.end(expected)
    return words.seen, words.lost, words.doubled


@pytest.mark.parametrize(
    ("text", "counted"),
    [
        ("w0 w1 w2@7 w3", (4, 0, 0)),
        ("w0 w1 w3", (3, 1, 0)),
        ("w0 w1 w2", (3, 1, 0)),
        ("", (0, 4, 0)),
        ("w1 w2 w3", (3, 1, 0)),
        ("w0 w1 w1 w2 w3", (4, 0, 1)),
        ("w0 w1 w2 w0 w1 w2 w3", (4, 0, 3)),
        ("w0 w2 w1 w3", (3, 1, 1)),
    ],
)
def test_words(text: str, counted: tuple[int, int, int]) -> None:
    assert count(text, 4) == counted


def seen_of(*texts: str, stored: str) -> TurnSeen:
    seen = TurnSeen()
    events: list[wire.KnownEvent] = [wire.TextDelta(turn="t", attempt=1, text=text) for text in texts]
    message = wire.Message([wire.TextPart(stored)])
    events.append(wire.TurnCompleted(turn="t", attempt=1, turn_offset=1, message=message))
    for offset, event in enumerate(events, 1):
        seen.take(Event(offset, wire.encode(event)), 1_000 * offset)
    return seen


def test_merged_tokens_count_by_their_own_stamps() -> None:
    seen = seen_of("w0@100 ", "w1@200 w2@300 ", stored="w0@100 w1@200 w2@300 ")
    assert list(seen.delays) == [900, 1_800, 1_700]
    assert (seen.appends, seen.first, seen.first_stamp, seen.last_stamp, seen.ended) == (2, 1_000, 100, 300, 3_000)
    assert seen.as_stored


def test_an_answer_that_differs_from_what_was_streamed() -> None:
    assert not seen_of("w0@1 ", stored="w0@1 w1@2 ").as_stored


def test_a_broken_promise_is_reported() -> None:
    report = Report({})
    report.expect("words lost", 0, 0)
    report.expect("words doubled", 2, 0)
    assert report.violations == ["words doubled: 2, expected 0"]


def test_quantiles() -> None:
    values = [float(n) for n in range(1, 101)]
    assert quantile(values, 0.5) == 51
    assert quantile(values, 0.99) == 100
    assert quantile([], 0.5) is None
    assert spread("x", [3.0]) == {"x_p50_ms": 3.0, "x_p99_ms": 3.0}
