import json
import struct
from pathlib import Path

import pytest

from server.engine.model_files import (
    Tensor,
    UnreadableModel,
    model_folder,
    model_tensors,
    pickled_bytes,
    read_json,
    read_tensors,
)


def write_tensors(file: Path, **shapes: list[int]) -> None:
    """A safetensors file of bfloat16 tensors, as far as its header goes."""
    entries, begin = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * shape[1]
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, begin + size]}  # type: ignore[dict-item]
        begin += size
    header = json.dumps(entries).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header)


def test_the_header_tells_names_shapes_and_sizes(tmp_path: Path) -> None:
    write_tensors(tmp_path / "model.safetensors", a=[3, 4], b=[5, 1])
    assert read_tensors(tmp_path / "model.safetensors") == {
        "a": Tensor("BF16", (3, 4), 24),
        "b": Tensor("BF16", (5, 1), 10),
    }


def test_a_real_file_is_read_as_its_library_reads_it(tiny_tools_model: Path) -> None:
    from safetensors import safe_open

    with safe_open(tiny_tools_model / "model.safetensors", framework="pt") as opened:
        expected = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    assert {name: tensor.shape for name, tensor in model_tensors(tiny_tools_model).items()} == expected


def test_the_parts_of_a_model_are_put_together_and_its_second_copy_is_left_out(tmp_path: Path) -> None:
    write_tensors(tmp_path / "model-00001-of-00002.safetensors", a=[1, 1])
    write_tensors(tmp_path / "model-00002-of-00002.safetensors", b=[1, 1])
    write_tensors(tmp_path / "consolidated.safetensors", c=[1, 1])
    assert model_tensors(tmp_path).keys() == {"a", "b"}


def test_a_model_with_nothing_but_the_second_copy_has_that(tmp_path: Path) -> None:
    write_tensors(tmp_path / "consolidated.safetensors", c=[1, 1])
    assert model_tensors(tmp_path).keys() == {"c"}


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 64, struct.pack("<Q", 2) + b"no", struct.pack("<Q", 9) + b"[1,2,3,4]"]
)
def test_a_file_of_another_kind_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UnreadableModel, match=r"model\.safetensors"):
        model_tensors(tmp_path)


def test_weights_of_the_older_kind_have_a_size(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model-00001-of-00001.bin").write_bytes(b"x" * 10)
    (tmp_path / "training_args.bin").write_bytes(b"x" * 99)
    assert pickled_bytes(tmp_path) == 10


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_configuration_that_is_no_object_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(UnreadableModel, match=r"config\.json"):
        read_json(tmp_path / "config.json")


def test_a_model_is_found_in_its_folder_and_nowhere_else(tmp_path: Path) -> None:
    assert model_folder(str(tmp_path)) == tmp_path
    assert model_folder("nobody/never-heard-of") is None
