"""What becomes of a request whose engine died: it runs again on the next one, or it is told why not."""

from typing import Final

import structlog

from server.policy.refusals import EngineLost, GenerationFailed, Quarantined
from server.serving.requests import OpenRequest
from server.telemetry.resilience import ResilienceMetrics

log = structlog.get_logger(__name__)

_MOST_DEATHS: Final = 2


class Recovery:
    """Decides after a failure. A request is only ever held against an engine that it was in when it died."""

    def __init__(self, metrics: ResilienceMetrics) -> None:
        self._metrics = metrics

    async def after(self, failure: GenerationFailed, request: OpenRequest, *, sent: bool) -> None:
        """Return when the request is to run again; raise what its client is told otherwise.

        `sent` says that a part of the answer is out, which cannot be taken back.
        """
        if not request.lost_its_engine:
            raise failure
        if request.exposed:
            request.deaths += 1
        if request.deaths >= _MOST_DEATHS:
            self._metrics.request_lost("quarantined")
            log.error("request quarantined: it was in the engine at two deaths of it", deaths=request.deaths)
            raise Quarantined(
                f"The model stopped twice while it worked on this request ({request.request_id}), so it is not tried "
                "again. Please do not send it again unchanged; the operator finds it in the log by this id.",
                should_retry=False,
            )
        if sent:
            self._metrics.request_lost("streamed")
            raise EngineLost("The model stopped in the middle of this answer. Please send the request again.")
        self._metrics.request_rerun()
        log.warning("request runs again: its engine died before it had sent anything", deaths=request.deaths)
        await request.start_over()
