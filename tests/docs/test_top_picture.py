"""The picture of ``agentrun top`` is what it looks like."""

from __future__ import annotations

import html
import re
from pathlib import Path

from tests.docs.top_picture import draw

PICTURE = Path(__file__).parents[2] / "docs" / "top.svg"


def test_the_picture_shows_what_is_shown() -> None:
    # Its words, not its drawing: that is another with other versions of rich.
    shown = html.unescape(" ".join(re.findall(r"<text class=\"top-r.*?>(.*?)</text>", PICTURE.read_text())))
    words = draw().export_text().split()
    assert len(words) > 100
    assert shown.split() == words, "python -m tests.docs.top_picture docs/top.svg"
