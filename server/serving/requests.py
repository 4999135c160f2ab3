"""The requests that are open now: each is opened, known to whatever runs on its behalf, and closed.

`current_request()` reaches the open request from deep inside vLLM, whose interfaces have no place for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import structlog

from server.policy.context import TruncationPolicy
from server.policy.degradation import Wish
from server.policy.edits import NO_EDITS, Edits
from server.policy.refusals import Draining, Refusal
from server.policy.tenants import ANYONE, Tenant
from server.policy.terms import DEFAULT_TERMS, Terms
from server.telemetry.requests import RequestFigures

if TYPE_CHECKING:
    from server.engine.stack import Stack
    from server.serving.fitting import FitReport

log = structlog.get_logger(__name__)

_DRAIN_RETRY_AFTER_S = 5.0


@dataclass(slots=True)
class DryRun:
    """Asks seam 1 to fit whatever is rendered for this request, and to leave a report."""

    report: FitReport | None = None


class Work(Protocol):
    """Something that goes on for a request and is ended with it."""

    async def release(self) -> None:
        """End it, told from outside; returns when it has let go."""
        ...


class Unsettled(Protocol):
    """A charge that is settled when its engine request is over."""

    def settle(self) -> None:
        """Settle it, unless it is settled."""
        ...


@dataclass(slots=True)
class Account:
    """What a client's request has been charged: it counts as one request, however many engine requests it makes.

    `lease` is its place among its tenant's concurrent requests. `open` are the charges not settled yet.
    """

    counted: bool = False
    lease: str | None = None
    in_engine: bool = False
    open: set[Unsettled] = field(default_factory=set)


class Running:
    """A generator of the engine and the task that is inside it, closed once by whoever comes first."""

    def __init__(self, generator: AsyncGenerator[Any, None]) -> None:
        self.generator = generator
        self.consumer = asyncio.current_task()
        self._closing = False
        self._closed = asyncio.Event()

    async def close(self) -> None:
        """Close the generator, which frees its KV blocks."""
        if self._closing:
            return
        self._closing = True
        try:
            await self.generator.aclose()
        finally:
            self._closed.set()

    async def release(self) -> None:
        """Close it from outside, also while another task is inside it.

        vLLM runs the prompts of one request as tasks, and does not wait for them when it is cancelled.
        """
        if self._closing or not getattr(self.generator, "ag_running", False):
            await self.close()
        elif self.consumer is not None and not self.consumer.cancelling():  # a second one would cut its cleanup short
            self.consumer.cancel()
        await self._closed.wait()


_current: ContextVar[OpenRequest | None] = ContextVar("open_request", default=None)


@dataclass(slots=True)
class OpenRequest:
    """One client request from its first byte to its last.

    `producing` turns true when the engine has delivered the first output: from then on a refusal can no longer be
    an HTTP status. `prompt_tokens` is the sum over its engine requests. `headers` are added to the answer's head.
    `refusal` keeps the class of an error that vLLM's generators would turn into text. `running` holds what the engine
    generates for it: vLLM does not close its generators when a stream is left early, so the request does.
    `detached`: it goes on generating after its answer (background responses), so nothing is closed with it.
    `model` is the one that the client named, `model_name` the one that answers.
    `truncation` and `asked_max_tokens` are what the client asked for, `edits` what was changed.
    `tenant` owns it; `end_user` is whom a trusted tenant sent it for; `account` is what they were charged. `terms` are
    how it waits, `arrived_s` since when on the gate's clock, `at_gate` how many engine requests came to the gate.
    `stack` is what it runs on, `exposed` whether it has reached that stack's engine, `woken` that it was told of the
    engine's death by a cancellation, and `deaths` how many engines have died with it inside. `wish` is what the client
    thinks of a degraded answer, and `context_factor` the share of the context budget that its history may fill.
    `on_admitted` is told when the engine takes it, once for each engine request. `of_batch`: it is a line of a batch.
    `figures` are what the log and the metrics tell of it.
    """

    request_id: str
    path: str
    tenant: Tenant = ANYONE
    end_user: str | None = None
    account: Account = field(default_factory=Account)
    producing: bool = False
    client_left: bool = False
    prompt_tokens: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    refusal: Refusal | None = None
    model: str | None = None
    model_name: str = ""
    truncation: TruncationPolicy | None = None
    asked_max_tokens: int | None = None
    edits: Edits = NO_EDITS
    dry_run: DryRun | None = None
    running: set[Work] = field(default_factory=set)
    terms: Terms = DEFAULT_TERMS
    arrived_s: float | None = None
    at_gate: int = 0
    detached: bool = False
    letting_go: bool = False
    stack: Stack | None = None
    exposed: bool = False
    woken: bool = False
    deaths: int = 0
    wish: Wish = "auto"
    context_factor: float = 1.0
    on_admitted: Callable[[], None] | None = None
    of_batch: bool = False
    figures: RequestFigures = field(default_factory=RequestFigures)

    def admitted(self) -> None:
        """The engine takes one of its engine requests now."""
        if self.on_admitted is not None:
            self.on_admitted()

    @property
    def lost_its_engine(self) -> bool:
        """Whether the engine it runs on has died."""
        return self.stack is not None and not self.stack.alive

    def was_woken(self) -> bool:
        """Whether a cancellation only tells that the engine is gone. It is taken back then."""
        task = asyncio.current_task()
        if not self.woken or task is None or task.uncancel() > 0:
            return False
        self.woken = False
        return True

    def leave_engine(self) -> None:
        """Whatever happens to its engine from now on is nothing to this request."""
        self.stack = None

    async def start_over(self) -> None:
        """Forget an attempt that failed: what it holds, what it counted, and what it was going to say."""
        self.leave_engine()
        for running in tuple(self.running):
            await running.release()
        self.running.clear()
        self.settle()
        self.exposed = self.producing = False
        self.prompt_tokens, self.edits, self.refusal = 0, NO_EDITS, None
        self.figures = RequestFigures()
        self.headers.clear()

    def degraded(self, *applied: str) -> None:
        """Note what the level took from the request, for the answer's head."""
        said = self.headers.get("x-degradation-applied")
        told = [*(said.split(",") if said else ()), *applied]
        self.headers["x-degradation-applied"] = ",".join(dict.fromkeys(told))

    def settle(self) -> None:
        """Settle what was charged for engine requests that are over."""
        for charged in tuple(self.account.open):
            charged.settle()

    def stand_in(self) -> OpenRequest:
        """A request for what goes on after this one's answer: the same owner and account, and nobody to tell."""
        return OpenRequest(
            request_id=self.request_id,
            path=self.path,
            tenant=self.tenant,
            end_user=self.end_user,
            account=self.account,
            model=self.model,
            model_name=self.model_name,
            asked_max_tokens=self.asked_max_tokens,
            terms=self.terms,
            of_batch=self.of_batch,
        )

    def edited(self, edits: Edits) -> None:
        """Note what was changed in the request, for the answer's head and body. A batch call adds up."""
        self.edits = self.edits + edits
        if (header := self.edits.header()) is not None:
            self.headers["x-context-truncated"] = header


def current_request() -> OpenRequest | None:
    """The request this code runs for, or None for work of the server's own."""
    return _current.get()


class OpenRequests:
    """Counts open requests, and closes the door when the server drains."""

    def __init__(self) -> None:
        self._open: dict[asyncio.Task[Any], OpenRequest] = {}
        self._draining = False
        self.leaving = False
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._open)

    @property
    def draining(self) -> bool:
        return self._draining

    def announce_leaving(self) -> None:
        """Let readiness say that the server is about to stop, while requests are still taken."""
        self.leaving = True

    def open(self, request: OpenRequest) -> _Opened:
        """Hold one request open, inside `async with`. Entering raises `Draining` once the door is closed."""
        return _Opened(self, request)

    def take_in(self, task: asyncio.Task[Any], request: OpenRequest) -> None:
        """Know a request by its task from now on. Raises `Draining`."""
        if self._draining:
            raise Draining(
                "The server is restarting. Please try again in a moment.", retry_after_s=_DRAIN_RETRY_AFTER_S
            )
        self._open[task] = request
        self._idle.clear()

    async def let_go(self, task: asyncio.Task[Any], request: OpenRequest) -> None:
        """End whatever still goes on for a request, and forget it."""
        request.letting_go = True
        if request.running or request.account.open:
            await _to_its_end(self._let_go(task, request))
        else:
            self._forget(task)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        request = self._open.pop(task)
        if not request.detached:
            request.settle()
        if not self._open:
            self._idle.set()

    async def _let_go(self, task: asyncio.Task[Any], request: OpenRequest) -> None:
        closed = await asyncio.gather(*(work.release() for work in tuple(request.running)), return_exceptions=True)
        self._forget(task)
        for error in closed:
            if error is not None:
                log.error("a generation could not be closed", request_id=request.request_id, exc_info=error)

    async def drain(self, timeout_s: float) -> int:
        """Take no new request and wait for the open ones. Returns how many are still open after `timeout_s`."""
        self._draining = self.leaving = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return len(self._open)
        return 0

    def wake_those_on(self, stack: Stack) -> None:
        """Tell every request that still waits for a dead stack: some of vLLM's calls would wait forever."""
        for task, request in self._open.items():
            if request.stack is stack and not request.letting_go:
                request.woken = True
                task.cancel()

    async def end_all(self, refusal: Refusal) -> None:
        """End every open request with `refusal`, and wait until all of them have let go."""
        for task, request in tuple(self._open.items()):
            if not request.letting_go:
                request.refusal = refusal
                task.cancel()
        await self._idle.wait()


class _Opened:
    """One request while it is open. A generator for this would cost a request several times as much."""

    def __init__(self, requests: OpenRequests, request: OpenRequest) -> None:
        self._requests = requests
        self._request = request

    async def __aenter__(self) -> OpenRequest:
        task = asyncio.current_task()
        assert task is not None
        self._requests.take_in(task, self._request)
        self._task, self._token = task, _current.set(self._request)
        return self._request

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        refusal = self._request.refusal
        try:
            if isinstance(error, asyncio.CancelledError) and refusal is not None and self._task.uncancel() == 0:
                raise refusal from None  # ended by `end_all`, not by the client
        finally:
            _current.reset(self._token)
            await self._requests.let_go(self._task, self._request)


async def _to_its_end(cleanup: Coroutine[Any, Any, None]) -> None:
    """Await a cleanup that further cancellations may not cut short; they take effect after it."""
    task = asyncio.create_task(cleanup)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
