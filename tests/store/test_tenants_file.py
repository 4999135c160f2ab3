import datetime as dt
from pathlib import Path

import pytest

from server.policy.tenants import Limits, Tenant
from server.store.keys import digest
from server.store.tenants_file import FileKey, FileTenants, TenantsFileError, read_tenants

KEY = "a-key-of-good-length"


def read(tmp_path: Path, text: str, **environment: str) -> FileTenants:
    file = tmp_path / "tenants.toml"
    file.write_text(text, encoding="utf-8")
    return read_tenants(file, environment)


def problem(tmp_path: Path, text: str, **environment: str) -> str:
    with pytest.raises(TenantsFileError) as wrong:
        read(tmp_path, text, **environment)
    return str(wrong.value).removeprefix(f"{tmp_path / 'tenants.toml'}")


def test_an_empty_file_declares_nobody(tmp_path: Path) -> None:
    assert read(tmp_path, "") == FileTenants()


def test_a_tenant_has_what_the_file_says(tmp_path: Path) -> None:
    text = """
    [tenants.search]
    class = "critical"
    limits = { requests_per_minute = 600, tokens_per_minute = 200_000 }
    models = ["qwen3-8b"]
    trusted = true

    [tenants.search.end_user_limits]
    concurrency = 2

    [tenants."team.b"]
    """
    assert read(tmp_path, text).tenants == {
        "search": Tenant(
            "search",
            "critical",
            Limits(requests_per_minute=600, tokens_per_minute=200_000),
            frozenset({"qwen3-8b"}),
            True,
            Limits(concurrency=2),
        ),
        "team.b": Tenant("team.b"),
    }


def test_keys_come_as_digests_from_the_environment_and_from_files(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(f"{KEY}-in-a-file\n")
    text = f"""
    [tenants.a]
    keys = [{{ sha256 = "{digest("x")}" }}, {{ env = "A_KEY" }}, {{ file = "{secret}" }}]
    """
    assert read(tmp_path, text, A_KEY=KEY).holders == {
        digest("x"): FileKey("a", None),
        digest(KEY): FileKey("a", None),
        digest(f"{KEY}-in-a-file"): FileKey("a", None),
    }


@pytest.mark.parametrize(
    ("written", "moment"),
    [
        ("2027-06-30", dt.datetime(2027, 6, 30, tzinfo=dt.UTC)),
        ("2027-06-30T12:00:00", dt.datetime(2027, 6, 30, 12, tzinfo=dt.UTC)),
        ("2027-06-30T12:00:00+02:00", dt.datetime(2027, 6, 30, 10, tzinfo=dt.UTC)),
    ],
)
def test_the_end_of_a_tenants_keys_is_a_date_or_a_time(tmp_path: Path, written: str, moment: dt.datetime) -> None:
    held = read(tmp_path, f'[tenants.a]\nexpires = {written}\nkeys = [{{ env = "A" }}]', A=KEY).holders[digest(KEY)]
    assert held.expires_s == moment.timestamp()
    assert held.expired(moment.timestamp())
    assert not held.expired(moment.timestamp() - 1)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('[tenants.a]\nclass = "best"', 2, ["tenants.a.class", "'best'"]),
        ("[tenants.a]\n\n# so\nlimits = { requests_per_minute = 0 }", 4, ["limits", "from 1"]),
        ("[tenants.a.limits]\ntokens_per_day = 5\ntokens_per_minute = -1", 3, ["whole number", "-1"]),
        ("[tenants.a.limits]\nconcurrency = 1.5", 2, ["whole number", "1.5"]),
        ("[tenants.a.limits]\nconcurrency = true", 2, ["whole number"]),
        ("[tenants.a.limits]\nrpm = 5", 2, ["rpm", "no such field"]),
        ("[tenants.a]\n[tenants.b]\nclas = 'batch'", 3, ["tenants.b.clas", "no such field"]),
        ("[tenants.a]\nmodels = []", 2, ["models"]),
        ("[tenants.a]\nmodels = [5]", 2, ["models.0"]),
        ("[tenants.a]\nexpires = 'soon'", 2, ["expires", "TOML"]),
        ("[tenants.a]\nkeys = [{ env = 'A', sha256 = '0' }]", 2, ["keys.0"]),
        ("[tenants.a]\nkeys = [{ sha256 = 'tg-plain' }]", 2, ["keys.0.sha256"]),
        ("[tenants.a]\nkeys = [{}]", 2, ["keys.0", "sha256", "env", "file"]),
        ("\n[tenants.a]\nend_user_limits = { concurrency = 1 }", 2, ["end_user_limits", "trusted"]),
        ("\n[tenants.a]\nkeys = [{ env = 'NOT_SET' }]", 2, ["NOT_SET", "holds no key"]),
        ("\n[tenants.a]\nkeys = [{ env = 'WEAK' }]", 2, ["WEAK", "less than 16"]),
        ("\n[tenants.a]\nkeys = [{ file = '/no/such/file' }]", 2, ["/no/such/file", "No such file"]),
        ("[tenants.a]\nkeys=[{ env = 'KEY' }]\n[tenants.b]\nkeys=[{ env = 'KEY' }]", 3, ["`b`", "`a`", "as well"]),
        ("\n[tenants.anyone]", 2, ["anyone", "uses it itself"]),
        ("\n['tenants'.'a b']", 2, ["`a b`", "letters"]),
        ("[tenants.a]\n[ tenants . 'a.b' ]\nclass = 5", 3, ["tenants.a.b.class"]),
        ("[tenants.a]\nkeys = [\n  { env = 'KEY' },\n]\nrpm = 5", 5, ["rpm"]),
        ("[tenant.a]", 1, ["tenant", "no such field"]),
    ],
)
def test_what_cannot_be_used_is_said_with_its_line(tmp_path: Path, text: str, line: int, words: list[str]) -> None:
    told = problem(tmp_path, text, KEY=KEY, WEAK="short")
    assert told.startswith(f", line {line}: ")
    assert all(word in told for word in words), told
    assert "\n" not in told


def test_a_file_that_is_no_toml_is_said_with_the_line(tmp_path: Path) -> None:
    assert "line 2" in problem(tmp_path, "[tenants.a]\nclass: critical")


def test_a_file_that_is_not_there_or_no_text_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(TenantsFileError, match=r"none\.toml cannot be read: No such file or directory"):
        read_tenants(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(TenantsFileError, match="is not UTF-8 text"):
        read_tenants(tmp_path / "binary.toml")


def test_a_problem_does_not_show_a_key(tmp_path: Path) -> None:
    assert "short" not in problem(tmp_path, "[tenants.a]\nkeys = [{ env = 'WEAK' }]", WEAK="short")
