"""A server whose engine takes no time: what is left is the front-end.

`python -m benchmarks.instant_engine plain|tidegate ARGS` runs that server with a stand-in below vLLM's `AsyncLLM`. It
takes the place of the client that talks to the engine's process. Every step gives each running request one token,
through vLLM's real message encoding; everything above is what it always is. As in an engine, `--max-num-seqs` of them
run at a time, and the others wait. The CPU that the stand-in itself uses is
written to the file that `INSTANT_ENGINE_COST` names, so that a benchmark can take it off.
"""

import asyncio
import mmap
import os
import runpy
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

from vllm.tasks import SupportedTask
from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine import FinishReason as Finish
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.metrics.stats import PrefillStats, SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

COST_FILE_ENV: Final = "INSTANT_ENGINE_COST"
STEPS_PER_S_ENV: Final = "INSTANT_ENGINE_STEPS_PER_S"
PLAIN_ENTRY: Final = "vllm.entrypoints.launchers.api_server.entry"
_BLOCKS: Final = 1 << 16
_TOKEN_IDS: Final = range(1000, 9000)  # ordinary words in every vocabulary


@dataclass(slots=True)
class _Running:
    request_id: str
    prompt_tokens: int
    max_tokens: int
    made: int = 0


class InstantEngine:
    """What `AsyncLLM` asks of its engine's client."""

    def __init__(
        self,
        vllm_config: Any,
        executor_class: Any,  # noqa: ARG002  # the names are vLLM's
        log_stats: bool,  # noqa: ARG002
        client_addresses: Any = None,  # noqa: ARG002
        client_count: int = 1,  # noqa: ARG002
        client_index: int = 0,  # noqa: ARG002
        renderer: Any = None,  # noqa: ARG002
    ) -> None:
        cache = vllm_config.cache_config
        cache.num_gpu_blocks = _BLOCKS
        cache.kv_cache_size_tokens = _BLOCKS * (cache.block_size or 16)
        self.engine_ranks_managed = [0]
        self.resources = SimpleNamespace(engine_dead=False, engine_manager=None, coordinator=None)
        self._max_running = vllm_config.scheduler_config.max_num_seqs
        self._step_s = 1 / float(os.environ.get(STEPS_PER_S_ENV, "25"))
        self._requests: dict[str, _Running] = {}  # in the order of arrival
        self._arrived = asyncio.Event()
        self._next_step_s = 0.0
        self._encoder, self._decoder = MsgpackEncoder(), MsgpackDecoder(EngineCoreOutputs)
        self._cost_s = 0.0
        self._cost_file = _mapped(Path(os.environ[COST_FILE_ENV])) if COST_FILE_ENV in os.environ else None

    async def get_supported_tasks_async(self) -> tuple[SupportedTask, ...]:
        return ("generate",)

    async def reset_mm_cache_async(self) -> None:
        """There is no engine that could hold one."""

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        self._encoder.encode(request)
        params = request.sampling_params
        assert params is not None
        max_tokens = params.max_tokens or 1
        self._requests[request.request_id] = _Running(
            request.request_id, len(request.prompt_token_ids or ()), max_tokens
        )
        self._arrived.set()

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self._requests.pop(request_id, None)

    async def get_output_async(self) -> EngineCoreOutputs:
        while not self._requests:
            self._arrived.clear()
            await self._arrived.wait()
        now_s = time.monotonic()
        self._next_step_s = max(self._next_step_s + self._step_s, now_s)
        await asyncio.sleep(self._next_step_s - now_s)
        began_s = time.thread_time()
        frames = self._encoder.encode(self._step())
        self._spent(time.thread_time() - began_s)
        outputs: EngineCoreOutputs = self._decoder.decode(frames)
        return outputs

    def _step(self) -> EngineCoreOutputs:
        outputs = [self._token(running) for running in islice(self._requests.values(), self._max_running)]
        stats = SchedulerStats(
            num_running_reqs=len(outputs),
            num_waiting_reqs=len(self._requests) - len(outputs),
            kv_cache_usage=len(outputs) / _BLOCKS,
        )
        finished = {output.request_id for output in outputs if output.finish_reason is not None}
        for request_id in finished:
            del self._requests[request_id]
        return EngineCoreOutputs(outputs=outputs, scheduler_stats=stats, finished_requests=finished or None)

    def _token(self, running: _Running) -> EngineCoreOutput:
        first = running.made == 0
        token_id = _TOKEN_IDS[(running.made * 37 + len(running.request_id)) % len(_TOKEN_IDS)]
        running.made += 1
        return EngineCoreOutput(
            running.request_id,
            [token_id],
            finish_reason=Finish.LENGTH if running.made >= running.max_tokens else None,
            events=_begin() if first else None,
            prefill_stats=_prefill(running.prompt_tokens) if first else None,
        )

    def _spent(self, cost_s: float) -> None:
        self._cost_s += cost_s
        if self._cost_file is not None:
            struct.pack_into("d", self._cost_file, 0, self._cost_s)

    def shutdown(self, timeout: float | None = None) -> None:
        """Nothing runs elsewhere."""


def cost_s(file: Path) -> float:
    """CPU seconds that the stand-in has used so far."""
    value: float = struct.unpack("d", file.read_bytes()[:8])[0]
    return value


def _begin() -> list[EngineCoreEvent]:
    kinds: Sequence[EngineCoreEventType] = (EngineCoreEventType.QUEUED, EngineCoreEventType.SCHEDULED)
    return [EngineCoreEvent.new_event(kind) for kind in kinds]


def _prefill(prompt_tokens: int) -> PrefillStats:
    return PrefillStats(num_prompt_tokens=prompt_tokens, num_computed_tokens=prompt_tokens)


def _mapped(file: Path) -> mmap.mmap:
    file.write_bytes(bytes(8))
    with file.open("r+b") as opened:
        return mmap.mmap(opened.fileno(), 8)


def main() -> None:
    """Put the stand-in in place and become the server that the first argument names."""
    EngineCoreClient.make_async_mp_client = staticmethod(InstantEngine)
    name, *args = sys.argv[1:]
    module, prefix = {"plain": (PLAIN_ENTRY, []), "tidegate": ("server", ["serve"])}[name]
    sys.argv = [module, *prefix, *args]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
