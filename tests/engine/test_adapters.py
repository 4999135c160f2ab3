from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm.entrypoints.openai.models.protocol import LoRAModulePath
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

from server.engine.adapters import (
    AdapterProblem,
    Base,
    check_adapter,
    check_before_loading,
    complete_adapters,
    read_adapter,
)
from server.engine.start_failures import StartFailure
from tests.models.tiny_adapter import make_tiny_adapter
from tests.telemetry.captured_logs import CapturedLogs, captured_logs

OTHER_TEMPLATE = "{{ messages }}"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def log() -> Iterator[CapturedLogs]:
    with captured_logs() as captured:
        yield captured


@pytest.fixture
def base(tiny_tools_model: Path) -> Base:
    template = (tiny_tools_model / "chat_template.jinja").read_text(encoding="utf-8")
    return Base(str(tiny_tools_model), None, template, max_rank=16)


def arguments(model: Path, *adapters: Path, max_lora_rank: int = 16, max_loras: int = 1) -> Namespace:
    modules = [LoRAModulePath(name=folder.name, path=str(folder)) for folder in adapters]
    return Namespace(
        model=str(model), revision=None, chat_template=None, lora_modules=modules, enable_lora=False,
        max_lora_rank=max_lora_rank, max_loras=max_loras,
    )  # fmt: skip


def test_an_adapter_of_this_model_passes_without_a_word(tmp_path: Path, base: Base, log: CapturedLogs) -> None:
    check_adapter(read_adapter("mine", str(make_tiny_adapter(tmp_path / "mine"))), base)
    assert log.events == []


@pytest.mark.parametrize(("hidden", "layers", "why"), [(64, 2, "64 x 64"), (128, 3, "3 layers")])
def test_an_adapter_of_another_model_is_refused_with_the_name_of_its_own(
    tmp_path: Path, base: Base, hidden: int, layers: int, why: str
) -> None:
    folder = make_tiny_adapter(tmp_path / "foreign", hidden=hidden, layers=layers)
    with pytest.raises(AdapterProblem) as refused:
        check_adapter(read_adapter("foreign", str(folder)), base)
    for words in ("foreign", "/training/machine/tiny-llama", why):
        assert words in str(refused.value)


def test_a_rank_that_has_no_room_names_the_flag(tmp_path: Path, base: Base) -> None:
    with pytest.raises(AdapterProblem, match="--max-lora-rank 64"):
        check_adapter(read_adapter("big", str(make_tiny_adapter(tmp_path / "big", rank=48))), base)


def test_what_vllm_cannot_serve_is_said_in_its_words(tmp_path: Path, base: Base) -> None:
    with pytest.raises(AdapterProblem, match="DoRA"):
        check_adapter(read_adapter("dora", str(make_tiny_adapter(tmp_path / "dora", use_dora=True))), base)


def test_a_chat_template_of_its_own_is_warned_of(tmp_path: Path, base: Base, log: CapturedLogs) -> None:
    folder = make_tiny_adapter(tmp_path / "mine")
    (folder / "chat_template.jinja").write_text(OTHER_TEMPLATE, encoding="utf-8")
    check_adapter(read_adapter("mine", str(folder)), base)
    assert [event["adapter"] for event in log.events] == ["mine"]
    assert "--chat-template" in log.events[0]["event"]


def test_the_same_chat_template_is_not_warned_of(tmp_path: Path, base: Base, log: CapturedLogs) -> None:
    folder = make_tiny_adapter(tmp_path / "mine")
    (folder / "chat_template.jinja").write_text(f"{base.chat_template}\n", encoding="utf-8")
    check_adapter(read_adapter("mine", str(folder)), base)
    assert log.events == []


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ((), "no such folder"),
        (("config.json",), "whole model"),
        (("checkpoint-10/adapter_config.json",), "checkpoint-10"),
        (("adapter_config.json",), "no weights"),
    ],
)
def test_a_wrong_folder_is_told_with_what_it_holds(tmp_path: Path, files: tuple[str, ...], words: str) -> None:
    folder = tmp_path / "output"
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}", encoding="utf-8")
    with pytest.raises(AdapterProblem, match=words):
        read_adapter("mine", str(folder))


def test_weights_that_were_cut_short_are_told(tmp_path: Path) -> None:
    folder = make_tiny_adapter(tmp_path / "mine")
    (folder / "adapter_model.safetensors").write_bytes(b"\x00" * 4)
    with pytest.raises(AdapterProblem, match="cut short"):
        read_adapter("mine", str(folder))


def test_naming_adapters_switches_lora_on_with_room_for_all(tmp_path: Path, tiny_tools_model: Path) -> None:
    adapters = [make_tiny_adapter(tmp_path / name, rank=rank) for name, rank in (("a", 4), ("b", 24), ("c", 8))]
    args = arguments(tiny_tools_model, *adapters)
    complete_adapters(args)
    assert (args.enable_lora, args.max_lora_rank, args.max_loras) == (True, 32, 3)


def test_what_the_operator_chose_stays(tmp_path: Path, tiny_tools_model: Path) -> None:
    args = arguments(tiny_tools_model, make_tiny_adapter(tmp_path / "a", rank=4), max_lora_rank=64, max_loras=2)
    complete_adapters(args)
    assert (args.max_lora_rank, args.max_loras) == (64, 2)


def test_a_start_with_a_foreign_adapter_fails_with_the_sentence(tmp_path: Path, tiny_tools_model: Path) -> None:
    with pytest.raises(StartFailure, match="belongs to another model"):
        complete_adapters(arguments(tiny_tools_model, make_tiny_adapter(tmp_path / "foreign", hidden=64)))


class Models:
    """What an adapter is loaded into."""

    def __init__(self) -> None:
        self.loaded: list[str] = []

    async def load_lora_adapter(
        self, request: LoadLoRAAdapterRequest, base_model_name: str | None = None
    ) -> ErrorResponse | str:
        del base_model_name
        self.loaded.append(request.lora_name)
        return "Success"


async def load(models: Models, name: str, folder: Path) -> ErrorResponse | str:
    return await models.load_lora_adapter(LoadLoRAAdapterRequest(lora_name=name, lora_path=str(folder)))


@pytest.mark.anyio
async def test_an_adapter_is_checked_before_it_is_loaded_into_a_running_server(
    tmp_path: Path, tiny_tools_model: Path
) -> None:
    models, args = Models(), arguments(tiny_tools_model)
    args.enable_lora = True
    check_before_loading(models, args)
    assert await load(models, "mine", make_tiny_adapter(tmp_path / "mine")) == "Success"
    refused = await load(models, "foreign", make_tiny_adapter(tmp_path / "foreign", hidden=64))
    assert isinstance(refused, ErrorResponse)
    assert (refused.error.code, refused.error.param) == (400, "lora_path")
    assert "belongs to another model" in refused.error.message
    assert models.loaded == ["mine"]


@pytest.mark.anyio
async def test_a_server_without_room_for_adapters_names_the_flag(tmp_path: Path, tiny_tools_model: Path) -> None:
    models = Models()
    check_before_loading(models, arguments(tiny_tools_model))
    refused = await load(models, "mine", make_tiny_adapter(tmp_path / "mine"))
    assert isinstance(refused, ErrorResponse)
    assert "--enable-lora" in refused.error.message
