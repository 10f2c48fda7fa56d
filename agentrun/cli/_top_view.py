"""How ``agentrun top`` looks. Pure: what it is given is what it shows, and no more lines than it is given."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from agentrun.cli._top_data import Fleet, Run, Seen
from agentrun.cli._top_events import Line
from agentrun.cli.lines import clean

__all__ = ["picture"]

_KEYS = "↑↓ select   s stop   q quit"
_GAP = 2
_EVENTS = 8
"""Lines of events, however many there are: tables do not jump when another turn is selected."""
_ALL_PARTS = 15
"""Lines from which on there is room for workers, turns and events."""
_TWO_PARTS = 10
"""Lines from which on there is room for workers and turns."""
_ERROR = 3
"""Lines of an error, where there is room for all parts; one where there is not."""
_WIDTH = 160
"""Columns, where none are told."""


def picture(
    fleet: Fleet,
    *,
    height: int | None = None,
    width: int | None = None,
    selected: tuple[str, str] | None = None,
    events: Sequence[Line] = (),
    note: str = "",
    question: str = "",
    title: str = "",
) -> RenderableType:
    """The whole screen.

    Args:
        fleet: What is known.
        height: Lines there are: tables are cut to them and say so. None: nothing is cut, and no keys are told.
        width: Columns there are, which is where an error goes on in the next line. None: 160.
        selected: Session and turn of the selected row.
        events: The last events of the selected turn's session.
        note: What is to be said.
        question: What is asked, in place of all else at the bottom.
        title: Of the broker.
    """
    above: list[RenderableType] = [_totals(fleet, title)]
    below: list[RenderableType] = []
    if fleet.error is not None:
        most = 1 if height is not None and height < _ALL_PARTS else _ERROR
        below += _wrapped(fleet.error, width or _WIDTH, most, "bold red")
    if question or note or height is not None:
        below.append(
            _text(question or note or _KEYS, "bold black on yellow" if question else "yellow" if note else "dim")
        )
    wants = [max(len(fleet.workers), 1), max(len(fleet.runs), 1), _EVENTS]
    if height is None:
        return Group(*above, Text(), _workers(fleet, wants[0]), Text(), _runs(fleet, selected, wants[1]), *below)
    # Each part has a header and an empty line above it. Where there is no room for all, the turns stay.
    if selected is None or height < _ALL_PARTS:
        wants[2] = 0
    if height < _TWO_PARTS:
        wants[0] = 0
    room = height - len(above) - len(below) - 2 * sum(want > 0 for want in wants)
    workers, runs, lines = _share(room, wants)
    parts: list[RenderableType] = []
    if workers:
        parts += [_cut(workers, len(fleet.workers), "workers"), _workers(fleet, workers)]
    parts += [_cut(runs, len(fleet.runs), "running turns"), _runs(fleet, selected, runs)]
    if lines and selected is not None:
        parts += [Text(), _text(f"last events of {selected[0]}", "dim"), _events(list(events)[-lines:])]
        lines = min(lines, len(events))
    spare = max(room - workers - runs - lines, 0)
    return Group(*above, *parts, *(Text() for _ in range(spare)), *below)


def _share(room: int, wants: Sequence[int]) -> list[int]:
    """Deal lines out, one after the other, to whoever wants more; the turns come first, and get twice as many."""
    given = [0] * len(wants)
    order = (1, 0, 1, 2)
    while room > 0 and any(given[i] < wants[i] for i in order):
        for i in order:
            if room > 0 and given[i] < wants[i]:
                given[i] += 1
                room -= 1
    return given


def _text(text: str, style: str = "") -> Text:
    """The text on one line, and nothing in it that a terminal would obey."""
    return Text(clean(text).replace("\n", "⏎").replace("\t", " "), style, no_wrap=True, overflow="ellipsis")


def _wrapped(text: str, width: int, most: int, style: str) -> Iterator[Text]:
    """The text on as many lines as it needs, and the last of those that there may be cut."""
    lines = textwrap.wrap(_text(text).plain, width, max_lines=most, placeholder="…")
    return (_text(line, style) for line in lines)


class _Cut:
    """A text that is cut in its middle where it is too long: what tells a name from others is mostly at its end.

    Args:
        text: The text.
        head: How many characters of its beginning are kept; None: half of what there is room for.
    """

    def __init__(self, text: str, head: int | None = None) -> None:
        self._text = _text(text).plain
        self._head = head

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        width = cell_len(self._text)
        return Measurement(min(width, 8), width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        width, text = options.max_width, self._text
        if cell_len(text) > width > 0:
            head = min(width // 2 if self._head is None else self._head, width - 1)
            text = set_cell_size(text, head) + "…" + _end(text, width - head - 1)
        yield Text(text, no_wrap=True, overflow="crop")


def _end(text: str, width: int) -> str:
    """As much of the end as fits."""
    start = max(len(text) - width, 0)
    while cell_len(text[start:]) > width:
        start += 1
    return text[start:]


def _totals(fleet: Fleet, title: str) -> Text:
    line = _text("agentrun ", "bold")
    line.append(f"{_text(title).plain}   ", "dim not bold")
    if not fleet.known:
        return line.append("asking …", "yellow")
    used, slots = fleet.slots
    for number, name in (
        (f"{len(fleet.workers)}", "worker" if len(fleet.workers) == 1 else "workers"),
        (f"{used}/{slots}", "slots"),
        (f"{fleet.waiting}", "waiting"),
        (f"{fleet.rate:.0f}", "tokens/s"),
    ):
        line.append(number, "bold cyan")
        line.append(f" {name}   ", "not bold")
    if fleet.dead:
        line.append(f"{fleet.dead} gave up   ", "bold red")
    if len(fleet.queues) > 1:
        for queue in fleet.queues:
            if queue.waiting:
                line.append(f"{_text(queue.agent).plain}: {queue.waiting} wait   ", "yellow not bold")
    line.rstrip()
    return line


class _Column(NamedTuple):
    name: str
    share: int
    """Of the width that is left; 0: it is as wide as it must be."""
    least: int
    """Its least width."""
    rank: int
    """Where there is no room for all columns, those of the highest rank are left out."""
    number: bool = False


class _Grid:
    """A table of as many columns as there is room for."""

    def __init__(self, *columns: _Column) -> None:
        self._columns = columns
        self._rows: list[tuple[Sequence[RenderableType], str]] = []

    def add(self, cells: Sequence[RenderableType], style: str = "") -> None:
        self._rows.append((cells, style))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        kept = set(self._columns)
        for column in sorted(self._columns, key=lambda column: -column.rank):
            if sum(each.least + _GAP for each in kept) > options.max_width and len(kept) > 1:
                kept.remove(column)
        shown = [i for i, column in enumerate(self._columns) if column in kept]
        table = Table(expand=True, box=None, header_style="dim", padding=(0, _GAP, 0, 0), pad_edge=False)
        for column in (self._columns[i] for i in shown):
            table.add_column(
                column.name,
                ratio=column.share or None,
                min_width=column.least,
                justify="right" if column.number else "left",
                no_wrap=True,
                overflow="ellipsis",
            )
        for cells, style in self._rows:
            table.add_row(*(cells[i] for i in shown if i < len(cells)), style=style)
        yield table


_WORKERS = (
    _Column("worker", 4, 8, 0), _Column("host", 2, 4, 4), _Column("agents", 5, 6, 3), _Column("busy", 0, 5, 1, True),
    _Column("tok/s", 0, 5, 5, True), _Column("state", 0, 12, 2),
)  # fmt: skip
_VERSION = _Column("version", 1, 7, 6)
_RUNS = (
    _Column("session", 4, 8, 0), _Column("turn", 3, 6, 4), _Column("agent", 3, 5, 6), _Column("try", 0, 3, 7, True),
    _Column("age", 0, 4, 1, True), _Column("tokens", 0, 6, 5, True), _Column("tok/s", 0, 5, 3, True),
    _Column("worker", 4, 8, 2),
)  # fmt: skip


def _workers(fleet: Fleet, room: int) -> _Grid:
    several = len({seen.info.version for seen in fleet.workers.values()}) > 1
    grid = _Grid(*_WORKERS, *([_VERSION] if several else []))
    for seen in list(fleet.workers.values())[:room]:
        info = seen.info
        grid.add((
            _Cut(info.worker), _Cut(info.host), _text(_agents(seen)), Text(f"{len(info.running)}/{info.slots}"),
            Text(f"{seen.rate:.0f}"), _state(fleet, seen), _text(info.version),
        ))  # fmt: skip
    if not fleet.workers and room:
        grid.add([Text("none answers" if fleet.known else "…", "yellow")])
    return grid


def _agents(seen: Seen) -> str:
    load = seen.info.load
    if len(load) > 1:
        return " ".join(f"{each.agent} {each.running}/{each.slots}" for each in load)
    return ",".join(seen.info.agents)


def _state(fleet: Fleet, seen: Seen) -> Text:
    if fleet.silent(seen):
        return Text(f"silent {seen.unheard:.0f} s", "bold red")
    return Text("draining", "yellow") if seen.info.draining else Text(f"up {_age(seen.info.uptime)}", "green")


def _runs(fleet: Fleet, selected: tuple[str, str] | None, room: int) -> _Grid:
    grid = _Grid(*_RUNS)
    for run in _around(fleet.runs, selected, room):
        info = run.info
        silent = fleet.silent(fleet.workers[run.worker])
        where = Text("stopping", "yellow") if info.stopping and not silent else _Cut(run.worker)
        cells = (
            _Cut(info.session), _Cut(info.turn), _text(info.agent), Text(str(info.attempt)),
            Text(_age(info.seconds)), Text(str(info.tokens)), Text(f"{run.rate:.0f}"), where,
        )  # fmt: skip
        grid.add(cells, "reverse" if run.key == selected else "dim" if silent else "")
    if not fleet.runs and room:
        grid.add([Text("none", "dim")])
    return grid


def _around(runs: Sequence[Run], selected: tuple[str, str] | None, room: int) -> Sequence[Run]:
    """As many as there is room for, the selected one among them."""
    at = next((i for i, run in enumerate(runs) if run.key == selected), 0)
    start = min(max(at - room // 2, 0), max(len(runs) - room, 0))
    return runs[start : start + room]


def _events(lines: Sequence[Line]) -> Table:
    table = Table(expand=True, box=None, show_header=False, padding=(0, _GAP, 0, 0), pad_edge=False)
    for width, ratio in ((13, None), (17, None), (None, 1), (None, 2)):
        table.add_column(width=width, ratio=ratio, no_wrap=True, overflow="ellipsis")
    for line in lines:
        where = f"{line.first}–{line.last}" if line.last > line.first else f"{line.first}" if line.first else ""
        if line.tokens is None:
            text: RenderableType = _text(line.text)
        else:
            tokens = f"{line.tokens} tokens  "
            text = _Cut(tokens + line.text, len(tokens))
        table.add_row(Text(where, "dim", justify="right"), _text(line.type, _style(line.type)), _Cut(line.turn), text)
    return table


def _style(type: str) -> str:
    match type:
        case "turn.completed":
            return "green"
        case "turn.failed" | "turn.expired" | "input.rejected" | "gap":
            return "red"
        case "turn.cancelled" | "turn.cancel" | "turn.retrying":
            return "yellow"
        case _:
            return "cyan"


def _cut(room: int, number: int, name: str) -> Text:
    """The line above a table: how much of it is shown, where that is not all."""
    return _text(f"{room} of {number} {name}" if number > room else "", "dim")


def _age(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
