"""How ``agentrun top`` looks. Pure: what it is given is what it shows."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from agentrun.cli._top_data import Fleet, Run, Seen
from agentrun.cli.lines import clean

__all__ = ["picture"]

_KEYS = "↑↓ select   s stop   q quit"


def picture(
    fleet: Fleet,
    *,
    now: float,
    height: int,
    selected: tuple[str, str] | None = None,
    events: Sequence[str] = (),
    note: str = "",
    title: str = "",
) -> RenderableType:
    """The whole screen.

    Args:
        fleet: What is known.
        now: The time, on the monotonic clock.
        height: Lines there are; tables are cut to them and say so.
        selected: Session and turn of the selected row.
        events: The last events of the selected turn's session, a line each.
        note: What is to be said, in place of the keys.
        title: Of the broker.
    """
    room = max(height - 13, 4)
    tail = list(events)[-max(min(6, room // 3), 2) :]
    workers = max(min(len(fleet.workers), room // 3), 1)
    turns = max(room - workers - len(tail), 1)
    parts: list[RenderableType] = [
        _totals(fleet, title),
        _workers(fleet, now, workers),
        _runs(fleet, selected, turns),
    ]
    if selected is not None:
        lines = Text("\n".join(clean(line) for line in tail) or "…", no_wrap=True, overflow="ellipsis")
        parts.append(Panel(lines, title=f"last events of {selected[0]}", title_align="left", border_style="dim"))
    if fleet.error is not None:
        parts.append(Text(f"cannot look: {fleet.error}", "bold red", no_wrap=True, overflow="ellipsis"))
    parts.append(Text(note or _KEYS, "bold yellow" if note else "dim", no_wrap=True, overflow="ellipsis"))
    return Group(*parts)


def _totals(fleet: Fleet, title: str) -> Text:
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append("agentrun ", "bold")
    line.append(f"{title}   ", "dim")
    for number, name in (
        (f"{len(fleet.workers)}", "worker" if len(fleet.workers) == 1 else "workers"),
        (f"{len(fleet.runs)}/{fleet.slots}", "slots"),
        (f"{fleet.waiting}", "waiting"),
        (f"{fleet.rate:.0f}", "tokens/s"),
    ):
        line.append(number, "bold cyan")
        line.append(f" {name}   ")
    for queue in fleet.queues:
        if queue.waiting:
            line.append(f"{queue.agent}: {queue.waiting} wait  ", "yellow")
    return line


def _table(title: str, *columns: tuple[str, bool]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", expand=True, box=None, header_style="dim")
    for name, number in columns:
        table.add_column(name, justify="right" if number else "left", no_wrap=True, overflow="ellipsis")
    return table


def _workers(fleet: Fleet, now: float, room: int) -> Table:
    table = _table(
        f"workers{_rest(len(fleet.workers), room)}",
        ("worker", False), ("host", False), ("agents", False), ("busy", True), ("tokens/s", True), ("state", False),
    )  # fmt: skip
    for seen in list(fleet.workers.values())[:room]:
        info = seen.info
        state, style = _state(seen, now)
        table.add_row(
            info.worker,
            info.host,
            ",".join(info.agents),
            f"{len(info.running)}/{info.slots}",
            f"{seen.rate:.0f}",
            Text(state, style),
        )
    if not fleet.workers:
        table.add_row(Text("none answers", "yellow"))
    return table


def _state(seen: Seen, now: float) -> tuple[str, str]:
    if (silent := seen.silent(now)) is not None:
        return f"silent for {silent:.0f} s", "bold red"
    return ("draining", "yellow") if seen.info.draining else ("up", "green")


def _runs(fleet: Fleet, selected: tuple[str, str] | None, room: int) -> Table:
    table = _table(
        f"running turns{_rest(len(fleet.runs), room)}",
        ("session", False), ("turn", False), ("agent", False), ("try", True), ("age", True), ("tokens", True),
        ("tokens/s", True), ("worker", False),
    )  # fmt: skip
    for run in _around(fleet.runs, selected, room):
        info = run.info
        table.add_row(
            info.session,
            info.turn[:12],
            info.agent,
            str(info.attempt),
            _age(info.seconds),
            str(info.tokens),
            f"{run.rate:.0f}",
            Text("stopping", "yellow") if info.stopping else run.worker,
            style="reverse" if run.key == selected else "",
        )
    if not fleet.runs:
        table.add_row(Text("none", "dim"))
    return table


def _around(runs: Sequence[Run], selected: tuple[str, str] | None, room: int) -> Sequence[Run]:
    """As many as there is room for, the selected one among them."""
    at = next((i for i, run in enumerate(runs) if run.key == selected), 0)
    start = min(max(at - room // 2, 0), max(len(runs) - room, 0))
    return runs[start : start + room]


def _rest(number: int, room: int) -> str:
    return f", {room} of {number}" if number > room else ""


def _age(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
