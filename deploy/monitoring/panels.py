"""Grafana's dashboards as values: panels, and how they lie on the page. The JSON is what Grafana 10 and later read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

Unit = Literal["short", "s", "percentunit", "reqps", "bool", "none"]
Json = dict[str, Any]

_SCHEMA: Final = 39
_WIDTH: Final = 24
_DATASOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}
_COLOURS: Final = ("green", "orange", "red")


@dataclass(frozen=True, slots=True)
class Query:
    """A PromQL expression and the name of its lines, with labels as `{{label}}`."""

    expression: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture. `limits` are the values from which a number turns orange and red."""

    title: str
    about: str
    queries: tuple[Query, ...]
    unit: Unit = "short"
    kind: Literal["timeseries", "stat"] = "timeseries"
    stacked: bool = False
    limits: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """Panels side by side, each of the same width."""

    title: str
    panels: tuple[Panel, ...]
    height: int = 8


@dataclass(frozen=True, slots=True)
class Dashboard:
    """One page. `uid` is part of its address and stays."""

    uid: str
    title: str
    about: str
    rows: tuple[Row, ...]

    def queries(self) -> tuple[Query, ...]:
        return tuple(query for row in self.rows for panel in row.panels for query in panel.queries)

    def json(self) -> Json:
        """As Grafana imports it."""
        return {
            "uid": self.uid,
            "title": self.title,
            "description": self.about,
            "tags": ["tidegate"],
            "schemaVersion": _SCHEMA,
            "version": 1,
            "editable": False,
            "graphTooltip": 1,
            "refresh": "15s",
            "time": {"from": "now-1h", "to": "now"},
            "timezone": "browser",
            "templating": {"list": _variables()},
            "links": [
                {"type": "dashboards", "tags": ["tidegate"], "title": "Tidegate", "asDropdown": True,
                 "includeVars": True, "keepTime": True}
            ],
            "panels": _laid_out(self.rows),
        }  # fmt: skip


def _variables() -> list[Json]:
    return [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus", "hide": 0},
        {
            "name": "instance",
            "type": "query",
            "label": "Replica",
            "datasource": _DATASOURCE,
            "query": {"query": "label_values(tidegate_engine_up, instance)", "refId": "instance"},
            "refresh": 2,
            "includeAll": True,
            "multi": True,
            "allValue": ".*",
            "current": {"text": "All", "value": "$__all"},
        },
    ]


def _laid_out(rows: Sequence[Row]) -> list[Json]:
    panels: list[Json] = []
    top = 0
    for row in rows:
        place = {"h": 1, "w": _WIDTH, "x": 0, "y": top}
        panels.append({"type": "row", "title": row.title, "collapsed": False, "gridPos": place, "panels": []})
        width = _WIDTH // len(row.panels)
        for position, panel in enumerate(row.panels):
            place = {"h": row.height, "w": width, "x": position * width, "y": top + 1}
            panels.append({**_panel(panel), "gridPos": place})
        top += 1 + row.height
    return [{**panel, "id": number} for number, panel in enumerate(panels, start=1)]


def _panel(panel: Panel) -> Json:
    defaults: Json = {"unit": panel.unit, "min": 0}
    if panel.limits is not None:
        values = (None, *panel.limits)
        steps = [{"color": colour, "value": value} for colour, value in zip(_COLOURS, values, strict=True)]
        defaults["thresholds"] = {"mode": "absolute", "steps": steps}
    drawn = _stat(panel, defaults) if panel.kind == "stat" else _timeseries(panel, defaults)
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": _DATASOURCE,
        "targets": [
            {"refId": chr(ord("A") + number), "datasource": _DATASOURCE, "expr": query.expression,
             "legendFormat": query.legend, "range": True}
            for number, query in enumerate(panel.queries)
        ],
        "fieldConfig": {"defaults": defaults, "overrides": []},
        **drawn,
    }  # fmt: skip


def _stat(panel: Panel, defaults: Json) -> Json:
    defaults["color"] = {"mode": "fixed", "fixedColor": "text"} if panel.limits is None else {"mode": "thresholds"}
    return {
        "options": {
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "colorMode": "value", "graphMode": "area", "textMode": "value", "justifyMode": "auto",
        }
    }  # fmt: skip


def _timeseries(panel: Panel, defaults: Json) -> Json:
    defaults["color"] = {"mode": "palette-classic"}
    defaults["custom"] = {
        "drawStyle": "line", "lineWidth": 1, "fillOpacity": 40 if panel.stacked else 8, "showPoints": "never",
        "spanNulls": False, "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
        "thresholdsStyle": {"mode": "off" if panel.limits is None else "line"},
    }  # fmt: skip
    return {
        "options": {
            "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull", "max"]},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    }
