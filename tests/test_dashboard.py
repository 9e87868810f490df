# SPDX-License-Identifier: Apache-2.0
"""``serving/grafana.json`` and ``serving/prometheus.yml`` as files.

Whether a server exports what they ask for is checked in ``test_server.py``, which has one.
"""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

SERVING = Path(__file__).parents[1] / "serving"
DASHBOARD: dict[str, Any] = json.loads((SERVING / "grafana.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
# Variables that Grafana itself provides.
BUILT_IN = {"__rate_interval"}


def expressions() -> list[str]:
    return [target["expr"] for panel in PANELS for target in panel["targets"]]


def queries() -> list[str]:
    """What the variables ask for."""
    listed = DASHBOARD["templating"]["list"]
    return [one["query"]["query"] for one in listed if one["type"] == "query"]


def metric_names() -> set[str]:
    """Metrics that panels and variables ask for."""
    return {name for text in (*expressions(), *queries()) for name in re.findall(r"vllm:\w+", text)}


def test_dashboard_can_be_imported() -> None:
    assert DASHBOARD["schemaVersion"] >= 39
    assert DASHBOARD["title"] and DASHBOARD["uid"]
    assert "id" not in DASHBOARD  # of the Grafana it came from
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    for panel in PANELS:
        assert panel["title"] and panel["description"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        assert all(target["legendFormat"] for target in panel["targets"])


def test_panels_do_not_overlap() -> None:
    for panel in PANELS:
        place = panel["gridPos"]
        assert place["x"] >= 0
        assert place["x"] + place["w"] <= 24
    for one, other in combinations((panel["gridPos"] for panel in PANELS), 2):
        apart = (
            one["x"] + one["w"] <= other["x"],
            other["x"] + other["w"] <= one["x"],
            one["y"] + one["h"] <= other["y"],
            other["y"] + other["h"] <= one["y"],
        )
        assert any(apart)


def test_variables_are_defined_before_they_are_used() -> None:
    names = [variable["name"] for variable in DASHBOARD["templating"]["list"]]
    assert names == ["datasource", "model_name", "engine"]
    for panel in PANELS:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    for text in expressions():
        used = set(re.findall(r"\$(\w+)", text))
        assert used <= {*names, *BUILT_IN}
        # Several servers may feed one Prometheus.
        assert text.count('{model_name=~"$model_name", engine=~"$engine"}') == text.count("vllm:")


@pytest.mark.parametrize("expression", expressions())
def test_expressions_fit_their_metrics(expression: str) -> None:
    """Counters are asked for their rate and gauges for their value; quantiles sum over ``le``."""
    assert expression.count("(") == expression.count(")")
    for before, name in re.findall(r"(\S*?\(?)(vllm:\w+)", expression):
        rises = name.endswith(("_total", "_bucket"))
        assert before.endswith("rate(") == rises
    assert ("histogram_quantile" in expression) == ("_bucket" in expression)
    if "_bucket" in expression:
        assert "sum by (le)" in expression


def test_every_kind_of_metric_is_shown() -> None:
    ours = {name.removeprefix("vllm:kv_policy_") for name in metric_names() if "kv_policy" in name}
    assert ours == {
        "compactions_total",
        "tokens_total",
        "skipped_requests_total",
        "compaction_seconds_bucket",
        "saved_tokens",
        "saved_blocks",
    }


def test_prometheus_scrapes_the_default_port() -> None:
    settings = yaml.safe_load((SERVING / "prometheus.yml").read_text())
    (job,) = settings["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["localhost:8000"]}]
