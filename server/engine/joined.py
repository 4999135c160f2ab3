"""A stack on an engine that another process has started.

An engine is told at its start where all of its front-ends are. It says to each that it is ready, once; a front-end that
is started later, or again, learns the same from the first process, with the configuration as it was resolved there.
"""

import asyncio
import errno
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Final

import cloudpickle
import zmq
from vllm.config import VllmConfig
from vllm.envs import disable_envs_cache
from vllm.utils.counter import AtomicCounter
from vllm.v1.engine import EngineCoreRequestType, core_client

from server.engine.arguments import EngineArguments
from server.engine.building import build_on, configure_logging, import_plugins, new_engine
from server.engine.processes import EngineFamily
from server.engine.seams import SeamedEngine, Seams
from server.engine.shared_steps import PartialPrometheusLogger, TellStep, step_tellers
from server.engine.stack import Stack, StackRequest, shut_down, while_alive
from server.engine.start_failures import StartFailure
from server.engine.steps import StepCounter
from server.policy.objectives import Unloaded

_REACHED_LOOK_S: Final = 0.02
# Adapters that vLLM's resolvers load in this process have numbers of their own.
_NUMBERS_EACH: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class JoinRequest:
    """What a joined stack is built from. `blueprint` is the first process's, the addresses are those that the engine
    was told for the front-end of this `index` among `count`; `gone` is set when that engine is dead."""

    blueprint: bytes
    input_address: str
    output_address: str
    index: int
    count: int
    tell_step: TellStep
    gone: asyncio.Event


@dataclass(frozen=True, slots=True)
class _Plan:
    arguments: EngineArguments
    config: VllmConfig
    unloaded: Unloaded | None


def blueprint(stack: Stack) -> bytes:
    """What other processes need to join this stack's engine."""
    return cloudpickle.dumps(_Plan(stack.arguments, stack.engine.vllm_config, stack.unloaded))


async def build_joined(join: JoinRequest, request: StackRequest, seams: Seams) -> Stack:
    """Connect to the engine and build everything on it. Raises `StartFailure`, also when it dies meanwhile."""
    plan, engine = await asyncio.to_thread(_connect, join, request, seams)
    engine._run_output_handler()
    losing = asyncio.create_task(_lose_when(join.gone, engine))
    try:
        return await while_alive(engine, _build(plan, engine, join, request))
    except BaseException:
        await asyncio.to_thread(shut_down, engine, EngineFamily.of(()))
        raise
    finally:
        losing.cancel()


def lose_engine(engine: SeamedEngine) -> None:
    """Another process has seen the engine die: whatever waits for it here ends with that."""
    resources = engine.engine_core.resources
    resources.engine_dead = True
    if resources.output_queue_task is not None:
        resources.output_queue_task.cancel()


async def _lose_when(gone: asyncio.Event, engine: SeamedEngine) -> None:
    await gone.wait()
    lose_engine(engine)


def _connect(join: JoinRequest, request: StackRequest, seams: Seams) -> tuple[_Plan, SeamedEngine]:
    plan: _Plan = pickle.loads(join.blueprint)  # noqa: S301  # from the process that started this one
    args, config = plan.arguments.args, plan.config
    disable_envs_cache()
    configure_logging(args, request.logging_config)
    import_plugins(args)
    config.parallel_config._api_process_rank = join.index
    attention_block_size = config.cache_config.effective_attention_block_size
    with _ready_already():
        engine = new_engine(
            config,
            args,
            [StepCounter, step_tellers(join.tell_step), PartialPrometheusLogger],
            client_addresses={"input_address": join.input_address, "output_address": join.output_address},
            client_count=join.count,
            client_index=join.index,
        )
    config.cache_config.effective_attention_block_size = attention_block_size
    engine.open_seam(seams, traced=request.traced, coalesced_tokens=request.coalesced_tokens)
    return plan, engine


async def _build(plan: _Plan, engine: SeamedEngine, join: JoinRequest, request: StackRequest) -> Stack:
    await _until_reached(engine.engine_core)
    stack = await build_on(plan.arguments, engine, EngineFamily.of(()), request)
    stack.models.lora_id_counter = AtomicCounter(join.index * _NUMBERS_EACH)
    return replace(stack, unloaded=plan.unloaded)


async def _until_reached(core: Any) -> None:
    """Wait until the engine has found this front-end's socket: what is sent before would be lost without a word."""
    core.input_socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    while True:
        try:
            await core._send_input(EngineCoreRequestType.ABORT, [])
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise StartFailure(f"The engine cannot be reached: {error}.") from error
            await asyncio.sleep(_REACHED_LOOK_S)
        else:
            break
    core.input_socket.setsockopt(zmq.ROUTER_MANDATORY, 0)


class _ReadySocket:
    """Says what the engine says when it is ready; without words, since the configuration has them already."""

    def poll(self, timeout: int) -> int:
        del timeout
        return zmq.POLLIN

    def recv_multipart(self) -> Sequence[bytes]:
        first_engine = 0
        return first_engine.to_bytes(2, "little"), b""


class _ReadyZmq:
    """The module `zmq`, for a client that is not to wait for an engine that has been ready for long."""

    Socket = SimpleNamespace(shadow=lambda _: _ReadySocket())

    def __getattr__(self, name: str) -> Any:
        return getattr(zmq, name)


@contextmanager
def _ready_already() -> Iterator[None]:
    """Inside it, vLLM's client takes its engine for ready."""
    usual, core_client.zmq = core_client.zmq, _ReadyZmq()
    try:
        yield
    finally:
        core_client.zmq = usual
