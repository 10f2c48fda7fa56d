"""What a PromQL expression asks for, checked against the metrics that exist."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import promql_parser as promql

from agentrun.telemetry.names import Metric, prometheus_name

TARGET = frozenset({"job", "instance"})
"""Labels that every series has by who was asked."""
_OVER_COUNTERS = ("rate", "increase")
_OVER_GAUGES = ("last_over_time", "max_over_time")


class Series(NamedTuple):
    """What series there are of a name: their labels, and whether they only grow."""

    key: str
    labels: frozenset[str]
    grows: bool


def known(metrics: Mapping[str, Metric]) -> dict[str, Series]:
    """All series that metrics are seen as."""
    found: dict[str, Series] = {}
    for key, metric in metrics.items():
        name = prometheus_name(metric)
        labels = TARGET | {attribute.replace(".", "_") for attribute in metric.attributes}
        if metric.kind == "histogram":
            found |= {f"{name}_{suffix}": Series(key, labels, True) for suffix in ("sum", "count")}
            found[f"{name}_bucket"] = Series(key, labels | {"le"}, True)
        else:
            found[name] = Series(key, labels, metric.kind != "gauge")
    return found


class Checked:
    """An expression that was found to be right.

    Args:
        text: PromQL.
        series: What there is.

    Attributes:
        labels: Those of its result.
        metrics: The names that code has for the metrics in it.

    Raises:
        ValueError: What is wrong with it.
    """

    def __init__(self, text: str, series: Mapping[str, Series]) -> None:
        self._series = series
        self.metrics: set[str] = set()
        self.labels = self._check(promql.parse(text))

    def _check(self, expr: Any) -> frozenset[str]:
        return _CHECKS[type(expr)](self, expr)

    def _selected(self, expr: promql.VectorSelector) -> Series:
        if expr.name not in self._series:
            raise ValueError(f"there is no {expr.name}")
        series = self._series[expr.name]
        self.metrics.add(series.key)
        _among((matcher.name for matcher in expr.matchers.matchers), series.labels, f"label of {expr.name}")
        return series

    def _vector(self, expr: promql.VectorSelector) -> frozenset[str]:
        series = self._selected(expr)
        if series.grows:
            raise ValueError(f"what {expr.name} stands at says nothing")
        return series.labels

    def _call(self, expr: promql.Call) -> frozenset[str]:
        name = expr.func.name
        if name == "histogram_quantile":
            labels = self._check(expr.args[1])
            _among({"le"}, labels, "label of what has quantiles")
            return labels - {"le"}
        (over,) = expr.args
        if name == "ceil":
            return self._check(over)
        if isinstance(over, promql.SubqueryExpr) and name in _OVER_GAUGES:
            return self._check(over.expr)
        if not isinstance(over, promql.MatrixSelector) or name not in _OVER_COUNTERS + _OVER_GAUGES:
            raise ValueError(f"{name} is not known to this check")
        series = self._selected(over.vector_selector)
        if series.grows != (name in _OVER_COUNTERS):
            raise ValueError(f"{name} over {over.vector_selector.name}")
        return series.labels

    def _aggregate(self, expr: promql.AggregateExpr) -> frozenset[str]:
        labels = self._check(expr.expr)
        if expr.modifier is None:
            return frozenset()
        if expr.modifier.type != promql.AggModifierType.By:
            raise ValueError("labels are named that stay, with by")
        _among(expr.modifier.labels, labels, "label to aggregate by")
        return frozenset(expr.modifier.labels)

    def _binary(self, expr: promql.BinaryExpr) -> frozenset[str]:
        if str(expr.op) == "unless" and isinstance(expr.lhs, promql.VectorSelector):
            return self._begun(expr.lhs, expr.rhs)
        sides = [self._check(side) for side in (expr.lhs, expr.rhs) if not isinstance(side, promql.NumberLiteral)]
        if len(sides) == 1:
            return sides[0]
        left, right = sides
        if expr.modifier is None or expr.modifier.matching is None:
            if left != right:
                raise ValueError(f"{sorted(left)} and {sorted(right)} never match")
            return left
        _among(expr.modifier.matching.labels, left & right, "label of both sides")
        return left

    def _begun(self, now: promql.VectorSelector, before: Any) -> frozenset[str]:
        """Of a series that was not there before, what it stands at is what it has grown by."""
        if not isinstance(before, promql.VectorSelector) or before.name != now.name or not before.offset:
            raise ValueError(f"only {now.name} with an offset tells whether {now.name} is new")
        self._selected(before)
        return self._selected(now).labels

    def _paren(self, expr: promql.ParenExpr) -> frozenset[str]:
        return self._check(expr.expr)


_CHECKS: dict[type, Callable[[Checked, Any], frozenset[str]]] = {
    promql.VectorSelector: Checked._vector,
    promql.Call: Checked._call,
    promql.AggregateExpr: Checked._aggregate,
    promql.BinaryExpr: Checked._binary,
    promql.ParenExpr: Checked._paren,
}


def _among(names: Iterable[str], labels: frozenset[str], what: str) -> None:
    if unknown := set(names) - labels:
        raise ValueError(f"{', '.join(sorted(unknown))}: no {what}; there are {', '.join(sorted(labels))}")
