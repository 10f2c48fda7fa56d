"""Makes grafana-dashboard.json, which stands beside this: ``python deploy/observability/dashboard.py``.

What a panel says of a metric is what agentrun.telemetry.names says of it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from agentrun.telemetry.names import METRICS, Attr, prometheus_name

PLACE = Path(__file__).with_name("grafana-dashboard.json")

AGENT, OUTCOME, KIND, RECEIPT, STATUS, ROUTE = (
    attribute.replace(".", "_")
    for attribute in (Attr.AGENT, Attr.OUTCOME, Attr.KIND, Attr.RECEIPT, Attr.HTTP_STATUS, Attr.HTTP_ROUTE)
)
WINDOW = "$__rate_interval"
WIDTH, HEIGHT = 24, 8
COLOURS = {
    "completed": "green",
    "ok": "green",
    "cancelled": "blue",
    "already_ended": "semi-dark-blue",
    "suspended": "purple",
    "consumed": "semi-dark-green",
    "released": "light-blue",
    "retrying": "yellow",
    "pending": "orange",
    "expired": "orange",
    "fenced": "dark-orange",
    "failed": "red",
    "abandoned": "dark-red",
}
"""What is called by the same name has the same colour in every panel."""


class Query(NamedTuple):
    """One expression and the legend of its series."""

    expr: str
    legend: str
    exemplars: bool = False


class Panel(NamedTuple):
    """One panel; panels of a row share its width.

    Attributes:
        title: What it shows.
        of: The names that code has for the metrics, whose help is the description.
        queries: What is drawn.
        unit: Grafana's name of the unit.
        note: What else there is to know, put before the help.
        stacked: Whether the series add up to something.
        stat: Whether it is one figure, of the whole time that is looked at.
    """

    title: str
    of: tuple[str, ...]
    queries: Sequence[Query]
    unit: str = "short"
    note: str = ""
    stacked: bool = False
    stat: bool = False


def series(key: str, suffix: str = "", *more: str) -> str:
    """The series of a metric that the variables let through."""
    metric = METRICS[key]
    chosen = ['instance=~"$instance"', *more]
    if Attr.AGENT in metric.attributes:
        chosen.insert(0, f'{AGENT}=~"$agent"')
    return f"{prometheus_name(metric)}{suffix}{{{', '.join(chosen)}}}"


def rate(key: str, by: Sequence[str] = (), suffix: str = "", *more: str) -> str:
    """So many a second."""
    return f"sum{_by(by)} (rate({series(key, suffix, *more)}[{WINDOW}]))"


def http_rate(suffix: str, by: Sequence[str]) -> str:
    """The same of HTTP requests: other services have a metric of that name, so only of who has readers."""
    gateways = prometheus_name(METRICS["readers"])
    return f"sum{_by(by)} (rate({series('http_duration', suffix)}[{WINDOW}]) and on (job, instance) {gateways})"


def news(key: str, by: Sequence[str], suffix: str = "", *more: str, window: str = "5m") -> str:
    """So many in the window, those with which a series begins among them: a rate is blind to them."""
    found = series(key, suffix, *more)
    return f"sum{_by(by)} (({found} unless {found} offset {window}) or increase({found}[{window}]))"


def quantile(q: float, rates: str) -> str:
    """A quantile of the observations of a histogram."""
    return f"histogram_quantile({q:g}, {rates})"


def quantiles(key: str, label: str, qs: Sequence[float], by: Sequence[str] = (AGENT,)) -> list[Query]:
    """Quantiles of a histogram, apart for each value of the label."""
    rates = rate(key, ["le", *by], "_bucket")
    legend = f"{label} " if label else ""
    return [Query(quantile(q, rates), f"{legend}p{q * 100:g}", exemplars=True) for q in qs]


def each(label: str) -> str:
    """A legend that is the label's value."""
    return f"{{{{{label}}}}}"


def _by(labels: Sequence[str]) -> str:
    return f" by ({', '.join(labels)})" if labels else ""


BY_AGENT = each(AGENT)
FAILURES = f'{OUTCOME}!="ok"'

ROWS: dict[str, list[list[Panel]]] = {
    "Turns": [
        [
            Panel(
                "Turns that ended, per second",
                ("turns",),
                [Query(rate("turns", [OUTCOME]), each(OUTCOME))],
                stacked=True,
            ),
            Panel("Turn duration", ("turn_duration",), quantiles("turn_duration", BY_AGENT, (0.5, 0.95)), "s"),
            Panel("Queue wait", ("queue_wait",), quantiles("queue_wait", BY_AGENT, (0.5, 0.95)), "s"),
            Panel("Time to first token", ("first_token",), quantiles("first_token", BY_AGENT, (0.5, 0.95)), "s"),
        ],
        [
            Panel("Time between tokens", ("token_gap",), quantiles("token_gap", BY_AGENT, (0.5, 0.95)), "s"),
            Panel(
                "Attempts that ended, per second",
                ("attempts",),
                [Query(rate("attempts", [OUTCOME]), each(OUTCOME))],
                stacked=True,
            ),
            Panel(
                "Turns sent, per second",
                ("sends",),
                [Query(rate("sends", [OUTCOME]), each(OUTCOME))],
                note="By whoever exports metrics: gateways, and backends that do.",
                stacked=True,
            ),
            Panel("Time to send", ("send_duration",), quantiles("send_duration", BY_AGENT, (0.5, 0.99)), "s"),
        ],
    ],
    "Workers": [
        [
            Panel(
                "Turns in hand, and slots",
                ("running", "slots"),
                [
                    Query(f"sum by ({AGENT}) ({series('running')})", f"{BY_AGENT} in hand"),
                    Query(f"sum by ({AGENT}) ({series('slots')})", f"{BY_AGENT} slots"),
                ],
            ),
            Panel("Tokens per second", ("tokens",), [Query(rate("tokens", [AGENT]), BY_AGENT)], stacked=True),
            Panel(
                "Lag",
                ("waiting", "leased"),
                [
                    Query(f"max by ({AGENT}) ({series('waiting')})", f"{BY_AGENT} waiting"),
                    Query(f"max by ({AGENT}) ({series('leased')})", f"{BY_AGENT} given out"),
                ],
                note="Each worker tells it of the whole fleet; the highest is drawn.",
            ),
            Panel(
                "Takeovers and fenced attempts, per minute",
                ("takeovers", "fenced"),
                [
                    Query(f"60 * {rate('takeovers', [AGENT])}", f"{BY_AGENT} takeovers"),
                    Query(f"60 * {rate('fenced', [AGENT])}", f"{BY_AGENT} fenced"),
                ],
            ),
        ],
        [
            Panel(
                "Turns in hand, each worker",
                ("running",),
                [Query(f"sum by (instance) ({series('running')})", each("instance"))],
            ),
            Panel(
                "Tokens per second, each worker",
                ("tokens",),
                [Query(rate("tokens", ["instance"]), each("instance"))],
            ),
            Panel(
                "Fenced attempts per minute, each worker",
                ("fenced",),
                [Query(f"60 * {rate('fenced', ['instance'])}", each("instance"))],
            ),
        ],
    ],
    "Broker": [
        [
            Panel(
                "Append duration",
                ("append_duration",),
                quantiles("append_duration", each(OUTCOME), (0.5, 0.99), [OUTCOME]),
                "s",
            ),
            Panel(
                "Append duration, p99 by kind of record",
                ("append_duration",),
                [Query(quantile(0.99, rate("append_duration", ["le", KIND], "_bucket")), each(KIND))],
                "s",
            ),
            Panel(
                "Appends that did not succeed, in the five minutes before",
                ("append_duration",),
                [Query(news("append_duration", [OUTCOME, KIND], "_count", FAILURES), f"{each(OUTCOME)} {each(KIND)}")],
                note="Conflict: the session had moved on; tokens (out.delta) that meet with it were fenced off. "
                "All else are the broker's errors.",
            ),
        ],
        [
            Panel(
                "Tokens merged into one record",
                ("append_batch",),
                [
                    Query(f"{rate('append_batch', [], '_sum')} / {rate('append_batch', [], '_count')}", "mean"),
                    *(
                        Query(f"ceil({query.expr})", query.legend)
                        for query in quantiles("append_batch", "", (0.95,), [])
                    ),
                ],
            ),
            Panel(
                "Tokens per record",
                ("tokens", "appends"),
                [Query(f"{rate('tokens', [AGENT])} / {rate('appends', [AGENT])}", BY_AGENT)],
                note="All records that turns append are counted, not those of tokens alone.",
            ),
            Panel(
                "Write amplification",
                ("append_bytes", "text_bytes"),
                [Query(f"{rate('append_bytes', [AGENT])} / {rate('text_bytes', [AGENT])}", BY_AGENT)],
                "suffix:×",
                note="Bytes appended for each character of text.",
            ),
        ],
    ],
    "Stops": [
        [
            Panel(
                "Time from a stop to its receipt",
                ("cancel_duration",),
                quantiles("cancel_duration", each(RECEIPT), (0.5, 0.99), [RECEIPT]),
                "s",
                note="pending: nobody obeyed in time.",
            ),
            Panel(
                "Stops by receipt, per second",
                ("cancel_duration",),
                [Query(rate("cancel_duration", [RECEIPT], "_count"), each(RECEIPT))],
                stacked=True,
            ),
        ],
    ],
    "Gateway": [
        [
            Panel(
                "Requests per second, by status",
                ("http_duration",),
                [Query(http_rate("_count", [STATUS]), each(STATUS))],
                stacked=True,
            ),
            Panel(
                "Request duration, p99 by route",
                ("http_duration",),
                [Query(quantile(0.99, http_rate("_bucket", ["le", ROUTE])), each(ROUTE), exemplars=True)],
                "s",
            ),
            Panel(
                "Readers, and sessions watched",
                ("readers", "watched"),
                [
                    Query(f"sum ({series('readers')})", "readers"),
                    Query(f"sum ({series('watched')})", "sessions"),
                ],
                note="A session that several gateways watch counts once for each.",
            ),
        ],
        [
            Panel("Events given to readers, per second", ("events",), [Query(rate("events"), "events")]),
            Panel(
                "Reads that were resumed, per second",
                ("resumes",),
                [Query(rate("resumes"), "resumes")],
                note="Many at once: a gateway went, or the network did.",
            ),
            Panel(
                "Gaps and slow readers, per minute",
                ("gaps", "slow_readers"),
                [
                    Query(f"60 * {rate('gaps')}", "gaps"),
                    Query(f"60 * {rate('slow_readers')}", "slow readers disconnected"),
                ],
            ),
        ],
    ],
    "Dead turns": [
        [
            Panel(
                "In the time shown",
                ("dead",),
                [Query(f"sum by ({AGENT}) (increase({series('dead')}[$__range]))", BY_AGENT)],
                note="Those of now: agentrun dead list.",
                stat=True,
            ),
            Panel("Dead turns per hour", ("dead",), [Query(f"3600 * {rate('dead', [AGENT])}", BY_AGENT)]),
        ],
    ],
}


def dashboard() -> dict[str, Any]:
    """The dashboard, as Grafana imports it."""
    return {
        "uid": "agentrun",
        "title": "agentrun",
        "description": "Turns, workers, broker and gateway of agentrun; what each metric means: docs/observability.md.",
        "tags": ["agentrun"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "",
        "templating": {"list": _variables()},
        "annotations": {"list": []},
        "links": [],
        "panels": _panels(),
    }


def _variables() -> list[dict[str, Any]]:
    everything = {"text": ["All"], "value": ["$__all"]}
    agents = f"label_values({prometheus_name(METRICS['slots'])}, {AGENT})"
    # Workers have slots, gateways have readers; both are there from the beginning.
    instances = "|".join(prometheus_name(METRICS[key]) for key in ("slots", "readers"))

    def variable(name: str, label: str, query: str) -> dict[str, Any]:
        return {
            "name": name,
            "label": label,
            "type": "query",
            "datasource": _datasource(),
            "definition": query,
            "query": {"query": query, "refId": name},
            "refresh": 2,  # when the time range changes: those that were there then
            "sort": 1,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": everything,
            "options": [],
        }

    return [
        {
            "name": "datasource",
            "label": "Data source",
            "type": "datasource",
            "query": "prometheus",
            "current": {},
            "options": [],
            "refresh": 1,
        },
        variable("agent", "Agent", agents),
        variable("instance", "Instance", f'label_values({{__name__=~"{instances}"}}, instance)'),
    ]


def _datasource() -> dict[str, str]:
    return {"type": "prometheus", "uid": "${datasource}"}


def _panels() -> list[dict[str, Any]]:
    panels: list[dict[str, Any]] = []
    y = 0
    for title, lines in ROWS.items():
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1},
                "panels": [],
            }
        )
        y += 1
        for line in lines:
            width = WIDTH // len(line)
            for column, panel in enumerate(line):
                place = {"x": column * width, "y": y, "w": width, "h": HEIGHT}
                panels.append(_panel(len(panels) + 1, panel, place))
            y += HEIGHT
    return panels


def _panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    helps = [METRICS[key].help for key in panel.of]
    make: Callable[[Panel], dict[str, Any]] = _stat if panel.stat else _timeseries
    return {
        "id": number,
        "title": panel.title,
        "description": " ".join([panel.note, *helps]).strip(),
        "datasource": _datasource(),
        "gridPos": place,
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": _datasource(),
                "expr": query.expr,
                "legendFormat": query.legend,
                "range": not panel.stat,
                "instant": panel.stat,
                "exemplar": query.exemplars,
                "editorMode": "code",
            }
            for index, query in enumerate(panel.queries)
        ],
        **make(panel),
    }


def _timeseries(panel: Panel) -> dict[str, Any]:
    return {
        "type": "timeseries",
        "fieldConfig": {
            "defaults": {
                "unit": panel.unit,
                "min": 0,
                "color": {"mode": "palette-classic-by-name"},
                "custom": {
                    "drawStyle": "line",
                    "lineWidth": 1,
                    "fillOpacity": 30 if panel.stacked else 0,
                    "showPoints": "auto",
                    "spanNulls": False,
                    "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
                },
            },
            "overrides": _colours(panel),
        },
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
    }


def _stat(panel: Panel) -> dict[str, Any]:
    steps = [{"color": "green", "value": None}, {"color": "red", "value": 0.5}]
    return {
        "type": "stat",
        "fieldConfig": {
            "defaults": {
                "unit": panel.unit,
                "decimals": 0,
                "noValue": "0",
                "color": {"mode": "thresholds"},
                "thresholds": {"mode": "absolute", "steps": steps},
            },
            "overrides": [],
        },
        "options": {
            "colorMode": "value",
            "graphMode": "none",
            "textMode": "value_and_name",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        },
    }


def _colours(panel: Panel) -> list[dict[str, Any]]:
    if {query.legend for query in panel.queries}.isdisjoint({each(OUTCOME), each(RECEIPT)}):
        return []
    return [
        {
            "matcher": {"id": "byName", "options": name},
            "properties": [{"id": "color", "value": {"mode": "fixed", "fixedColor": colour}}],
        }
        for name, colour in COLOURS.items()
    ]


if __name__ == "__main__":
    PLACE.write_text(json.dumps(dashboard(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sys.stdout.write(f"{PLACE}\n")
