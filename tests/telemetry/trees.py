"""Spans as a tree of text, so that a test shows the whole of what is exported."""

from __future__ import annotations

from collections.abc import Sequence

from opentelemetry.sdk.trace import ReadableSpan

from agentrun.telemetry.names import Attr


def tree(spans: Sequence[ReadableSpan]) -> str:
    """One line a span, in the order they began, below its parent: name, outcome, attempt, events and links.

    A link is named by what it is and the span it leads to; one that was never exported (its process was killed) is
    "not exported".
    """
    ids = {span.context.span_id: span for span in spans if span.context}
    lines: list[str] = []

    def walk(parent: int | None, depth: int) -> None:
        for span in sorted(spans, key=lambda span: span.start_time or 0):
            above = span.parent.span_id if span.parent and span.parent.span_id in ids else None
            if above == parent and span.context:
                lines.append("  " * depth + line(span))
                walk(span.context.span_id, depth + 1)

    def line(span: ReadableSpan) -> str:
        attributes = dict(span.attributes or {})
        words = [span.name]
        words += [f"#{attributes[Attr.ATTEMPT]}"] if Attr.ATTEMPT in attributes else []
        words += [str(attributes[key]) for key in (Attr.OUTCOME, Attr.RECEIPT, Attr.STOP_CAUSE) if key in attributes]
        words += [f"error={attributes[Attr.ERROR_TYPE]}"] if Attr.ERROR_TYPE in attributes else []
        words += [f"({event.name.removeprefix('agentrun.')})" for event in span.events]
        for link in span.links:
            there = ids.get(link.context.span_id)
            number = f" #{(there.attributes or {}).get(Attr.ATTEMPT)}" if there and there.name[:7] == "process" else ""
            name = there.name + number if there else "not exported"
            words.append(f"[{(link.attributes or {})[Attr.LINK]}: {name}]")
        return " ".join(words)

    walk(None, 0)
    return "\n".join(lines)


def shape(text: str) -> str:
    """An expected tree, as it stands indented in a test."""
    lines = text.strip("\n").splitlines()
    margin = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    return "\n".join(line[margin:].rstrip() for line in lines).rstrip()
