"""What a model's files tell without loading it: its configuration, and the names and shapes of its weights.

The header of a safetensors file is 8 bytes with its own length (little endian) and that many bytes of JSON:
https://github.com/huggingface/safetensors#format
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from transformers.utils import cached_file

CONFIG: Final = "config.json"
_LENGTH_BYTES: Final = 8
_LONGEST_HEADER: Final = 100 << 20  # what the library itself accepts
_METADATA: Final = "__metadata__"
_PICKLED: Final = ("pytorch_model*.bin", "model*.pt", "consolidated*.pth")


class UnreadableModel(Exception):
    """A file that should tell about the model and does not; the message is a sentence for the operator."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a file: its type as the file spells it (`BF16`), its shape and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    size_bytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def model_folder(model: str, revision: str | None = None) -> Path | None:
    """The folder of a model: its own, or that of its files in Hugging Face's cache; None where it is in neither.

    Nothing is downloaded.
    """
    if (folder := Path(model).expanduser()).is_dir():
        return folder
    found = cached_file(
        model,
        CONFIG,
        revision=revision,
        local_files_only=True,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found).parent if found else None


def read_json(file: Path) -> dict[str, Any]:
    """A file with one JSON object. Raises `UnreadableModel`."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnreadableModel(f"{file} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UnreadableModel(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise UnreadableModel(f"{file} is no JSON object.")
    return value


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, from its header alone. Raises `UnreadableModel`."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
            if not 0 < length <= min(_LONGEST_HEADER, file.stat().st_size):
                raise UnreadableModel(f"{file} is no safetensors file, or was cut short: copy or download it again.")
            header = json.loads(opened.read(length))
        return {name: _tensor(entry) for name, entry in header.items() if name != _METADATA}
    except OSError as error:
        raise UnreadableModel(f"{file} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnreadableModel(f"{file} is no safetensors file, or was cut short: copy or download it again.") from error


def _tensor(entry: Mapping[str, Any]) -> Tensor:
    begin, end = entry["data_offsets"]
    return Tensor(str(entry["dtype"]), tuple(int(size) for size in entry["shape"]), int(end) - int(begin))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a model's weights. Mistral keeps a second copy, which is left out."""
    files = sorted(folder.glob("*.safetensors"))
    return [file for file in files if not file.name.startswith("consolidated")] or files


def model_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of all files of a model; none where they are no safetensors. Raises `UnreadableModel`."""
    return {name: tensor for file in weight_files(folder) for name, tensor in read_tensors(file).items()}


def pickled_bytes(folder: Path) -> int:
    """The size of weights that are no safetensors."""
    return sum(file.stat().st_size for file in _pickled(folder))


def _pickled(folder: Path) -> Iterator[Path]:
    for pattern in _PICKLED:
        yield from folder.glob(pattern)
