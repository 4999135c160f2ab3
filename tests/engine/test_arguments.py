import json
import os
from pathlib import Path

import psutil
import pytest
from vllm.platforms import current_platform

from server.engine.arguments import (
    EngineArguments,
    complete_arguments,
    cpu_ranks,
    divisor_at_most,
    parse_arguments,
    vllm_help,
)
from server.engine.sharing import refuse_unshareable
from server.engine.start_failures import StartFailure

pytestmark = pytest.mark.engine
on_a_cpu = pytest.mark.skipif(not current_platform.is_cpu(), reason="what is chosen on a CPU")

AUTO = 0
GIB = 1 << 30


def told(*flags: str) -> str:
    """What the operator reads when these flags are refused."""
    with pytest.raises(StartFailure) as refused:
        parse_arguments(flags)
    return str(refused.value)


def test_with_nothing_given_everything_is_left_to_be_chosen() -> None:
    args = parse_arguments([])
    assert (args.model, args.max_model_len, args.tensor_parallel_size) == (None, -1, AUTO)
    assert args.enforce_eager == current_platform.is_cpu()


@pytest.mark.parametrize("flags", [["org/model"], ["--model", "org/model"], ["--seed", "1", "org/model"]])
def test_the_model_may_stand_alone_or_behind_its_flag(flags: list[str]) -> None:
    assert parse_arguments(flags).model == "org/model"


def test_what_is_given_is_taken() -> None:
    flags = ["m", "--max-model-len", "4k", "--tensor_parallel_size=2", "--no-enforce-eager", "--seed", "7"]
    args = parse_arguments(flags)
    assert (args.max_model_len, args.tensor_parallel_size, args.enforce_eager, args.seed) == (4000, 2, False, 7)


def test_of_two_values_the_last_one_counts() -> None:
    assert parse_arguments(["--seed", "1", "--seed", "2"]).seed == 2


@pytest.mark.parametrize(
    "flags",
    [
        ["--tensor-parallel-size", "auto"],
        ["--tensor-parallel-size=auto"],
        ["--tensor_parallel_size", "auto"],
        ["--tensor_parallel_size=auto"],
        ["-tp", "auto"],
        ["-tp=auto"],
    ],
)
def test_tensor_parallelism_may_be_left_open_in_every_spelling(flags: list[str]) -> None:
    args = parse_arguments(["m", *flags, "--seed", "7"])
    assert (args.model, args.tensor_parallel_size, args.seed) == ("m", AUTO, 7)


def test_auto_stays_a_value_of_other_flags() -> None:
    args = parse_arguments(["--dtype", "auto", "--max-model-len", "auto", "-tp", "2"])
    assert (args.dtype, args.max_model_len, args.tensor_parallel_size) == ("auto", -1, 2)


@pytest.mark.parametrize(
    ("flag", "near"),
    [
        ("--max-model-lenn", "--max-model-len"),
        ("--quantisation", "--quantization"),
        ("--tensor-paralel-size", "--tensor-parallel-size"),
    ],
)
def test_an_unknown_flag_is_refused_with_the_nearest_one(flag: str, near: str) -> None:
    sentence = told("m", flag, "1")
    assert flag in sentence
    assert sentence.endswith(f"Did you mean {near}?")


def test_an_unknown_flag_like_no_other_is_refused_with_the_way_to_the_list() -> None:
    assert told("--xyzzy").endswith("`tidegate serve --help` lists Tidegate's flags.")


def test_a_second_model_is_refused() -> None:
    assert "Unrecognized arguments: another" in told("m", "another")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seed", "x"], "--seed: invalid int value: 'x'"),
        (["--max-model-len"], "--max-model-len: expected one argument"),
        (["--kv-cache-dtype", "fp9"], "--kv-cache-dtype: invalid choice: 'fp9'"),
    ],
)
def test_a_wrong_value_is_told_without_guessing_at_the_flag(flags: list[str], words: str) -> None:
    sentence = told(*flags)
    assert words in sentence
    assert "Did you mean" not in sentence


@pytest.mark.parametrize(
    "flags",
    [
        ["--headless"],
        ["--grpc"],
        ["--grpc-port", "1"],
        ["--tokens-only"],
        ["--enable-ssl-refresh"],
        ["--data-parallel-multi-port-external-lb"],
        ["--middleware", "a.b"],
        ["--api-server-count", "2"],
    ],
)
def test_a_flag_that_cannot_be_honoured_is_refused_with_what_to_do_instead(flags: list[str]) -> None:
    sentence = told("m", *flags)
    assert sentence.startswith(flags[0])
    assert "not supported" in sentence
    assert sentence.count(".") >= 2


def test_one_api_server_is_what_there_is() -> None:
    assert parse_arguments(["--api-server-count", "1"]).api_server_count == 1


def test_a_configuration_file_of_vllms_is_read(tmp_path: Path) -> None:
    file = tmp_path / "vllm.yaml"
    file.write_text("seed: 7\nmax-model-len: 4096\n", encoding="utf-8")
    args = parse_arguments(["m", "--config", str(file), "--max-model-len", "100"])
    assert (args.model, args.seed, args.max_model_len) == ("m", 7, 100)


def test_a_configuration_file_that_is_not_there_is_told_in_a_sentence(tmp_path: Path) -> None:
    assert "none.yaml" in told("m", "--config", str(tmp_path / "none.yaml"))


def test_the_help_lists_vllms_flags() -> None:
    text = vllm_help()
    assert text.startswith("usage: tidegate serve")
    assert all(flag in text for flag in ("--max-model-len", "--tensor-parallel-size", "--lora-modules"))


@pytest.mark.parametrize(
    ("limit", "heads", "size"),
    [(1, 9, 1), (2, 9, 1), (3, 9, 3), (8, 9, 3), (8, 32, 8), (7, 32, 4), (6, 12, 6), (8, 5, 5), (16, 7, 7), (5, 14, 2)],
)
def test_ranks_divide_the_heads_evenly_and_are_at_most_the_limit(limit: int, heads: int, size: int) -> None:
    assert divisor_at_most(limit, heads) == size


@pytest.mark.parametrize(
    ("cores", "ranks", "expected"),
    [
        (range(4), 2, "0,1|2,3"),
        (range(4), 1, "0,1,2,3"),
        (range(5), 2, "0,1|2,3"),
        ([3, 7, 9], 3, "3|7|9"),
        ([0, 2], 4, "0|2|0|2"),
        ([5], 2, "5|5"),
    ],
)
def test_ranks_get_equal_shares_of_the_cores_and_share_when_there_are_too_few(
    cores: range | list[int], ranks: int, expected: str
) -> None:
    assert cpu_ranks(list(cores), ranks) == expected


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder as far as the arguments look into it: nine attention heads and no chat template."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_attention_heads": 9,
        "hidden_size": 576,
    }
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return tmp_path


@pytest.fixture(autouse=True)
def _no_choices_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND"):
        monkeypatch.setenv(name, "set, so that it is restored whatever a test does with it")
        monkeypatch.delenv(name)


def completed(model: Path, *flags: str) -> EngineArguments:
    return complete_arguments(parse_arguments([str(model), *flags]))


@on_a_cpu
def test_a_cpu_is_one_rank_unless_more_are_asked_for(model: Path) -> None:
    assert completed(model).args.tensor_parallel_size == 1
    assert "VLLM_CPU_OMP_THREADS_BIND" not in os.environ


@on_a_cpu
def test_ranks_on_a_cpu_get_cores_of_their_own(model: Path) -> None:
    assert completed(model, "-tp", "3").args.tensor_parallel_size == 3
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == cpu_ranks(sorted(os.sched_getaffinity(0)), 3)


@on_a_cpu
def test_cores_that_the_operator_bound_stay_bound(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    completed(model, "-tp", "3")
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


@on_a_cpu
def test_the_kv_cache_on_a_cpu_is_a_quarter_of_its_memory_and_at_most_four_gib(model: Path) -> None:
    chosen = completed(model).args.kv_cache_memory_bytes
    assert chosen == min(psutil.virtual_memory().total // 4, 4 * GIB)


@on_a_cpu
@pytest.mark.parametrize(
    ("flags", "left"), [(["--kv-cache-memory-bytes", "1024"], 1024), (["--gpu-memory-utilization", "0.5"], None)]
)
def test_a_kv_cache_that_the_operator_sized_stays_as_it_is(model: Path, flags: list[str], left: int | None) -> None:
    assert completed(model, *flags).args.kv_cache_memory_bytes == left


@on_a_cpu
def test_a_kv_cache_sized_by_vllms_variable_stays_as_it_is(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    assert completed(model).args.kv_cache_memory_bytes is None


def test_a_model_without_a_template_uses_no_tools_but_can_be_forced_to_call_them(model: Path) -> None:
    arguments = completed(model)
    assert not arguments.uses_tools
    assert not arguments.parser_named
    assert arguments.args.enable_auto_tool_choice
    assert arguments.args.tool_call_parser is not None


def test_a_parser_that_the_operator_names_is_taken(model: Path) -> None:
    template = model / "chat_template.jinja"
    template.write_text("{% for tool in tools %}{{ tool }}{% endfor %}{{ messages }}", encoding="utf-8")
    arguments = completed(model, "--tool-call-parser", "llama3_json", "--reasoning-parser", "qwen3")
    assert (arguments.args.tool_call_parser, arguments.args.reasoning_parser) == ("llama3_json", "qwen3")
    assert arguments.parser_named
    assert arguments.uses_tools


def test_a_folder_without_a_model_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(StartFailure, match=r"could not be loaded.*Give a folder with a config\.json"):
        completed(tmp_path)


def test_a_gguf_file_is_told_what_to_do_with_it() -> None:
    with pytest.raises(StartFailure, match="unpack the file"):
        complete_arguments(parse_arguments(["/models/tiny.Q4_K_M.gguf"]))


def test_an_adapter_in_the_place_of_the_model_is_told_where_it_goes(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(StartFailure, match=f"--lora-modules NAME={tmp_path}"):
        complete_arguments(parse_arguments([str(tmp_path)]))


@pytest.mark.parametrize("flags", [["--data-parallel-size", "2"], ["--mm-tensor-ipc", "torch_shm"]])
def test_what_belongs_to_one_process_is_refused_beside_further_front_ends(flags: list[str]) -> None:
    with pytest.raises(StartFailure, match=flags[0]):
        refuse_unshareable(parse_arguments(["m", *flags]))


def test_other_flags_go_with_further_front_ends() -> None:
    refuse_unshareable(parse_arguments(["m", "--tensor-parallel-size", "2"]))
