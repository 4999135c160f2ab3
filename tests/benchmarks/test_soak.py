import asyncio
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from benchmarks.contenders import Contender
from benchmarks.holdings import Holdings, holdings
from benchmarks.soak_crowd import outcome_of
from benchmarks.soak_mix import CHAT_PATH, Ask, Kind, asks, tenants_file
from benchmarks.soak_report import Sample, Soak
from server.store.keys import digest
from server.store.tenants_file import read_tenants

FRAME, DONE = b'data: {"choices": []}\n\n', b"data: [DONE]\n\n"


def soak(memory: list[int], files: list[int]) -> Soak:
    samples = [
        Sample(1000 * number, 10.0 * number, 20, Holdings(rss, rss, fds, 30, 2, 5))
        for number, (rss, fds) in enumerate(zip(memory, files, strict=True))
    ]
    return Soak(samples, Counter(), Counter())


def verdicts(of: Soak) -> dict[str, str]:
    return {growth.figure: growth.verdict for growth in of.growths()}


def test_memory_that_grows_in_the_first_half_only_is_flat() -> None:
    memory = [500 + min(number, 50) * 4 for number in range(101)]
    assert set(verdicts(soak(memory, [40] * 101)).values()) == {"flat"}


def test_memory_that_grows_by_two_percent_in_the_second_half_is_not() -> None:
    memory = [1000 + number // 2 for number in range(101)]
    found = verdicts(soak(memory, [40] * 101))
    assert (found["rss_mib"], found["family_anon_mib"], found["fds"]) == ("grows", "grows", "flat")


def test_one_high_sample_does_not_make_memory_grow() -> None:
    memory = [1000] * 100 + [1500]
    assert verdicts(soak(memory, [40] * 101))["rss_mib"] == "flat"


def test_a_file_that_is_left_open_now_and_then_is_seen_and_two_more_are_not() -> None:
    assert verdicts(soak([1000] * 101, [40 + number // 10 for number in range(101)]))["fds"] == "grows"
    assert verdicts(soak([1000] * 101, [40 + number // 50 for number in range(101)]))["fds"] == "flat"


def test_the_same_seed_asks_the_same_and_all_kinds_come() -> None:
    assert list(asks(300)) == list(asks(300))
    assert list(asks(300)) != list(asks(300, seed=1))
    assert len({ask.kind for ask in asks(300)}) == 8


def test_the_server_knows_every_key_but_the_strangers(tmp_path: Path) -> None:
    declared = tmp_path / "tenants.toml"
    declared.write_text(tenants_file(), encoding="utf-8")
    known = read_tenants(declared, {})
    assert tomllib.loads(tenants_file())["tenants"].keys() == known.tenants.keys()
    for ask in asks(1000):
        assert (digest(ask.key) in known.holders) == (ask.kind != "stranger")


def test_a_long_chat_comes_back_with_an_exchange_more() -> None:
    chats = [ask.body["messages"] for ask in asks(5000) if ask.kind == "long chat"]
    again = next(same for chat in chats if len(same := [one for one in chats if one[0] == chat[0]]) > 1)
    assert [len(chat) for chat in again] == [len(again[0]) + 2 * number for number in range(len(again))]
    assert again[1][: len(again[0])] == again[0]


def ask_for(kind: Kind, frames: int | None = None, *, stream: bool = True) -> Ask:
    return Ask(kind, CHAT_PATH, "a-key", {"stream": stream}, frames)


async def asked(ask: Ask, answer: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> str:
    """What becomes of it at a server that answers like this."""
    app = web.Application()
    app.router.add_post(CHAT_PATH, answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    try:
        async with aiohttp.ClientSession(f"http://{host}:{port}") as session:
            return await outcome_of(session, ask)
    finally:
        await runner.cleanup()


def streaming(*frames: bytes) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for frame in frames:
            await response.write(frame)
        return response

    return answer


@pytest.mark.parametrize(
    ("frames", "outcome"),
    [
        ((FRAME, FRAME, DONE), "answered"),
        ((FRAME, FRAME), "cut short"),
        ((FRAME, b'data: {"error": {}}\n\n', DONE), "broken off"),
    ],
)
def test_a_stream_is_answered_only_when_it_is_whole(frames: tuple[bytes, ...], outcome: str) -> None:
    assert asyncio.run(asked(ask_for("stream"), streaming(*frames))) == outcome


def test_a_leaver_leaves_after_its_frames_or_at_once() -> None:
    async def silent(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.2)
        return web.Response()

    assert asyncio.run(asked(ask_for("leaver", 2), streaming(FRAME, FRAME, FRAME, DONE))) == "left"
    assert asyncio.run(asked(ask_for("leaver", 0), silent)) == "left"


def test_a_refusal_is_its_status_and_a_closed_connection_no_answer() -> None:
    async def refusing(request: web.Request) -> web.StreamResponse:
        return web.Response(status=401 if request.headers["Authorization"] == "Bearer a-key" else 200)

    async def hanging_up(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    assert asyncio.run(asked(ask_for("stranger"), refusing)) == "401"
    assert asyncio.run(asked(ask_for("answer", stream=False), hanging_up)) == "ServerDisconnectedError"


def test_a_process_holds_what_it_has_made() -> None:
    code = "block = 'y' * (64 << 20); print('made', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"made\n"
        held = holdings(Contender("one", "", process, Path(), 0.0, ""))
        process.kill()
    assert 64 <= held.family_anon_mib < 128
    assert held.rss_mib >= held.family_anon_mib
    assert (held.threads, held.children) == (1, 0)
