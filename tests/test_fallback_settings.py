"""The fallback upstreams in flag, environment and file: what is wrong with one is told at the start."""

from pathlib import Path

import pytest

from server.settings import FALLBACK_API_KEY_ENV, SettingsError, load_settings

TABLES = """
[[fallback]]
url = "http://small:8000/v1"
name = "small"
models = { "big" = "little" }
api_key_file = "KEY_FILE"
canary_share = 0.01

[[fallback]]
url = "https://api.example.com/v1"
"""


def settings_file(folder: Path, text: str) -> Path:
    file = folder / "settings.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_tables_are_asked_in_their_order_and_before_the_flag(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("a-key\n", encoding="utf-8")
    file = settings_file(tmp_path, TABLES.replace("KEY_FILE", str(tmp_path / "key")))
    flags = {"fallback_url": ("http://last/v1",), "fallback_model": "tiny"}
    first, second, last = load_settings(flags, file).fallbacks
    assert (first.name, first.models, first.api_key(), first.canary_share) == (
        "small",
        {"big": "little"},
        "a-key",
        0.01,
    )
    assert (second.host, second.api_key()) == ("api.example.com", None)
    assert (last.url, last.models) == ("http://last/v1", {"*": "tiny"})


def test_the_flags_upstream_takes_its_key_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FALLBACK_API_KEY_ENV, "from-the-environment")
    (only,) = load_settings({"fallback_url": ("http://other/v1",)}, None).fallbacks
    assert only.api_key() == "from-the-environment"


@pytest.mark.parametrize("url", ["other:8000/v1", "//other/v1", "ftp://other/v1", "http:///v1", "/v1", "other"])
def test_a_url_without_scheme_or_host_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="http://HOST"):
        load_settings({"fallback_url": (url,)}, None)
    with pytest.raises(SettingsError, match="http://HOST"):
        load_settings({}, settings_file(tmp_path, f'[[fallback]]\nurl = "{url}"\n'))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('api_key_env = "NO_SUCH_VARIABLE"', "NO_SUCH_VARIABLE"),
        ('api_key_file = "/no/such/file"', "/no/such/file"),
        ('api_key = "secret"', "api_key"),
        ("canary_share = 2", "canary_share"),
        ("first_byte_timeout_s = 0", "first_byte_timeout_s"),
    ],
)
def test_a_wrong_table_is_told_at_the_start(line: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=words) as wrong:
        load_settings({}, settings_file(tmp_path, f'[[fallback]]\nurl = "http://other/v1"\n{line}\n'))
    assert "secret" not in str(wrong.value)
