"""A picture of ``agentrun top`` for the documents: ``python -m tests.docs.top_picture docs/top.svg`` makes it anew."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from rich.console import Console

from agentrun import wire
from agentrun.broker import QueueStats
from agentrun.cli._top_data import Fleet
from agentrun.cli._top_events import Recently
from agentrun.cli._top_view import picture
from agentrun.client import Event
from agentrun.worker import AgentLoad, RunningTurn, WorkerInfo

WIDTH, HEIGHT = 104, 27


def _worker(name: str, host: str, *turns: RunningTurn, up: float, draining: bool = False) -> WorkerInfo:
    agents = ["support", "research"]
    load = [AgentLoad(agent, 20, sum(turn.agent == agent for turn in turns)) for agent in agents]
    return WorkerInfo(name, host, 7, agents, 40, draining, list(turns), load, up, "0.1.0")


def _fleet() -> Fleet:
    """Four workers: one drains, one has died."""
    fleet = Fleet()
    queues = [QueueStats("research", 3, 2, 30.0), QueueStats("support", 0, 4, 30.0)]
    for second in range(6):

        def turn(
            session: str,
            id: str,
            agent: str,
            age: float,
            speed: float,
            attempt: int = 1,
            stopping: bool = False,
            s: int = second,
        ) -> RunningTurn:
            return RunningTurn(session, id, agent, attempt, age + s, int((age + s) * speed), stopping)

        workers = [
            _worker(
                "worker-7d9f8b-x2kqp",
                "node-a",
                turn("c-8801", "q-5f2a", "support", 4.0, 61.0),
                turn("c-1744", "q-90be", "research", 212.0, 8.0),
                turn("c-5120", "q-77d1", "support", 11.0, 58.0, stopping=True),
                up=93_784.0 + second,
            ),
            _worker(
                "worker-7d9f8b-m8ztn",
                "node-b",
                turn("c-3092", "q-1c40", "support", 1.0, 66.0, attempt=2),
                turn("c-4410", "q-b3a9", "research", 95.0, 12.0),
                up=93_782.0 + second,
            ),
            _worker(
                "worker-6c44d1-9hvlw",
                "node-a",
                turn("c-2218", "q-e7c5", "support", 38.0, 49.0),
                up=3_605.0,
                draining=True,
            ),
        ]
        died = _worker("worker-7d9f8b-tt4rc", "node-c", turn("c-3092", "q-1c40", "support", 9.0, 60.0), up=93_780.0)
        fleet.sample(float(second), [*workers, died] if second == 0 else workers, queues)
    fleet.dead = 1
    return fleet


def _events() -> Recently:
    recently = Recently(content=False)
    names = {"turn": "q-1c40", "attempt": 1}
    events: list[wire.AnyEvent] = [
        wire.TurnRequested(turn="q-1c40", agent="support", input="…"),
        wire.TurnStarted(**names, worker="worker-7d9f8b-tt4rc", lease="1"),
        *(wire.TextDelta(**names, text="…", count=3) for _ in range(180)),
        wire.ToolCall(**names, call="1", name="lookup_order", input={}),
        wire.ToolResult(**names, call="1", output={}),
        *(wire.TextDelta(**names, text="…") for _ in range(12)),
        wire.TurnStarted(turn="q-1c40", attempt=2, worker="worker-7d9f8b-m8ztn", lease="2", resumes_from=201),
        *(wire.TextDelta(turn="q-1c40", attempt=2, text="…", count=6) for _ in range(66)),
    ]
    for offset, event in enumerate(events, 5):
        recently.add(Event(offset, b"", decoded=event))
    return recently


def draw() -> Console:
    """The picture, recorded."""
    console = Console(
        record=True, width=WIDTH, height=HEIGHT, file=io.StringIO(), color_system="truecolor", force_terminal=True
    )
    console.print(
        picture(
            _fleet(), height=HEIGHT, selected=("c-3092", "q-1c40"), events=tuple(_events().lines), title="production"
        )
    )
    return console


def main() -> None:
    svg = draw().export_svg(title="agentrun top", unique_id="top")
    # Nothing is fetched from elsewhere: the font is that of whoever looks.
    svg = re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    Path(sys.argv[1]).write_text(re.sub(r"\s*<!-- .*? -->", "", svg))


if __name__ == "__main__":
    main()
