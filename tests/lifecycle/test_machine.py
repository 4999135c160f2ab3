"""What a process asks of its machine."""

import os
import subprocess
import sys

import pytest

from server.lifecycle import machine

_COUNTED = """
import os
from pathlib import Path
from server.lifecycle.machine import leave_a_core_to_the_event_loop
os.sched_getaffinity = lambda pid: range({cores})
leave_a_core_to_the_event_loop()
from tokenizers import Tokenizer, models, pre_tokenizers
tokenizer = Tokenizer(models.WordLevel({{"tide": 0}}, "tide"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
before = len(os.listdir("/proc/self/task"))
tokenizer.encode_batch_fast(["tide " * 100] * 100)
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
@pytest.mark.parametrize(("cores", "threads"), [(2, 1), (5, 4), (1, 1)])
def test_tokenizers_leave_a_core_to_the_event_loop(cores: int, threads: int) -> None:
    usual = {name: value for name, value in os.environ.items() if name != "RAYON_NUM_THREADS"}
    code = _COUNTED.format(cores=cores)
    done = subprocess.run([sys.executable, "-c", code], env=usual, capture_output=True, text=True, check=True)
    assert int(done.stdout) == threads


def test_what_the_operator_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYON_NUM_THREADS", "7")
    machine.leave_a_core_to_the_event_loop()
    assert os.environ["RAYON_NUM_THREADS"] == "7"
