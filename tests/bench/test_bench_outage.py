"""P8, by the process: while the broker is away a worker's memory stays bounded, and afterwards nothing is missing."""

from __future__ import annotations

from tests.bench.outage import measure


def test_an_outage_pauses_the_agents_at_their_buffer_and_loses_nothing() -> None:
    figures = measure(turns=10, rate=200, outage=5.0, buffer=200)
    # At its rate each would have said 1,000: the buffer, what was in flight, and the one that waits.
    assert 150 <= figures.said_during_most <= 260
    assert (figures.lost, figures.doubled, figures.attempts) == (0, 0, 10)
    # 10 x 200 tokens of some 30 bytes are nothing; unbounded, it would not be told from this, but a leak would.
    assert figures.rss_most_during - figures.rss_before < 30
    assert figures.rss_most_after - figures.rss_before < 60
