"""An engine's stand-in: it speaks vLLM's protocol with one front-end, over the sockets that an engine would use."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cloudpickle
import zmq
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineCoreRequestType,
    FinishReason,
    UtilityOutput,
)
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder, UtilityResult

from server.engine.arguments import complete_arguments, parse_arguments
from server.engine.joined import _Plan

ANSWERS: dict[str, Any] = {"get_supported_tasks": ("generate",), "reset_mm_cache": None}


class StandIn(threading.Thread):
    """Connects to a front-end as an engine does that has said long ago that it is ready, and answers with one token."""

    def __init__(self, addresses: tuple[str, str]) -> None:
        super().__init__(daemon=True)
        self.addresses = addresses
        self.requests: list[EngineCoreRequest] = []
        self._context = zmq.Context()
        self._over = threading.Event()

    def run(self) -> None:
        inputs, outputs = self._context.socket(zmq.DEALER), self._context.socket(zmq.PUSH)
        inputs.setsockopt(zmq.IDENTITY, b"\x00\x00")
        inputs.connect(self.addresses[0])
        outputs.connect(self.addresses[1])
        encoder = MsgpackEncoder()
        while not self._over.is_set():
            if inputs.poll(50):
                answer = self._answer(inputs.recv_multipart())
                if answer is not None:
                    outputs.send_multipart(encoder.encode(answer))
        inputs.close(0)
        outputs.close(0)

    def stop(self) -> None:
        self._over.set()
        self.join()
        self._context.term()

    def _answer(self, frames: list[bytes]) -> EngineCoreOutputs | None:
        kind = EngineCoreRequestType(frames[0])
        if kind == EngineCoreRequestType.UTILITY:
            client, call_id, method, _ = MsgpackDecoder().decode(frames[1:])
            assert client in {1, 2}
            return EngineCoreOutputs(utility_output=UtilityOutput(call_id, result=UtilityResult(ANSWERS[method])))
        if kind != EngineCoreRequestType.ADD:
            return None
        request: EngineCoreRequest = MsgpackDecoder(EngineCoreRequest).decode(frames[1:])
        self.requests.append(request)
        output = EngineCoreOutput(request.request_id, [7], finish_reason=FinishReason.LENGTH)
        return EngineCoreOutputs(outputs=[output], scheduler_stats=SchedulerStats(num_running_reqs=1))


def plan_of(model: Path) -> bytes:
    """What the first process would send, of an engine whose window has turned out to be 512 tokens."""
    arguments = complete_arguments(parse_arguments([str(model), "--max-model-len", "1024"]))
    config = AsyncEngineArgs.from_cli_args(arguments.args).create_engine_config(UsageContext.OPENAI_API_SERVER)
    config.model_config.max_model_len = 512
    config.cache_config.num_gpu_blocks, config.cache_config.kv_cache_size_tokens = 64, 8192
    return cloudpickle.dumps(_Plan(arguments, config, None))


@contextmanager
def stand_in(addresses: tuple[str, str]) -> Iterator[StandIn]:
    """It runs inside the block."""
    engine = StandIn(addresses)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()
