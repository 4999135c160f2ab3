"""Every way in which Tidegate says no.

A refusal is raised anywhere and becomes an HTTP answer in one place (`server/api/errors.py`). Its message is
written for the person who reads it in a chat window.
"""


class Refusal(Exception):
    """A request that is not served, and why.

    `param` names the request field at fault; `retry_after_s` is when trying again can help. `should_retry` False tells
    clients that would try again by themselves, as the official SDKs do, to leave it.
    """

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: float | None = None, should_retry: bool = True
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.should_retry = should_retry


class InvalidRequest(Refusal):
    """The request cannot be understood or asks for something impossible."""


class ClosedField(InvalidRequest):
    """The request sets a field that only the operator may open."""


class ContextLengthExceeded(InvalidRequest):
    """The prompt does not fit the model's window."""


class CostAboveLimit(InvalidRequest):
    """The request needs more tokens than the caller's limit ever holds at once."""


class BodyTooLarge(Refusal):
    """The body is over the byte cap."""


class InvalidApiKey(Refusal):
    """No key, or one that is not known."""


class OperatorsOnly(Refusal):
    """The key is good, but what it asks for is the operator's."""


class StoreUnavailable(Refusal):
    """Redis does not answer, and what is asked stands nowhere else: whether a key is good, say."""


class ModelNotFound(Refusal):
    """The named model is not served here."""


class NotFound(Refusal):
    """No such route, or an object that does not exist."""


class Conflict(Refusal):
    """What is asked for does not go with what is there."""


class MethodNotAllowed(Refusal):
    """The route exists, but not for this method."""


class Unsupported(Refusal):
    """The route exists, but the served model cannot do it."""


class UnprocessableContent(Refusal):
    """Well-formed, but something it refers to cannot be used (an image that cannot be fetched, say)."""


class RateLimited(Refusal):
    """The caller's own quota is used up."""


class Overloaded(Refusal):
    """The server has more work than it can do."""


class NotReady(Refusal):
    """The engine is still being loaded or replaced."""


class Draining(Refusal):
    """The server is stopping and takes no new work."""


class GenerationFailed(Refusal):
    """The engine failed while it worked on this request."""


class EngineLost(GenerationFailed):
    """The engine died after it had begun to answer."""


class Quarantined(GenerationFailed):
    """The request was in the engine at two deaths of it, and is not tried a third time."""


class UpstreamLost(GenerationFailed):
    """The fallback upstream broke off in the middle of its answer."""


class Closed(Refusal):
    """An operator has closed the server for requests."""


class NotDegraded(Refusal):
    """The answer would have been degraded, and the client asked for none rather than that."""


class StorageFull(Refusal):
    """There is no room on disk, or none left of the caller's share of it."""
