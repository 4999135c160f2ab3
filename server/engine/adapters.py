"""LoRA adapters before they are loaded: whether this model can serve them, and what the operator should know.

vLLM copies an adapter's matrices into the upper left corner of its own, so that one of a smaller model loads without a
word and answers nonsense. What was trained on another model is found here by the shapes of its layers.
"""

import asyncio
import re
from argparse import Namespace
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, get_args

import structlog
from vllm.config.lora import LoRAConfig, MaxLoRARanks
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.utils import get_adapter_absolute_path

from server.engine.chat_templates import read_chat_template
from server.engine.model_files import Tensor, UnreadableModel, model_folder, model_tensors, read_json, read_tensors
from server.engine.start_failures import StartFailure

log = structlog.get_logger(__name__)

_CONFIG: Final = "adapter_config.json"
_WEIGHTS: Final = "adapter_model.safetensors"
_PICKLED: Final = ("adapter_model.bin", "adapter_model.pt")
_RANKS: Final[tuple[int, ...]] = tuple(sorted(get_args(MaxLoRARanks)))
# Each adapter that may run in the same step takes memory of its own.
_MOST_IN_ONE_STEP: Final = 4
_PEFT_PREFIX: Final = "base_model.model."
_HALF: Final = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])(?:\.default)?\.weight")
# Packed weights (4 bit) are shorter than the layer that they stand for.
_WHOLE_TYPES: Final = frozenset({"BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2", "I8"})
_MATRIX: Final = 2
Change = Callable[..., Awaitable[ErrorResponse | str]]


class AdapterProblem(Exception):
    """An adapter that cannot be served; the message is a sentence for the operator."""


@dataclass(frozen=True, slots=True)
class Base:
    """The served model: its name or folder, the template it is served with, and the adapters' largest rank."""

    model: str
    revision: str | None
    chat_template: str | None
    max_rank: int


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter as it lies on the disk. `modules` are the layers it changes, as (outputs, inputs), as far as it says.

    `trained_on` is the base model's name where it was trained, which may be a folder of another machine.
    """

    name: str
    folder: Path
    trained_on: str
    rank: int
    modules: Mapping[str, tuple[int, int]]


def complete_adapters(args: Namespace) -> None:
    """Switch LoRA on for the adapters that are named, with room for their ranks. Raises `StartFailure`."""
    if not args.lora_modules:
        return
    try:
        adapters = [read_adapter(module.name, module.path) for module in args.lora_modules]
        args.enable_lora = True
        if args.max_lora_rank == LoRAConfig.max_lora_rank:
            args.max_lora_rank = rank_for(adapters)
        if args.max_loras == LoRAConfig.max_loras:
            args.max_loras = min(len(adapters), _MOST_IN_ONE_STEP)
        base = Base(args.model, args.revision, _template(args), args.max_lora_rank)
        for adapter in adapters:
            check_adapter(adapter, base)
    except AdapterProblem as problem:
        raise StartFailure(str(problem)) from problem
    log.info(
        "adapters", names=[adapter.name for adapter in adapters], max_lora_rank=args.max_lora_rank,
        max_loras=args.max_loras,
    )  # fmt: skip


def check_before_loading(models: OpenAIServingModels, args: Namespace) -> None:
    """Let what is loaded while the server runs be checked first, in vLLM's own way of saying no."""
    base = Base(args.model, args.revision, _template(args), args.max_lora_rank)
    load = models.load_lora_adapter

    async def checked(request: LoadLoRAAdapterRequest, base_model_name: str | None = None) -> ErrorResponse | str:
        try:
            await asyncio.to_thread(_inspect, request.lora_name, request.lora_path, base, enabled=args.enable_lora)
        except AdapterProblem as problem:
            return create_error_response(str(problem), status_code=HTTPStatus.BAD_REQUEST, param="lora_path")
        return await load(request, base_model_name)

    models.load_lora_adapter = checked


def tell_of_changes(models: OpenAIServingModels, tell: Callable[[], None]) -> None:
    """Call `tell` whenever adapters were loaded or unloaded while the server runs, before the caller has its answer."""

    def telling(change: Change) -> Change:
        async def told(request: Any, *rest: Any) -> ErrorResponse | str:
            answer = await change(request, *rest)
            tell()
            return answer

        return told

    models.load_lora_adapter = telling(models.load_lora_adapter)
    models.unload_lora_adapter = telling(models.unload_lora_adapter)


def _inspect(name: str, path: str, base: Base, *, enabled: bool) -> None:
    if not enabled:
        raise AdapterProblem("The server was started without --enable-lora, so it has no room for adapters.")
    check_adapter(read_adapter(name, path), base)


def _template(args: Namespace) -> str | None:
    return read_chat_template(args.model, args.chat_template, args.revision)


def read_adapter(name: str, path: str) -> AdapterFiles:
    """An adapter's files, as PEFT, LLaMA-Factory and ms-swift write them. Raises `AdapterProblem`."""
    folder = Path(get_adapter_absolute_path(path))
    if not (folder / _CONFIG).is_file():
        raise AdapterProblem(
            f"The adapter {name} is not in {path}: give the folder that holds its {_CONFIG} ({_found_instead(folder)})."
        )
    try:
        config = read_json(folder / _CONFIG)
        tensors = read_tensors(folder / _WEIGHTS) if (folder / _WEIGHTS).is_file() else None
    except UnreadableModel as error:
        raise AdapterProblem(f"The adapter {name} cannot be read: {error}") from error
    if tensors is None and not any((folder / file).is_file() for file in _PICKLED):
        raise AdapterProblem(f"The adapter {name} has no weights: {folder / _WEIGHTS} is missing.")
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    return AdapterFiles(
        name=name,
        folder=folder,
        trained_on=str(config.get("base_model_name_or_path") or "another model"),
        rank=max((rank for rank in ranks if isinstance(rank, int)), default=0),
        modules=_modules(tensors or {}),
    )


def _found_instead(folder: Path) -> str:
    """What may help a person who named the wrong folder: training leaves several."""
    if not folder.is_dir():
        return "there is no such folder"
    inside = sorted(file.parent.name for file in folder.glob(f"*/{_CONFIG}"))
    if inside:
        return f"there is one in {', '.join(inside)} below it"
    if (folder / "config.json").is_file():
        return "it holds a whole model: serve it as the model itself"
    return "it holds none"


def _modules(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Layer by name, with the outputs of its B matrix and the inputs of its A matrix."""
    halves: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, tensor in tensors.items():
        if (found := _HALF.fullmatch(key.removeprefix(_PEFT_PREFIX))) and len(tensor.shape) == _MATRIX:
            halves.setdefault(found["module"], {})[found["half"]] = tensor.shape
    return {
        module: (shapes["B"][0], shapes["A"][1]) for module, shapes in halves.items() if shapes.keys() == {"A", "B"}
    }


def rank_for(adapters: Sequence[AdapterFiles]) -> int:
    """The smallest rank that vLLM has kernels for and that holds every adapter."""
    needed = max(adapter.rank for adapter in adapters)
    return next((rank for rank in _RANKS if rank >= needed), _RANKS[-1])


def check_adapter(adapter: AdapterFiles, base: Base) -> None:
    """Raise `AdapterProblem` for an adapter that this model cannot serve, and warn of one that it serves badly."""
    if adapter.rank > base.max_rank:
        larger = rank_for([adapter])
        advice = f"start the server with --max-lora-rank {larger}" if larger >= adapter.rank else "train a smaller one"
        raise AdapterProblem(
            f"The adapter {adapter.name} has rank {adapter.rank}, and the server has room for rank {base.max_rank}: "
            f"{advice}."
        )
    try:
        PEFTHelper.from_local_dir(str(adapter.folder), None).validate_legal(LoRAConfig(max_lora_rank=base.max_rank))
    except (TypeError, ValueError) as error:
        raise AdapterProblem(f"The adapter {adapter.name} cannot be served: {error}") from error
    _refuse_foreign(adapter, base)
    template = read_chat_template(str(adapter.folder), None, None)
    if template is not None and template.strip() != (base.chat_template or "").strip():
        log.warning(
            "an adapter was trained with another chat template than the one that is served, and may answer badly; "
            "serve it with its own: --chat-template FILE",
            adapter=adapter.name,
            template_of=str(adapter.folder),
        )


def _refuse_foreign(adapter: AdapterFiles, base: Base) -> None:
    """Quantized weights have other names and shapes; layers that are not found as they are prove nothing."""
    folder = model_folder(base.model, base.revision)
    if folder is None:
        return
    try:
        tensors = model_tensors(folder)
    except UnreadableModel as error:
        raise AdapterProblem(str(error)) from error
    shapes = {name: tensor.shape for name, tensor in tensors.items() if tensor.dtype in _WHOLE_TYPES}
    for module, shape in adapter.modules.items():
        theirs = shapes.get(f"{module}.weight")
        if theirs is not None and theirs != shape:
            raise _foreign(adapter, base, f"its {module} is {_size(shape)} and that of this model {_size(theirs)}")
    deepest, layers = _depth(adapter.modules), _depth(shapes)
    if layers and deepest > layers:
        raise _foreign(adapter, base, f"it changes {deepest} layers and this model has {layers}")


def _depth(names: Mapping[str, Any]) -> int:
    """The number of layers, by the highest that is named."""
    numbers = (int(found[1]) for name in names if (found := re.search(r"\.layers\.(\d+)\.", f".{name}.")))
    return max(numbers, default=-1) + 1


def _size(shape: Sequence[int]) -> str:
    return " x ".join(str(size) for size in shape)


def _foreign(adapter: AdapterFiles, base: Base, why: str) -> AdapterProblem:
    return AdapterProblem(
        f"The adapter {adapter.name} belongs to another model than {base.model}: {why}. It was trained on "
        f"{adapter.trained_on}: serve that model with it, or leave the adapter out."
    )
