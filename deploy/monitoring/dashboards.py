"""The dashboards. `python -m deploy.monitoring.dashboards` writes their JSON anew."""

import json
from pathlib import Path
from typing import Final

from deploy.monitoring.pages.batches import BATCHES
from deploy.monitoring.pages.engine import ENGINE
from deploy.monitoring.pages.overview import OVERVIEW
from deploy.monitoring.pages.tenants import TENANTS
from deploy.monitoring.panels import Dashboard

FOLDER: Final = Path(__file__).parent / "grafana" / "dashboards"
DASHBOARDS: Final = (OVERVIEW, ENGINE, TENANTS, BATCHES)


def rendered(dashboard: Dashboard) -> str:
    """The file's text."""
    return json.dumps(dashboard.json(), indent=2) + "\n"


def write(folder: Path = FOLDER) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for dashboard in DASHBOARDS:
        (folder / f"{dashboard.uid}.json").write_text(rendered(dashboard), encoding="utf-8")


if __name__ == "__main__":
    write()
