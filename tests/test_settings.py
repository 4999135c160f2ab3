import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from server.settings import SECTIONS, Settings, SettingsError, flag_name, load_settings, switch_off_alias

SettingsFile = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in tuple(os.environ):
        if name.upper().startswith("TIDEGATE_"):
            monkeypatch.delenv(name)


@pytest.fixture
def settings_file(tmp_path: Path) -> SettingsFile:
    def write(text: str) -> Path:
        path = tmp_path / "tidegate.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def sentence(flags: dict[str, Any], file: Path | None = None) -> str:
    """What the operator is told."""
    with pytest.raises(SettingsError) as wrong:
        load_settings(flags, file)
    return str(wrong.value)


def test_with_nothing_given_the_defaults_are_safe() -> None:
    settings = load_settings({}, None)
    assert (settings.host, settings.port, settings.model) == ("127.0.0.1", 8000, None)
    assert (settings.api_key, settings.allowed_origins, settings.allow_client_field) == ((), (), ())
    assert not settings.developer_routes
    assert settings.background_task_max_tokens == 2048


def test_a_flag_beats_the_environment_and_the_environment_beats_the_file(
    settings_file: SettingsFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = settings_file('port = 1\nhost = "file"\nlog_level = "error"')
    monkeypatch.setenv("TIDEGATE_PORT", "2")
    monkeypatch.setenv("TIDEGATE_HOST", "environment")
    settings = load_settings({"port": "3"}, file)
    assert (settings.port, settings.host, settings.log_level) == (3, "environment", "error")


@pytest.mark.parametrize("field", ["api_key", "allowed_origins", "allowed_methods", "allowed_headers"])
def test_several_values_in_a_variable_are_separated_by_commas(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"TIDEGATE_{field.upper()}", "one, two,,three ")
    assert getattr(load_settings({}, None), field) == ("one", "two", "three")


def test_client_fields_in_a_variable_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEGATE_ALLOW_CLIENT_FIELD", "cache_salt,headers")
    assert load_settings({}, None).allow_client_field == ("cache_salt", "headers")


def test_several_values_in_the_file_are_a_list(settings_file: SettingsFile) -> None:
    assert load_settings({}, settings_file('api_key = ["one", "two, three"]')).api_key == ("one", "two, three")


def test_an_empty_variable_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEGATE_PORT", "")
    assert load_settings({}, None).port == 8000


def test_the_variable_that_names_the_file_is_no_unknown_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEGATE_SETTINGS", "settings.toml")
    assert load_settings({}, None).port == 8000


def test_an_unknown_variable_is_refused_with_the_nearest_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEGATE_API_KEYS", "secret")
    told = sentence({})
    assert told == "Unknown environment variable: TIDEGATE_API_KEYS. Did you mean TIDEGATE_API_KEY?"


def test_an_unknown_variable_like_no_other_is_refused_without_a_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEGATE_ZZZZZZZZZZZZ", "1")
    assert sentence({}) == "Unknown environment variable: TIDEGATE_ZZZZZZZZZZZZ."


def test_variables_of_other_programs_are_none_of_our_business(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PORT", "x")
    monkeypatch.setenv("PORT", "1")
    assert load_settings({}, None).port == 8000


def test_an_unknown_key_is_refused_with_its_file_and_the_nearest_name(settings_file: SettingsFile) -> None:
    file = settings_file("prot = 1")
    assert sentence({}, file) == f"Unknown key in {file}: prot. Did you mean port?"


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("port", "http", "--port"),
        ("port", "65536", "--port"),
        ("port", "-1", "--port"),
        ("drain_timeout_s", "-1", "--drain-timeout"),
        ("max_body_mib", "0", "--max-body-mib"),
        ("default_max_tokens", "0", "--default-max-tokens"),
        ("keep_alive_s", "soon", "--keep-alive-s"),
        ("log_format", "xml", "--log-format"),
        ("log_level", "loud", "--log-level"),
        ("allow_client_field", ("cash_salt",), "--allow-client-field"),
        ("ssl_cert_reqs", "3", "--ssl-cert-reqs"),
    ],
)
def test_a_wrong_value_is_told_with_its_flag_and_the_value(field: str, value: Any, flag: str) -> None:
    told = sentence({field: value})
    assert told.startswith(f"Wrong value for {flag}: ")
    assert (value if isinstance(value, str) else value[0]) in told
    assert "\n" not in told


def test_a_key_that_cannot_be_used_is_not_shown() -> None:
    told = sentence({"operator_key": "too-short"})
    assert told == "Wrong value for --operator-key: String should have at least 16 characters."


def test_a_wrong_value_in_the_environment_is_told_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEGATE_ACCESS_LOG", "perhaps")
    assert sentence({}).startswith("Wrong value for --access-log: ")


@pytest.mark.parametrize("text", ["port = 'http'", "log_level = 5", "api_key = 5", "vllm = 5"])
def test_a_value_of_the_wrong_type_in_the_file_is_told_in_a_sentence(settings_file: SettingsFile, text: str) -> None:
    assert sentence({}, settings_file(text)).startswith("Wrong value for --")


def test_a_variable_that_should_be_a_table_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEGATE_VLLM", "--max-model-len 4096")
    assert "vllm" in sentence({}).lower()


def test_a_file_that_is_not_there_is_told_in_a_sentence(tmp_path: Path) -> None:
    told = sentence({}, tmp_path / "none.toml")
    assert told == f"The settings file {tmp_path / 'none.toml'} cannot be read: No such file or directory."


def test_a_file_that_is_no_toml_is_told_with_the_line(settings_file: SettingsFile) -> None:
    told = sentence({}, settings_file("port = 1\nhost: x"))
    assert "is not valid TOML" in told
    assert "line 2" in told


def test_a_file_that_is_no_text_is_told_in_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "tidegate.toml"
    file.write_bytes(b"\xff\xfe")
    assert "is not valid TOML" in sentence({}, file)


def test_the_vllm_table_becomes_flags(settings_file: SettingsFile) -> None:
    text = """
    [vllm]
    max_model_len = 4096
    gpu-memory-utilization = 0.8
    enable_prefix_caching = true
    enforce_eager = false
    served_model_name = ["a", "b"]
    quantization = "awq"
    """
    assert load_settings({}, settings_file(text)).vllm_flags == (
        *("--max-model-len", "4096"),
        *("--gpu-memory-utilization", "0.8"),
        "--enable-prefix-caching",
        "--no-enforce-eager",
        *("--served-model-name", "a", "b"),
        *("--quantization", "awq"),
    )


def test_a_table_in_the_vllm_table_becomes_json(settings_file: SettingsFile) -> None:
    text = '[vllm.speculative_config]\nmethod = "ngram"\nnum_speculative_tokens = 3\ndisable = false'
    flags = load_settings({}, settings_file(text)).vllm_flags
    assert flags == ("--speculative-config", '{"method": "ngram", "num_speculative_tokens": 3, "disable": false}')


def test_settings_do_not_change_once_made() -> None:
    settings = load_settings({}, None)
    with pytest.raises(ValidationError):
        settings.port = 1


def test_every_setting_is_in_a_section_and_says_what_it_is() -> None:
    in_sections = [name for section in SECTIONS for name in section.model_fields]
    tables = [name for name, field in Settings.model_fields.items() if field.default_factory in (dict, tuple)]
    assert sorted([*in_sections, *tables, "model"]) == sorted(Settings.model_fields)
    assert all(field.description for field in Settings.model_fields.values())


def test_a_flag_is_the_fields_name_unless_vllm_calls_it_otherwise() -> None:
    assert flag_name("max_body_mib") == "--max-body-mib"
    assert flag_name("drain_timeout_s") == "--drain-timeout"
    assert switch_off_alias("docs") == "--disable-fastapi-docs"
    assert switch_off_alias("port") is None


def test_a_setting_of_ours_in_the_vllm_table_is_refused_and_not_ignored(settings_file: SettingsFile) -> None:
    assert "port" in sentence({}, settings_file("[vllm]\nport = 9000"))


@pytest.fixture
def secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "secrets"
    folder.mkdir()
    monkeypatch.setenv("TIDEGATE_SECRETS", str(folder))
    return folder


def test_a_secret_is_a_file_with_the_name_of_its_variable(secrets: Path) -> None:
    (secrets / "tidegate_api_key").write_text("one,two\n")
    (secrets / "tidegate_redis_url").write_text("redis://:pass@redis:6379/0\n")
    (secrets / "somebody_elses").write_text("nothing of ours")
    settings = load_settings({}, None)
    assert settings.api_key == ("one", "two")
    assert settings.redis_url == "redis://:pass@redis:6379/0"


def test_a_variable_beats_a_secret_and_a_secret_beats_the_file(
    secrets: Path, settings_file: SettingsFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    (secrets / "tidegate_operator_key").write_text("from-the-secrets-folder")
    (secrets / "tidegate_redis_url").write_text("redis://secret")
    monkeypatch.setenv("TIDEGATE_REDIS_URL", "redis://variable")
    settings = load_settings({}, settings_file('operator_key = "from-the-settings-file"'))
    assert (settings.operator_key, settings.redis_url) == ("from-the-secrets-folder", "redis://variable")


def test_a_secrets_folder_as_kubernetes_mounts_it_is_read(secrets: Path) -> None:
    (secrets / "..2026").mkdir()
    (secrets / "..2026" / "tidegate_api_key").write_text("key")
    (secrets / "..data").symlink_to("..2026")
    (secrets / "tidegate_api_key").symlink_to("..data/tidegate_api_key")
    assert load_settings({}, None).api_key == ("key",)


def test_a_misspelled_secret_is_refused_with_the_right_name(secrets: Path) -> None:
    (secrets / "tidegate_api_keys").write_text("key")
    assert "Did you mean tidegate_api_key?" in sentence({})


def test_a_secrets_folder_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TIDEGATE_SECRETS", str(tmp_path / "nowhere"))
    assert "named by TIDEGATE_SECRETS, cannot be read" in sentence({})


def test_the_value_of_a_wrong_secret_is_not_told(secrets: Path) -> None:
    (secrets / "tidegate_operator_key").write_text("too-short")
    assert "too-short" not in sentence({})
