"""What a person sees of the demonstration: text that streams in panes; plain lines where there is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

_SHOWN = 1200
"""Characters of a text that are shown in a pane, the last ones."""
_PLAIN = 8
"""Words that are shown of the beginning and of the end of a text."""


class Pane:
    """Text that grows.

    Args:
        title: Whose text it is.
        say: Where things that happened are said, if not between the words.
    """

    def __init__(self, title: str, say: Callable[[str], None] | None = None) -> None:
        self.title = title
        self._say = say
        self.text = Text()
        self.style = "cyan"

    def write(self, text: str) -> None:
        """Go on."""
        self.text.append(text, self.style)

    def mark(self, text: str, style: str) -> None:
        """Something that happened; from here on the text has another colour."""
        if self._say is not None:
            self._say(f"{self.title}: ({text})")
        else:
            self.text.append(f"[{text}] ", f"bold {style}")
        self.style = style

    def render(self) -> RenderableType:
        """As a panel."""
        shown = self.text
        if len(shown) > _SHOWN:
            shown = Text("… ") + shown[-_SHOWN:]
        return Panel(shown, title=self.title, title_align="left", border_style="dim")

    def plain(self) -> str:
        """As a line."""
        words = self.text.plain.split()
        if len(words) > 2 * _PLAIN:
            words = [*words[:_PLAIN], "…", *words[-_PLAIN:]]
        return " ".join(words)


class Stage:
    """The screen.

    Args:
        console: Where to.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._acts = 0

    @property
    def watched(self) -> bool:
        """Whether there is a terminal, and so perhaps a person who reads along."""
        return self._console.is_terminal

    def act(self, title: str) -> None:
        """Begin the next act."""
        self._acts += 1
        self._console.print(f"\n[bold]{self._acts}  {title}[/bold]", highlight=False)

    def say(self, text: str, style: str = "") -> None:
        """A line."""
        self._console.print(Text(f"   {text}", style), highlight=False, soft_wrap=True)

    def command(self, text: str) -> None:
        """A command that is run, or may be."""
        self._console.print(Text(f"   $ {text}", "bold"), highlight=False, soft_wrap=True)

    @contextmanager
    def panes(self, *titles: str) -> Generator[list[Pane]]:
        """Show text that streams, side by side, while the context is open."""
        if self.watched:
            panes = [Pane(title) for title in titles]
            with Live(get_renderable=lambda: _side_by_side(panes), console=self._console, refresh_per_second=20):
                yield panes
            return
        panes = [Pane(title, self.say) for title in titles]
        yield panes
        for pane in panes:
            self.say(f"{pane.title}: {pane.plain()}")

    def result(self, rows: Sequence[tuple[str, str, bool]]) -> None:
        """The table of what was counted."""
        table = Table(title="What was seen, counted", title_justify="left", title_style="bold", box=None)
        table.add_column("")
        table.add_column("")
        table.add_column("", justify="center")
        for what, seen, good in rows:
            table.add_row(what, seen, Text("ok", "green") if good else Text("WRONG", "bold red"))
        self._console.print()
        self._console.print(table)


def _side_by_side(panes: Sequence[Pane]) -> RenderableType:
    grid = Table.grid(expand=True)
    for _ in panes:
        grid.add_column(ratio=1)
    grid.add_row(*(pane.render() for pane in panes))
    return grid
