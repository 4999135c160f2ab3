import json

import pytest

from deploy.monitoring.dashboards import DASHBOARDS, FOLDER, rendered
from deploy.monitoring.panels import Dashboard

each_dashboard = pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.uid)


@each_dashboard
def test_the_committed_json_is_what_the_code_makes(dashboard: Dashboard) -> None:
    """After a change: `python -m deploy.monitoring.dashboards`."""
    assert (FOLDER / f"{dashboard.uid}.json").read_text(encoding="utf-8") == rendered(dashboard)


def test_no_json_is_left_of_a_dashboard_that_is_gone() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == {dashboard.uid for dashboard in DASHBOARDS}


@each_dashboard
def test_panels_do_not_overlap_and_fill_their_rows(dashboard: Dashboard) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard.json()["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        taken |= cells
    assert len(taken) == 24 * (1 + max(y for _, y in taken))


@each_dashboard
def test_every_panel_has_a_title_words_and_lines_with_names(dashboard: Dashboard) -> None:
    panels = [panel for panel in dashboard.json()["panels"] if panel["type"] != "row"]
    assert len({panel["title"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["description"].endswith(".")
        assert panel["targets"]
        assert all(target["legendFormat"] for target in panel["targets"])
    assert json.loads(rendered(dashboard))["uid"] == dashboard.uid
