"""What `tidegate doctor` says of a model, against the engine that really serves it."""

import pytest

from tests.live.running_server import RunningServer, run_doctor

pytestmark = pytest.mark.engine


def test_the_doctor_knew_how_much_of_the_embedded_model_would_fit(server: RunningServer) -> None:
    report = run_doctor("--block-size", "32")
    plan = report["model"]["plans"][0]
    assert plan["kv_tokens"] == pytest.approx(server.kv_tokens, rel=0.05)
    assert plan["longest_context"] == 8192
    assert [finding for finding in report["findings"] if finding["verdict"] == "problem"] == []
