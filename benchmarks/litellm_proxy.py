"""LiteLLM's proxy in front of a server that runs.

Its pins collide with this project's, so it has an environment of its own in the user's cache folder, made on first use.
It is set up as its documentation advises for production: a master key, errors alone in the log, no debug output. It has
no database, no cache and no callbacks, which would only slow it down.
"""

import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from platformdirs import user_cache_path

from benchmarks.comparison import say
from benchmarks.contenders import MODEL_NAME, Contender, ContenderFailed, free_port, spawned

VERSION: Final = "1.102.4"
_KEY: Final = "sk-benchmark-0123456789abcdef"
_COMPLETE: Final = "complete"
# Of the caller's own environment: these would give the proxy a database, a cache, callbacks or other defaults.
_NOT_ITS_OWN: Final = ("LITELLM_", "DATABASE_", "REDIS_", "OTEL_", "PYTHON", "VIRTUAL_ENV", "TIDEGATE_")
_ENVIRONMENT: Final = {
    "LITELLM_LOG": "ERROR",
    "LITELLM_MODE": "PRODUCTION",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # otherwise it fetches its price list at each start
}


def installed() -> Path:
    """The folder of LiteLLM's environment, made first if it is not there. Raises `ContenderFailed`."""
    folder = user_cache_path("tidegate") / "benchmarks" / f"litellm-{VERSION}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / _COMPLETE).is_file():
            say(f"installing LiteLLM {VERSION} into {folder}, this once")
            _run([sys.executable, "-m", "venv", "--clear", str(folder)])
            wanted = f"litellm[proxy]=={VERSION}"
            _run([str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-input", wanted])
            (folder / _COMPLETE).touch()
    return folder


@contextmanager
def proxied(upstream: Contender, workers: int) -> Iterator[Contender]:
    """The proxy with so many processes, perhaps not ready; ended when the block is left. Raises `ContenderFailed`."""
    script = installed() / "bin" / "litellm"
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        config, log_file, port = Path(folder) / "config.yaml", Path(folder) / "log", free_port()
        config.write_text(json.dumps(_config(upstream)), encoding="utf-8")  # JSON is YAML as well
        command = [str(script), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
        command += ["--num_workers", str(workers), "--telemetry", "False"]
        started_s = time.perf_counter()
        process = spawned(command, log_file, _surroundings())
        contender = Contender(
            name=f"litellm + {upstream.name}",
            url=f"http://127.0.0.1:{port}",
            process=process,
            log_file=log_file,
            started_s=started_s,
            live_path="/health/liveliness",
            ready_path="/health/readiness",
            key=_KEY,
        )
        try:
            yield contender
        finally:
            contender.stop()


def _config(upstream: Contender) -> dict[str, Any]:
    # A retry would hide a failure, and a failure ends the benchmark.
    model = {"model": f"hosted_vllm/{MODEL_NAME}", "api_base": f"{upstream.url}/v1", "api_key": "none"}
    return {
        "model_list": [{"model_name": MODEL_NAME, "litellm_params": model}],
        "litellm_settings": {"set_verbose": False, "request_timeout": 600, "num_retries": 0},
        "general_settings": {"master_key": _KEY},
    }


def _surroundings() -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_ITS_OWN)}
    return {**own, **_ENVIRONMENT}


def _run(command: list[str]) -> None:
    done = subprocess.run(command, env=_surroundings(), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr or done.stdout).strip().rpartition("\n")[2]
        raise ContenderFailed(f"LiteLLM {VERSION} could not be installed: {reason}")
