"""The dashboard, the alerts and the configurations beside them ask for what there is."""

from __future__ import annotations

import inspect
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

from agentrun.cli import _telemetry, gateway, worker
from agentrun.telemetry.names import METRICS
from tests.deploy.promql import Checked, known

PLACE = Path(__file__).parents[2] / "deploy" / "observability"
DASHBOARD: dict[str, Any] = json.loads((PLACE / "grafana-dashboard.json").read_text(encoding="utf-8"))
SERIES = known(METRICS)
VARIABLES = {"$__rate_interval": "1m", "$__range": "1h", "$agent": ".*", "$instance": "a|b"}


def read(name: str) -> Any:
    return yaml.safe_load((PLACE / name).read_text(encoding="utf-8"))


ALERTS: list[dict[str, Any]] = [rule for group in read("alerts.yaml")["groups"] for rule in group["rules"]]
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def filled(text: str) -> str:
    for name, value in VARIABLES.items():
        text = text.replace(name, value)
    return text


TARGETS = {f"{panel['title']} {target['refId']}": target for panel in PANELS for target in panel["targets"]}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_a_panel_asks_for_what_there_is(target: dict[str, Any]) -> None:
    text = filled(target["expr"])
    assert "$" not in text, "a variable that the dashboard does not have"
    found = Checked(text, SERIES)
    assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) == found.labels, "series have names of their own"


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_asks_for_what_there_is_and_says_what_to_do(alert: dict[str, Any]) -> None:
    found = Checked(alert["expr"], SERIES)
    notes = alert["annotations"]
    assert {*notes} == {"summary", "description", "runbook"}
    assert set(re.findall(r"\$labels\.(\w+)", " ".join(notes.values()))) == found.labels
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert notes["runbook"] == "docs/observability.md#alerts"
    tests = (PLACE / "alerts_test.yaml").read_text(encoding="utf-8")
    assert re.search(rf"\b{alert['alert']}\b", tests), "promtool does not test it"


def test_every_metric_is_on_the_dashboard() -> None:
    shown = {key for target in TARGETS.values() for key in Checked(filled(target["expr"]), SERIES).metrics}
    assert shown == {*METRICS}


def test_the_dashboard_is_what_its_script_makes() -> None:
    made = runpy.run_path(str(PLACE / "dashboard.py"))["dashboard"]()
    assert made == DASHBOARD, "run python deploy/observability/dashboard.py"


def test_panels_have_ids_of_their_own_and_places_of_their_own() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len({*ids})
    taken: dict[tuple[int, int], str] = {}
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]
    assert len(taken) == 24 * (1 + max(y for _, y in taken)), "there are holes"


def test_panels_say_what_they_show() -> None:
    titles = [panel["title"] for panel in PANELS]
    assert len(titles) == len({*titles})
    for panel in PANELS:
        (text, *_) = (target["expr"] for target in panel["targets"])
        seconds = "histogram_quantile" in text and "_seconds_bucket" in text
        assert (panel["fieldConfig"]["defaults"]["unit"] == "s") == seconds, panel["title"]
        assert panel["description"], panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"


def test_variables_are_read_from_series_that_there_are() -> None:
    variables = {item["name"]: item for item in DASHBOARD["templating"]["list"]}
    assert {f"${name}" for name in variables} - {"$datasource"} == {"$agent", "$instance"}
    assert variables["datasource"]["query"] == "prometheus"
    for name in ("agent", "instance"):
        query = variables[name]["query"]["query"]
        match = re.fullmatch(r'label_values\((?:\{__name__=~"([\w|]+)"\}|(\w+)), (\w+)\)', query)
        assert match, query
        for series in (match[1] or match[2]).split("|"):
            assert match[3] in SERIES[series].labels


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("sum(rate(agentrun_turn_total[5m]))", "there is no agentrun_turn_total"),
        ("sum(rate(agentrun_turn_duration_seconds[5m]))", "there is no"),
        ("sum(rate(agentrun_tokens_total{model='x'}[5m]))", "model: no label of"),
        ("sum by (worker) (rate(agentrun_tokens_total[5m]))", "worker: no label to aggregate by"),
        ("sum(agentrun_tokens_total)", "says nothing"),
        ("sum(agentrun_tokens_total unless agentrun_tokens_total)", "with an offset"),
        ("sum(agentrun_tokens_total unless agentrun_appends_total offset 5m)", "with an offset"),
        ("sum(rate(agentrun_worker_slots[5m]))", "rate over agentrun_worker_slots"),
        ("max_over_time(agentrun_tokens_total[5m])", "max_over_time over"),
        ("histogram_quantile(0.9, sum(rate(agentrun_queue_wait_seconds_bucket[5m])))", "le: no label of"),
        ("histogram_quantile(0.9, sum by (le) (rate(agentrun_queue_wait_seconds_count[5m])))", "le: no label to"),
        ("agentrun_worker_slots / on (agentrun_outcome) agentrun_worker_running", "agentrun_outcome: no label of both"),
        ("sum by (gen_ai_agent_name) (agentrun_worker_slots) > sum(agentrun_queue_waiting)", "never match"),
        ("sum without (instance) (agentrun_worker_slots)", "with by"),
        ("sum(agentrun_worker_slots", "unclosed left parenthesis"),
    ],
)
def test_what_is_wrong_is_found(text: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=re.escape(wrong)):
        Checked(text, SERIES)


def test_prometheus_asks_where_workers_and_gateways_answer() -> None:
    config = read("prometheus.yaml")
    assert config["rule_files"] == ["alerts.yaml"]
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    # The same as service.name, which is the label job where metrics come through a collector.
    assert {*jobs} == {
        re.findall(r'seen_as\("([\w-]+)"\)', inspect.getsource(module))[0] for module in (worker, gateway)
    }
    assert {sd["port"] for job in jobs.values() for sd in job["dns_sd_configs"]} == {_telemetry._PORT}


def test_the_collectors_pipelines_are_of_what_it_has() -> None:
    config = read("collector.yaml")
    service = config["service"]
    assert {*service["pipelines"]} == {"traces", "metrics"}
    assert {*service["extensions"]} == {*config["extensions"]}
    for kind in ("receivers", "processors", "exporters"):
        used = {name for pipeline in service["pipelines"].values() for name in pipeline[kind]}
        assert used == {*config[kind]}, kind
    for pipeline in service["pipelines"].values():
        assert (pipeline["processors"][0], pipeline["processors"][-1]) == ("memory_limiter", "batch")
    protocols = config["receivers"]["otlp"]["protocols"]
    assert protocols["http"]["endpoint"].endswith(":4318")
    text = (PLACE / "collector.yaml").read_text(encoding="utf-8")
    comments = " ".join(line for line in text.splitlines() if line.lstrip().startswith("#"))
    for name in re.findall(r"\$\{env:(\w+):-", text):
        assert name in comments, f"{name} is not explained"


def test_each_alert_says_in_the_documentation_what_to_do() -> None:
    text = (PLACE.parents[1] / "docs" / "observability.md").read_text(encoding="utf-8")
    section = text.partition("## Alerts\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)`", section, re.M) == [alert["alert"] for alert in ALERTS]
